"""An evaluation of three items against values computed by hand."""

import math

import pyarrow.csv
import pyarrow.parquet
import pytest
from three_items import BASELINES, add_targets_sampling, evaluate_world

from mllm_msr.core.schemas import Scores
from mllm_msr.core.tables import write_rows
from mllm_msr.evaluation.results import write_evaluation
from mllm_msr.evaluation.scorers import MODEL
from mllm_msr.evaluation.table import POCKET_NOTE, format_table


def test_figures_match_hand_computed_values(world):
    metrics = evaluate_world(world).metrics["uniform"]
    log3 = 1 / math.log2(3)
    figures = {
        "test": {"auc": 0.875, "hr@1": 0.75, "hr@2": 1, "ndcg@2": (3 + log3) / 4, "ties": 0.5},
        "valid": {"auc": 0, "hr@1": 0, "hr@2": 0, "mrr@2": 0, "ties": 0, "sequences": 1},
        "oracle": {"auc": 1, "hr@1": 1, "mrr@2": 1, "ties": 0, "sequences": 2},
        "popularity": {"auc": 0.625, "hr@1": 0.5, "hr@2": 0.75, "mrr@2": 0.625, "ties": 0.5},
        # One training target: a, so it is first, and then as popularity says.
        "target_popularity": {"auc": 0.625, "hr@1": 0.5, "hr@2": 0.75, "ties": 0.5},
        "chance": {"auc": 0.5, "hr@1": 1 / 3, "hr@2": 2 / 3, "mrr@2": 0.5, "ties": 1},
    }
    for section, expected in figures.items():
        for name, value in expected.items():
            assert metrics[section][name] == pytest.approx(value, abs=1e-6), (section, name)


def test_figures_have_intervals(world):
    metrics = evaluate_world(world).metrics
    test, chance = metrics["uniform"]["test"], metrics["uniform"]["chance"]
    assert (test["auc_low"], test["auc_high"]) == (0.75, 1.0)  # of .75 and 1, two drawn
    assert chance["hr@1_low"] == chance["hr@1"] == chance["hr@1_high"]
    assert metrics["confidence"] == 0.9


def test_without_an_oracle_there_is_no_oracle_row(world):
    result = evaluate_world(world, oracle=False)
    assert "oracle" not in result.metrics["uniform"]
    assert "oracle" not in result.curves["scorer"].to_pylist()
    assert POCKET_NOTE not in format_table(result.metrics, result.comparisons)


def test_baselines_are_measured_on_the_same_candidates(world):
    metrics = evaluate_world(world, baselines=BASELINES).metrics["uniform"]
    assert metrics["sasrec"] == metrics["test"]
    assert metrics["item_knn"]["auc"] == pytest.approx(1 - metrics["test"]["auc"])
    others = {name: v for name, v in metrics.items() if name not in BASELINES}
    assert others == evaluate_world(world).metrics["uniform"]


def test_scorers_have_one_order_everywhere(world):
    result = evaluate_world(world, baselines=reversed(BASELINES))
    write_evaluation(result, world / "out")
    rows = pyarrow.parquet.read_table(world / "out/per_sequence.parquet").to_pylist()
    simple = ["target_popularity", "popularity", "chance"]
    scorers = [MODEL, "oracle", "sasrec", "item_knn", *simple]
    assert {row["scorer"] for row in rows} == set(scorers)
    assert list(dict.fromkeys(result.curves["scorer"].to_pylist())) == scorers
    lines = format_table(result.metrics, result.comparisons).splitlines()[2:9]
    named = [line.split("|")[1].strip() for line in lines]
    others = ["SASRec", "Item-kNN", "target popularity", "popularity", "chance"]
    assert named == [MODEL, "oracle", *others]


def test_samplings_are_measured_separately_and_shown_side_by_side(world):
    before = evaluate_world(world, baselines=BASELINES)
    add_targets_sampling(world)
    result = evaluate_world(world, baselines=BASELINES)
    # No figure of the one sampling depends on the other.
    assert result.metrics["uniform"] == before.metrics["uniform"]
    targets = result.metrics["targets"]
    assert "valid" not in targets
    assert (targets["test"]["auc"], targets["item_knn"]["auc"]) == (0.75, 0.25)
    assert targets["popularity"]["auc"] == 0.5  # a above b, which is a hit once and a miss once
    assert targets["chance"]["hr@1"] == 0.5
    head, _, first, *_ = format_table(result.metrics, result.comparisons).splitlines()
    assert [cell.strip() for cell in head.split("|")[2:-1]] == [
        *("AUC, uniform", "HR@1", "NDCG@1", "MRR@1"),
        *("AUC, targets", "HR@1", "NDCG@1", "MRR@1"),
    ]
    assert "0.875 [0.750, 1.000] | 0.750" in first
    assert "0.750 [0.500, 1.000] | 0.750" in first
    assert set(result.curves["sampling"].to_pylist()) == {"uniform", "targets"}
    shares = [row for row in result.histogram.to_pylist() if row["sampling"] == "targets"]
    assert sum(row["share"] for row in shares) == pytest.approx(2)


def test_without_scores_of_a_model_the_others_are_measured(world):
    before = evaluate_world(world, baselines=BASELINES)
    write_rows(Scores, [], world / "scores.parquet")
    result = evaluate_world(world, baselines=BASELINES)
    for name, figures in result.metrics["uniform"].items():
        assert figures == before.metrics["uniform"][name]
    assert not {"test", "valid", "calibration"} & result.metrics["uniform"].keys()
    assert result.reliability.num_rows == 0
    assert MODEL not in format_table(result.metrics, result.comparisons)
    assert result.histogram.num_rows == 0
    write_evaluation(result, world / "out")
    header = (world / "out/plots/probabilities.csv").read_text().strip()
    assert header == '"sampling","label","p_yes","p_yes_end","share"'


def test_p_yes_is_calibrated_on_the_validation_candidates_of_its_sampling(world):
    add_targets_sampling(world)  # without candidates of valid
    metrics = evaluate_world(world).metrics
    uniform, targets = (metrics[each]["calibration"] for each in ("uniform", "targets"))
    assert list(uniform) == [
        *("candidates", "target_share", "ece", "brier"),
        *("slope", "intercept", "ece_calibrated", "brier_calibrated"),
    ]
    assert (uniform["candidates"], uniform["target_share"]) == (6, pytest.approx(1 / 3, abs=1e-6))
    # The valid target has the least score, so that no slope above 0 fits.
    assert uniform["slope"] == 0
    assert list(targets) == ["candidates", "target_share", "ece", "brier"]


@pytest.mark.parametrize("calibration", ["none", "temperature", "platt"])
def test_no_other_figure_depends_on_the_calibration(world, calibration):
    expected, result = evaluate_world(world), evaluate_world(world, calibration=calibration)
    (before, after) = (each.metrics["uniform"] for each in (expected, result))
    assert ("slope" in after["calibration"]) == (calibration != "none")
    assert before | {"calibration": {}} == after | {"calibration": {}}
    assert expected.comparisons == result.comparisons
    assert expected.curves == result.curves


def test_each_scorer_that_knows_the_user_is_compared_with_each_that_does_not(world):
    result = evaluate_world(world, baselines=BASELINES)
    pairs = [(each.sampling, each.scorer, each.baseline) for each in result.comparisons]
    assert pairs == [
        ("uniform", scorer, baseline)
        for scorer in (MODEL, "sasrec", "item_knn")
        for baseline in ("target_popularity", "popularity")
    ]
    for each in result.comparisons:
        section = "test" if each.scorer == MODEL else each.scorer
        ours, other = (result.metrics["uniform"][name]["auc"] for name in (section, each.baseline))
        assert each.difference.value == pytest.approx(ours - other, abs=1e-6)
    # Of two sequences each sign pattern counts a quarter, so no p is below .5; by Holm it is 1.
    assert {each.difference.p for each in result.comparisons} == {1.0}
