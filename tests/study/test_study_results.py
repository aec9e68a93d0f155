"""The results of a study: rows, tests, the table, the CSV and the figure."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from mllm_msr.core.errors import DataError
from mllm_msr.evaluation.comparisons import SAMPLES, SEED, compare, holm, randomisation_test
from mllm_msr.evaluation.metrics import summarize
from mllm_msr.evaluation.scorers import MODEL
from mllm_msr.evaluation.table import POCKET_NOTE
from mllm_msr.ranking import TargetRanks, auc
from mllm_msr.study import plans, results, writing
from mllm_msr.study.dvc_internals import Finished
from mllm_msr.study.experiments import Rankings
from mllm_msr.study.figures import MARKERS
from mllm_msr.study.plans import Study, Variant
from mllm_msr.study.published import PROTOCOL
from mllm_msr.study.results import Results, Row, compare_rankings, gather_results
from mllm_msr.study.writing import format_comparison, format_results, write_results

SVG = "{http://www.w3.org/2000/svg}"
SEQUENCES, CANDIDATES = 60, 21
FEWER = 48  # sequences of the second sampling, which leaves some out
COUNTS = ("candidates", "above", "tied")
TEST = ("", "_low", "_high", "_p_holm")  # ends of the columns of one test
PARAMS: dict[str, Any] = {
    "preprocess": {"source": "pocket"},
    "filter_sequences": {"history": "recent", "target": "last", "test_negatives": 20},
    "infer_preferences": {"block_size": 3},
    "sft": {"seed": 7},
}
MICROLENS = {
    **PARAMS,
    "preprocess": {"source": "microlens"},
    "filter_sequences": {**PARAMS["filter_sequences"], **PROTOCOL},
}


def draw_ranks(mean: float, seed: int = 0, sequences: int = SEQUENCES) -> TargetRanks:
    """Make ranks with about this AUC."""
    above = np.random.default_rng(seed).binomial(CANDIDATES - 1, 1 - mean, size=sequences)
    full = np.full(sequences, CANDIDATES)
    return TargetRanks(np.arange(sequences), full, above, np.zeros_like(above))


def chance(sequences: int = SEQUENCES) -> TargetRanks:
    zeros = np.zeros(sequences, dtype=int)
    full = np.full(sequences, CANDIDATES)
    return TargetRanks(np.arange(sequences), full, zeros, full - 1)


def ranked(ranks: Mapping[str, TargetRanks], candidates: str) -> Rankings:
    """Make rankings of the sampling uniform."""
    return Rankings({("uniform", scorer): each for scorer, each in ranks.items()}, candidates)


def measured(ranks: Mapping[str, TargetRanks], ks: Sequence[int] = (5,)) -> dict[str, Any]:
    """Make the section of one sampling in ``metrics.json``."""
    sections = {
        "test" if scorer == MODEL else scorer: summarize(
            found, ks=ks, samples=50, confidence=0.95, seed=0
        )
        for scorer, found in ranks.items()
    }
    return {**sections, "valid": sections["test"]}


Make = Callable[..., tuple[dict[str, Variant], dict[str, Finished]]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a function that makes the experiments of a study with an AUC of each variant.

    With ``targets``, AUC by variant or baseline, there is a second sampling of fewer sequences;
    variants and baselines that it does not name have the AUC of the first.
    """
    kept: dict[str, Rankings] = {}
    monkeypatch.setattr(results, "read_rankings", kept.__getitem__)

    def make_experiments(
        study: Study,
        means: Mapping[str, float],
        baselines: Mapping[str, float],
        *,
        targets: Mapping[str, float] | None = None,
        ks: Sequence[int] = (5,),
    ) -> tuple[dict[str, Variant], dict[str, Finished]]:
        names = {f"{study.name}-{each.name}-0123abcd": each for each in study.variants}
        samplings = {"uniform": (SEQUENCES, {})}
        if targets is not None:
            samplings["targets"] = (FEWER, targets)
        found = {}
        for name, variant in names.items():
            ranks, metrics = {}, {"confidence": 0.95}
            for sampling, (sequences, other) in samplings.items():
                ours = other.get(variant.name, means[variant.name])
                of_scorer = {MODEL: draw_ranks(ours, 0, sequences), "chance": chance(sequences)}
                for scorer, mean in baselines.items():
                    of_scorer[scorer] = draw_ranks(other.get(scorer, mean), 9, sequences)
                ranks |= {(sampling, scorer): each for scorer, each in of_scorer.items()}
                metrics[sampling] = measured(of_scorer, ks)
            kept[f"rev-{name}"] = Rankings(ranks, "the same")
            found[name] = Finished(name, f"rev-{name}", metrics)
        return names, found

    return make_experiments


@pytest.fixture
def main_table(make: Make) -> Results:
    baselines = {"sasrec": 0.7, "target_popularity": 0.6, "popularity": 0.55, "oracle": 0.97}
    baselines |= {"brand_new": 0.6}
    made = make(plans.plan_table(), {"full": 0.9, "zero-shot": 0.6, "tallrec": 0.9}, baselines)
    return gather_results(plans.plan_table(), PARAMS, *made)


# -- the main table --------------------------------------------------------------------------------


def test_the_main_table_has_every_scorer_once_in_the_order_of_the_groups(main_table):
    assert [(row.group, row.label) for row in main_table.rows] == [
        ("ours", "MLLM-MSR"),
        ("LLM", "MLLM, no fine-tuning"),
        ("LLM", "TALLRec's recipe: titles only, fine-tuned"),
        ("sequential", "SASRec"),
        ("other", "brand_new"),
        ("simple", "target popularity"),
        ("simple", "popularity"),
        ("simple", "chance"),
        ("bound", "oracle"),
    ]


def test_text_and_content_baselines_stand_in_groups_of_their_own(make):
    scorers = ["word_overlap", "content_knn", "item_knn", "content_knn_summary", "popularity"]
    scorers += ["recent_popularity", "target_popularity"]
    study, means = plans.plan_table(), {"full": 0.9, "zero-shot": 0.6, "tallrec": 0.9}
    found = gather_results(study, PARAMS, *make(study, means, dict.fromkeys(scorers, 0.6)))
    assert [(row.group, row.key) for row in found.rows[3:]] == [
        ("text", "content_knn_summary"),
        ("text", "word_overlap"),
        ("simple", "item_knn"),
        ("simple", "content_knn"),
        ("simple", "target_popularity"),
        ("simple", "recent_popularity"),
        ("simple", "popularity"),
        ("simple", "chance"),
    ]


def test_every_group_has_a_marker_of_its_own():
    assert len(set(MARKERS)) >= len(results.GROUPS)


def test_every_row_but_ours_is_tested_against_ours(main_table):
    first, *others = main_table.rows
    assert first.differences == {}
    assert all(row.differences.keys() == {"uniform"} for row in others)
    by_key = {row.key: row.differences["uniform"] for row in others}
    assert by_key["zero-shot"].p < 0.01
    assert by_key["zero-shot"].high < 0 < by_key["oracle"].low
    assert (by_key["tallrec"].value, by_key["tallrec"].p) == (0, 1)  # the very same ranks


def test_p_values_are_corrected_for_the_number_of_rows(main_table):
    ours, worse = auc(draw_ranks(0.9)), auc(draw_ranks(0.7, seed=9))
    raw = compare(worse, ours, confidence=0.95)
    sasrec = next(row for row in main_table.rows if row.key == "sasrec").differences["uniform"]
    assert sasrec.value == pytest.approx(raw.value)
    assert sasrec.p > raw.p


def test_the_best_row_is_compared_with_the_best_other_one_and_no_oracle(main_table):
    best, other, difference = main_table.best["uniform"]
    assert {best.key, other.key} == {"full", "tallrec"}
    assert difference.p == 1


def test_the_notes_say_what_the_figures_are(main_table):
    text = format_results(main_table, PARAMS, "abc1234")
    assert "| group      | scorer " in text
    assert "| AUC, uniform " in text
    assert "- negatives: uniform; test sequences: uniform: 60\n" in text
    assert "- in brackets: 95% bootstrap intervals over sequences" in text
    assert "Holm-corrected for 8 in each sampling" in text
    assert "by these same figures (no oracle), uniform: MLLM-MSR and TALLRec's" in text
    assert "not corrected for the choice" in text
    assert "chosen by popularity" not in text
    assert "- commit abc1234" in text
    assert text.rstrip().endswith(POCKET_NOTE)
    assert "chance" in text
    assert "popularity" in text
    assert POCKET_NOTE not in format_results(main_table, MICROLENS, "abc1234")


def test_a_protocol_that_baselines_are_not_trained_for_is_noted(main_table):
    asked = {**PARAMS["filter_sequences"], "history": "popular"}
    text = format_results(main_table, {**PARAMS, "filter_sequences": asked}, "abc1234")
    assert "- histories or targets are chosen by popularity: baselines learned from whole" in text


def read_csv(folder: Path) -> list[dict[str, str]]:
    text = (folder / "table.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def test_the_csv_has_every_number_of_the_table(main_table, tmp_path):
    write_results(main_table, PARAMS, "abc1234", tmp_path / "table")
    lines = read_csv(tmp_path / "table")
    assert [line["key"] for line in lines] == [row.key for row in main_table.rows]
    for line, row in zip(lines, main_table.rows, strict=True):
        figures = row.figures["uniform"]
        assert float(line["auc"]) == pytest.approx(figures["auc"].value, abs=1e-6)
        assert float(line["mrr@5_high"]) == pytest.approx(figures["mrr@5"].high, abs=1e-6)
        assert line["experiment"] == row.experiment.name
        assert line["revision"] == row.experiment.revision
    assert lines[0]["auc_difference"] == ""
    assert float(lines[2]["auc_difference_p_holm"]) == 1


def test_a_study_replaces_the_files_of_the_last(main_table, tmp_path):
    folder = tmp_path / "studies" / "table"
    for commit in ("one", "two"):
        write_results(main_table, MICROLENS, commit, folder)
    assert {file.name for file in folder.iterdir()} == {
        "table.md",
        "table.csv",
        "figure.svg",
        "figure.png",
    }
    assert "commit two" in (folder / "table.md").read_text(encoding="utf-8")
    assert [path.name for path in folder.parent.iterdir()] == ["table"]


# -- above the scorers that do not know the user? --------------------------------------------------


def test_every_row_that_knows_the_user_is_tested_against_each_that_does_not(main_table):
    tested = {row.key: row.over["uniform"] for row in main_table.rows if row.over}
    assert list(tested) == ["full", "zero-shot", "tallrec", "sasrec", "brand_new"]
    assert all(list(each) == ["target_popularity", "popularity"] for each in tested.values())
    ours, popularity = auc(draw_ranks(0.9)), auc(draw_ranks(0.55, seed=9))
    raw = compare(ours, popularity, confidence=0.95)
    found = tested["full"]["popularity"]
    assert found[:3] == pytest.approx(raw[:3])
    assert found.p == pytest.approx(10 * raw.p)  # the smallest of ten, by Holm


def test_rows_not_shown_to_be_above_are_named_with_the_baselines(make):
    means = {"full": 0.9, "zero-shot": 0.3, "tallrec": 0.9}
    baselines = {"target_popularity": 0.8, "popularity": 0.55, "markov": 0.55, "sasrec": 0.8}
    made = make(plans.plan_table(), means, baselines)
    text = format_results(gather_results(plans.plan_table(), PARAMS, *made), PARAMS, "abc")
    assert "non-personalised baselines (target popularity, popularity): difference in AUC" in text
    assert "Holm-corrected for 10 in each sampling\n" in text
    note = next(line for line in text.splitlines() if line.startswith("- not significantly above"))
    assert note == (
        "- not significantly above them (p < 0.05), uniform:"
        " MLLM, no fine-tuning (target popularity, popularity), SASRec (target popularity),"
        " Markov chain (target popularity, popularity)"
    )


def test_an_ablation_tests_its_variants_against_them_too(make, tmp_path):
    means = {variant.name: 0.9 for variant in plans.ABLATION.variants}
    made = make(plans.ABLATION, means, {"popularity": 0.55, "oracle": 0.97})
    found = gather_results(plans.ABLATION, PARAMS, *made)
    tested = [row.key for row in found.rows if row.over]
    assert tested == [variant.name for variant in plans.ABLATION.variants]
    write_results(found, PARAMS, "abc", tmp_path / "ablation")
    first, *_, oracle = read_csv(tmp_path / "ablation")
    over = found.rows[0].over["uniform"]["popularity"]
    assert float(first["auc_over_popularity_low"]) == pytest.approx(over.low, abs=1e-6)
    assert float(first["auc_over_popularity_p_holm"]) == pytest.approx(over.p, abs=1e-6)
    assert first["auc_over_target_popularity"] == oracle["auc_over_popularity"] == ""
    assert "0.05), uniform: none" in (tmp_path / "ablation" / "table.md").read_text(
        encoding="utf-8"
    )


def test_a_sweep_tests_nothing_against_them(make):
    study = plans.plan_block_size()
    made = make(study, dict.fromkeys("12345", 0.8), {"popularity": 0.55})
    found = gather_results(study, PARAMS, *made)
    assert found.comparisons == []
    assert "not significantly above" not in format_results(found, PARAMS, "abc")


def test_rows_with_equal_labels_keep_their_own_tests(make):
    variants = (Variant("full", "same"), Variant("a", "same"), Variant("b", "same"))
    study = Study("ablation", "Rows of one name.", variants)
    made = make(study, {"full": 0.9, "a": 0.7, "b": 0.5}, {})
    full, worse, worst, _ = gather_results(study, PARAMS, *made).rows
    assert full.differences == {}
    assert worst.differences["uniform"].value < worse.differences["uniform"].value < 0


# -- several samplings of negatives ----------------------------------------------------------------


@pytest.fixture
def two_samplings(make: Make) -> Results:
    """Make a main table whose order under ``targets`` is another one."""
    means = {"full": 0.9, "zero-shot": 0.75, "tallrec": 0.8}
    baselines = {"sasrec": 0.7, "target_popularity": 0.6, "popularity": 0.55, "oracle": 0.97}
    targets = {"full": 0.5, "zero-shot": 0.45, "tallrec": 0.85, "target_popularity": 0.5}
    made = make(plans.plan_table(), means, baselines, targets=targets)
    return gather_results(plans.plan_table(), PARAMS, *made)


def test_samplings_stand_side_by_side_with_their_own_figures(two_samplings):
    lines = format_results(two_samplings, PARAMS, "abc").splitlines()
    head, _, ours, *_ = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])
    block = ["HR@5", "NDCG@5", "MRR@5", "difference in AUC", "p"]
    assert head == ["group", "scorer", "AUC, uniform", *block, "AUC, targets", *block]
    figures = two_samplings.rows[0].figures
    for cell, sampling in ((2, "uniform"), (8, "targets")):
        mean, low, high = figures[sampling]["auc"]
        assert ours[cell] == f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        assert ours[cell + 1] == f"{figures[sampling]['hr@5'].value:.3f}"
    assert figures["targets"]["auc"].value < 0.6 < figures["uniform"]["auc"].value


def test_a_sampling_with_fewer_sequences_is_tested_separately(two_samplings):
    assert two_samplings.sequences == {"uniform": SEQUENCES, "targets": FEWER}
    text = format_results(two_samplings, PARAMS, "abc")
    assert "- negatives: uniform and targets; test sequences: uniform: 60; targets: 48\n" in text
    tallrec = next(row for row in two_samplings.rows if row.key == "tallrec")
    for sampling, (ours, reference), size in (
        ("uniform", (0.8, 0.9), SEQUENCES),
        ("targets", (0.85, 0.5), FEWER),
    ):
        raw = compare(
            auc(draw_ranks(ours, 0, size)), auc(draw_ranks(reference, 0, size)), confidence=0.95
        )
        assert tallrec.differences[sampling][:3] == pytest.approx(raw[:3])
    assert tallrec.differences["uniform"].high < 0 < tallrec.differences["targets"].low


def raw_p(row: Row, other: Row, sampling: str) -> float:
    """Test two rows by themselves."""
    ours, others = (
        auc(results.read_rankings(each.experiment.revision).ranks[sampling, each.scorer])
        for each in (row, other)
    )
    return randomisation_test(ours - others, SAMPLES, SEED)


@pytest.mark.parametrize("sampling", ["uniform", "targets"])
def test_p_values_are_corrected_within_each_sampling(two_samplings, sampling):
    rows = {row.key: row for row in two_samplings.rows}
    pairs = [(row, rows[name]) for row in rows.values() for name in row.over.get(sampling, {})]
    assert len(pairs) == 8  # four rows that know the user, two that do not
    raw = [raw_p(row, other, sampling) for row, other in pairs]
    assert [row.over[sampling][other.key].p for row, other in pairs] == pytest.approx(holm(raw))
    tested = [row for row in rows.values() if row.differences]
    assert len(tested) == len(rows) - 1
    raw = [raw_p(row, rows["full"], sampling) for row in tested]
    assert [row.differences[sampling].p for row in tested] == pytest.approx(holm(raw))


def test_each_sampling_has_its_own_best_row_and_its_own_notes(two_samplings):
    best = {sampling: each.row.key for sampling, each in two_samplings.best.items()}
    assert best == {"uniform": "full", "targets": "tallrec"}
    text = format_results(two_samplings, PARAMS, "abc")
    assert "(no oracle), uniform: MLLM-MSR and TALLRec" in text
    assert "(no oracle), targets: TALLRec's recipe: titles only, fine-tuned and SASRec" in text
    assert "above them (p < 0.05), uniform: none\n" in text
    note = next(line for line in text.splitlines() if "(p < 0.05), targets: " in line)
    named = note.partition("targets: ")[2]
    assert named.startswith("MLLM-MSR (target popularity, popularity), MLLM, no fine-tuning (")
    assert "TALLRec" not in named


def test_the_csv_has_a_line_for_each_sampling_and_row(two_samplings, tmp_path):
    write_results(two_samplings, PARAMS, "abc", tmp_path / "table")
    lines = read_csv(tmp_path / "table")
    keys = [row.key for row in two_samplings.rows]
    assert [(line["sampling"], line["key"]) for line in lines] == list(
        product(["uniform", "targets"], keys)
    )
    for line in lines:
        row = two_samplings.rows[keys.index(line["key"])]
        figure = row.figures[line["sampling"]]["ndcg@5"]
        cells = [float(line[f"ndcg@5{end}"]) for end in ("", "_low", "_high")]
        assert cells == pytest.approx(figure, abs=1e-6)
        assert int(line["sequences"]) == two_samplings.sequences[line["sampling"]]
        tested = [line[f"auc_over_target_popularity{end}"] for end in TEST]
        if row.over:
            over = row.over[line["sampling"]]["target_popularity"]
            assert [float(cell) for cell in tested] == pytest.approx(over, abs=1e-6)
        else:
            assert tested == [""] * len(TEST)


def test_a_figure_has_the_metrics_of_the_first_sampling_and_the_auc_of_the_others(
    make, two_samplings, monkeypatch, tmp_path
):
    drawn: list[Figure] = []
    monkeypatch.setattr(writing, "save_figure", lambda figure, _: drawn.append(figure))
    study = plans.plan_block_size()
    means = dict.fromkeys("12345", 0.8)
    made = make(study, means, {"target_popularity": 0.6}, targets={"1": 0.5})
    write_results(two_samplings, PARAMS, "abc", tmp_path / "table")
    write_results(gather_results(study, PARAMS, *made), PARAMS, "abc", tmp_path / "block-size")
    for figure in drawn:
        titles = [panel.get_title() for panel in figure.axes]
        assert titles == ["AUC, uniform", "HR@5", "NDCG@5", "MRR@5", "AUC, targets"]
    auc_targets = drawn[1].axes[4].lines[0].get_ydata().tolist()
    assert auc_targets[0] == pytest.approx(0.5, abs=0.05)
    assert auc_targets[1] == pytest.approx(0.8, abs=0.05)
    assert len(auc_targets) == 5  # without the rows that do not vary


def test_the_mean_over_seeds_is_of_each_sampling(make):
    study = plans.plan_seeds(7, 2)
    made = make(study, {"7": 0.8, "8": 0.9}, {}, targets={"7": 0.6, "8": 0.5})
    one, two, mean, _ = gather_results(study, PARAMS, *made).rows
    for sampling in ("uniform", "targets"):
        runs = [row.figures[sampling]["auc"].value for row in (one, two)]
        assert mean.figures[sampling]["auc"].value == pytest.approx(np.mean(runs))


def test_an_experiment_without_samplings_must_be_run_again(make):
    study = plans.plan_seeds(7, 2)
    variants, experiments = make(study, {"7": 0.8, "8": 0.9}, {})
    for name, experiment in experiments.items():
        earlier = {"confidence": 0.95, **experiment.metrics["uniform"]}
        old = {**experiments, name: experiment._replace(metrics=earlier)}
        with pytest.raises(DataError, match="without samplings") as caught:
            gather_results(study, PARAMS, variants, old)
        assert str(caught.value).endswith(f"dvc exp remove {name}, then run the study again")
        assert "\n" not in str(caught.value)


def test_experiments_with_different_samplings_are_refused(make):
    study = plans.plan_seeds(7, 2)
    variants, experiments = make(study, {"7": 0.8, "8": 0.9}, {}, targets={})
    name, last = list(experiments.items())[-1]
    less = {key: value for key, value in last.metrics.items() if key != "targets"}
    with pytest.raises(DataError, match="uniform, targets; got uniform;"):
        gather_results(study, PARAMS, variants, experiments | {name: last._replace(metrics=less)})


def test_a_study_without_figures_of_the_model_names_the_stage_to_run(make):
    study = plans.plan_seeds(7, 1)
    variants, experiments = make(study, {"7": 0.8}, {})
    ((name, experiment),) = experiments.items()
    unasked = {each: v for each, v in experiment.metrics["uniform"].items() if each == "chance"}
    unscored = {name: experiment._replace(metrics={"confidence": 0.95, "uniform": unasked})}
    with pytest.raises(
        DataError, match="metrics of test, uniform; got chance; run the stage score"
    ):
        gather_results(study, PARAMS, variants, unscored)


# -- the other kinds -------------------------------------------------------------------------------


def test_an_ablation_tests_its_variants_and_shows_the_simple_scorers(make):
    means = {variant.name: 0.9 - 0.05 * i for i, variant in enumerate(plans.ABLATION.variants)}
    others = {"popularity": 0.55, "target_popularity": 0.6, "recent_popularity": 0.6, "sasrec": 0.7}
    made = make(plans.ABLATION, means, others)
    found = gather_results(plans.ABLATION, PARAMS, *made)
    tested = [row.key for row in found.rows if row.differences]
    assert tested == [variant.name for variant in plans.ABLATION.variants[1:]]
    shown = [row.key for row in found.rows[len(means) :]]
    assert shown == ["target_popularity", "popularity", "chance"]
    assert found.best == {}
    assert "group" not in format_results(found, PARAMS, "abc").splitlines()[2]


def test_a_sweep_is_tested_against_the_settings_of_the_workspace(make, tmp_path):
    study = plans.plan_block_size()
    made = make(study, dict.fromkeys("12345", 0.8), {"oracle": 0.99})
    found = gather_results(study, PARAMS, *made)
    assert found.reference.key == "3"
    assert [row.key for row in found.rows if row.differences] == ["1", "2", "4", "5"]
    write_results(found, MICROLENS, "abc", tmp_path / "block-size")


def test_a_sweep_without_the_settings_of_the_workspace_is_tested_against_its_first_value(make):
    study = plans.plan_block_size()
    made = make(study, dict.fromkeys("12345", 0.8), {})
    other = {**PARAMS, "infer_preferences": {"block_size": 9}}
    assert gather_results(study, other, *made).reference.key == "1"


def test_seeds_have_a_mean_with_an_interval_over_runs(make, tmp_path):
    study = plans.plan_seeds(7, 3)
    made = make(study, {"7": 0.8, "8": 0.82, "9": 0.9}, {})
    found = gather_results(study, PARAMS, *made)
    assert [row.label for row in found.rows] == [
        "seed 7",
        "seed 8",
        "seed 9",
        "mean of 3",
        "chance",
    ]
    *runs, mean, _ = (row.figures["uniform"]["auc"] for row in found.rows)
    runs = [run.value for run in runs]
    assert mean.value == pytest.approx(np.mean(runs))
    assert mean.low < min(runs) < max(runs) < mean.high  # of three runs: 4.3 standard errors
    text = format_results(found, PARAMS, "abc")
    assert "Student's t over runs" in text
    assert " p:" not in text
    write_results(found, PARAMS, "abc", tmp_path / "seeds")
    table = (tmp_path / "seeds/table.csv").read_text(encoding="utf-8").splitlines()
    origins = [line.split(",")[-2:] for line in table[1:]]
    assert origins[3] == ["", ""]  # a mean is of no single experiment
    assert all(name for name, _ in origins[:3])


def test_folds_have_means_and_standard_deviations(make, tmp_path):
    params = {**PARAMS, "baselines": {"models": ["sasrec"]}, "feature_baselines": {"models": []}}
    study = plans.plan_folds(params, 3)
    baselines = {"sasrec": 0.7, "target_popularity": 0.6, "popularity": 0.55}
    names, experiments = make(study, dict.fromkeys("012", 0.9), baselines)
    values = []
    for each, shift in zip(experiments.values(), (0.0, 0.01, 0.05), strict=True):
        each.metrics["uniform"]["sasrec"]["auc"] += shift
        values.append(each.metrics["uniform"]["sasrec"]["auc"])
    found = gather_results(study, params, names, experiments)
    assert [row.key for row in found.rows] == [
        "sasrec",
        "target_popularity",
        "popularity",
        "chance",
    ]
    estimate = found.rows[0].figures["uniform"]["auc"]
    assert estimate.value == pytest.approx(np.mean(values))
    assert estimate.high - estimate.value == pytest.approx(np.std(values, ddof=1))
    text = format_results(found, params, "abc")
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in text
    assert "means over 3 folds" in text
    write_results(found, params, "abc", tmp_path / "folds")


def test_the_study_of_cold_items_shows_auc_by_stratum(make, tmp_path):
    study = plans.COLD_ITEMS
    baselines = {"sasrec": 0.7, "target_popularity": 0.6, "popularity": 0.55}
    names, experiments = make(study, {"withheld": 0.9}, baselines, targets={})
    (experiment,) = experiments.values()
    figures = {"auc": 0.7, "auc_low": 0.6, "auc_high": 0.8, "sequences": 30}
    by_stratum = {"cold": figures, "warm": figures | {"auc": 0.9}}
    sections = dict.fromkeys(("test", *baselines, "chance"), by_stratum)
    experiment.metrics["strata"] = {"uniform": sections}
    found = gather_results(study, PARAMS, names, experiments)
    text = format_results(found, PARAMS, "abc")
    assert "AUC, uniform, cold (30)" in text
    assert "0.900 [0.600, 0.800]" in text
    write_results(found, PARAMS, "abc", tmp_path / "cold-items")


def test_a_learning_curve_has_a_line_for_each_scorer(make, tmp_path):
    params = {
        **PARAMS,
        "baselines": {"models": ["sasrec"]},
        "feature_baselines": {"models": ["gru4rec_f"]},
    }
    study = plans.plan_learning_curve(params, [64, 256])
    means = {"0": 0.6, "64": 0.7, "256": 0.9}
    variants, experiments = make(study, means, {"sasrec": 0.8, "gru4rec_f": 0.75})
    found = gather_results(study, params, variants, experiments)
    shown = [(row.group, row.label) for row in found.rows if row.group]
    assert shown == [
        *((MODEL, value) for value in ("0", "64", "256")),
        *(("SASRec", value) for value in ("64", "256")),
        *(("GRU4Rec_F", value) for value in ("64", "256")),
    ]
    assert not any(row.differences for row in found.rows)
    write_results(found, params, "abc1234", tmp_path / "curve")
    text = (tmp_path / "curve/table.md").read_text()
    assert text.splitlines()[2].split("|")[1:3] == [" scorer    ", " training sequences "]
    drawn = "".join(ElementTree.parse(tmp_path / "curve/figure.svg").getroot().itertext())
    assert "popularity" not in drawn


def test_a_learning_curve_names_the_points_that_have_all_sequences(make):
    params = {**PARAMS, "baselines": {"models": []}, "feature_baselines": {"models": []}}
    study = plans.plan_learning_curve(params, [64, 256, 1024])
    means = {"0": 0.6, "64": 0.7, "256": 0.8, "1024": 0.8}
    variants, experiments = make(study, means, {})
    for name, variant in variants.items():
        if variant.name == "64":
            experiments[name].metrics["budget"] = {"train": {"used": 64, "sequences": 200}}
    text = format_results(gather_results(study, params, variants, experiments), params, "abc")
    assert "- there are no more training sequences than 256, 1024: all of them are used" in text


def test_a_study_says_how_many_sequences_were_used(make):
    variants, experiments = make(plans.LOSS, {"yes-no": 0.7, "listwise": 0.8}, {})
    for experiment in experiments.values():
        experiment.metrics["budget"] = {"train": {"used": 64, "sequences": 200}}
    text = format_results(gather_results(plans.LOSS, PARAMS, variants, experiments), PARAMS, "abc")
    assert "- sequences used: 64 of 200 train" in text


def test_one_seed_has_no_mean(make):
    study = plans.plan_seeds(7, 1)
    found = gather_results(study, PARAMS, *make(study, {"7": 0.8}, {}))
    assert [row.label for row in found.rows] == ["seed 7", "chance"]
    assert "Student" not in format_results(found, PARAMS, "abc")


def test_two_scorers_of_one_experiment_are_compared(make, tmp_path):
    baselines = {"gru4rec_image": 0.7, "gru4rec_summary": 0.8}
    made = make(plans.IMAGE_SUMMARY, {"gru4rec": 0.9}, baselines)
    found = gather_results(plans.IMAGE_SUMMARY, PARAMS, *made)
    labels = ["GRU4Rec on images", "GRU4Rec on summaries", "chance"]
    assert [row.label for row in found.rows] == labels
    assert found.rows[1].differences["uniform"].value > 0
    write_results(found, MICROLENS, "abc", tmp_path / "image-summary")


def test_a_baseline_that_was_not_run_is_named(make):
    made = make(plans.IMAGE_SUMMARY, {"gru4rec": 0.9}, {"gru4rec_image": 0.7})
    with pytest.raises(DataError, match="metrics of gru4rec_summary"):
        gather_results(plans.IMAGE_SUMMARY, PARAMS, *made)


@pytest.mark.parametrize(("ks", "shown"), [((3, 10), "hr@3"), ((3, 5, 10), "hr@5")])
def test_other_cutoffs_are_shown_as_they_are(make, ks, shown):
    study = plans.plan_seeds(7, 1)
    found = gather_results(study, PARAMS, *make(study, {"7": 0.8}, {}, ks=ks))
    assert found.metrics[1] == shown
    assert f"| {shown.upper()} " in format_results(found, PARAMS, "abc")


# -- the paper's own figures -----------------------------------------------------------------------


def faint_marks(folder: Path) -> int:
    """Count the crosses of a figure; Matplotlib writes each as a use of one shape."""
    svg = ElementTree.parse(folder / "figure.svg")
    faint = [use for use in svg.iter(f"{SVG}use") if "#b0b0b0" in use.get("style", "")]
    return len(faint)


@pytest.mark.parametrize(
    ("study", "known"),
    [(plans.plan_table(), 9), (plans.ABLATION, 3), (plans.plan_block_size(), 5)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_papers_figures_are_drawn_on_its_data_and_not_in_the_pocket_world(
    make, tmp_path, study, known
):
    made = make(study, {variant.name: 0.8 for variant in study.variants}, {"popularity": 0.55})
    for name, params in {"microlens": MICROLENS, "pocket": PARAMS}.items():
        write_results(gather_results(study, params, *made), params, "abc", tmp_path / name)
    assert faint_marks(tmp_path / "microlens") == known + 1  # and that of the legend
    assert faint_marks(tmp_path / "pocket") == 0


def test_the_papers_figures_are_drawn_beside_uniform_negatives_only(make, tmp_path):
    study = plans.plan_block_size()
    variants, experiments = make(study, dict.fromkeys("12345", 0.8), {}, targets={})
    write_results(
        gather_results(study, MICROLENS, variants, experiments), MICROLENS, "abc", tmp_path / "two"
    )
    assert faint_marks(tmp_path / "two") == 5 + 1  # as with uniform negatives alone
    late = {
        name: each._replace(metrics={k: v for k, v in each.metrics.items() if k != "uniform"})
        for name, each in experiments.items()
    }
    write_results(
        gather_results(study, MICROLENS, variants, late), MICROLENS, "abc", tmp_path / "targets"
    )
    assert faint_marks(tmp_path / "targets") == 0


# -- two revisions ---------------------------------------------------------------------------------


def test_two_revisions_are_compared_by_every_metric_of_every_sampling():
    ours, other = (
        Rankings(
            {
                ("uniform", MODEL): draw_ranks(uniform, i),
                ("targets", MODEL): draw_ranks(targets, i, FEWER),
            },
            "a",
        )
        for i, (uniform, targets) in enumerate([(0.9, 0.5), (0.6, 0.8)])
    )
    compared = compare_rankings(ours, other)
    assert list(compared) == ["uniform", "targets"]
    for metrics, sign in zip(compared.values(), (1, -1), strict=True):
        assert list(metrics) == ["auc", "hr@5", "ndcg@5", "mrr@5"]
        mean, others, difference = metrics["auc"]
        assert mean - others == pytest.approx(difference.value)
        assert sign * difference.value > 0
        assert difference.p < 0.01
    text = format_comparison(("HEAD", "other"), compared, {"uniform": SEQUENCES, "targets": FEWER})
    assert "| NDCG@5, uniform |" in text
    assert "| NDCG@5, targets |" in text
    assert "test sequences: uniform: 60; targets: 48" in text
    assert "<0.001" in text


def test_revisions_with_other_candidates_are_not_compared():
    ours, other = ranked({MODEL: draw_ranks(0.9)}, "a"), ranked({MODEL: draw_ranks(0.9)}, "b")
    with pytest.raises(DataError, match="equal settings of preprocess and filter_sequences"):
        compare_rankings(ours, other)


def test_revisions_with_other_sequences_are_not_compared():
    shifted = draw_ranks(0.9)
    shifted = TargetRanks(shifted.sequences + 1, *(getattr(shifted, n) for n in COUNTS))
    with pytest.raises(DataError, match="the same candidates"):
        compare_rankings(ranked({MODEL: draw_ranks(0.9)}, "a"), ranked({MODEL: shifted}, "a"))


def test_revisions_with_other_samplings_are_not_compared():
    ours = ranked({MODEL: draw_ranks(0.9)}, "")
    other = Rankings({**ours.ranks, ("targets", MODEL): draw_ranks(0.9)}, "")
    with pytest.raises(DataError, match="the same candidates"):
        compare_rankings(ours, other)


def test_a_revision_without_a_model_is_not_compared():
    ours, other = ranked({"popularity": draw_ranks(0.9)}, ""), ranked({MODEL: draw_ranks(0.9)}, "")
    with pytest.raises(DataError, match="a revision that scored MLLM-MSR; got baselines alone"):
        compare_rankings(ours, other)


def test_a_sampling_without_rankings_is_named():
    ours = ranked({MODEL: draw_ranks(0.9)}, "")
    other = Rankings({("targets", MODEL): draw_ranks(0.9)}, "")
    with pytest.raises(DataError, match="rankings of MLLM-MSR, uniform; got MLLM-MSR, targets"):
        compare_rankings(ours, other)
