"""Joins that drop nothing, and figures worked by hand."""

import json
import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from three_items import BASELINES, POPULARITY, candidate_rows, score_rows, write_world

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import load_all_params
from mllm_msr.core.tables import Candidates, Popularity, Scores, arrow_schema, write_rows
from mllm_msr.evaluation import evaluation
from mllm_msr.evaluation.metrics import measure
from mllm_msr.ranking import Placements

SETTINGS = {"ks": [1, 2], "bootstrap_samples": 50, "confidence": 0.9, "seed": 0}


@pytest.fixture(scope="module")
def untouched_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture
def world(untouched_world, tmp_path):
    return Path(shutil.copytree(untouched_world, tmp_path, dirs_exist_ok=True))


def evaluate(
    world: Path, oracle: bool = True, baselines: Iterable[str] = ()
) -> evaluation.Evaluation:
    truth = world / "oracle.parquet" if oracle else None
    paths = {name: world / "baselines" / f"{name}.parquet" for name in baselines}
    return evaluation.evaluate(
        world / "scores.parquet", world / "filtered", truth, paths, **SETTINGS
    )


def write_scores(world: Path, rows: list[dict]) -> None:
    write_rows(Scores, rows, world / "scores.parquet")


def test_figures_are_those_worked_by_hand(world):
    metrics = evaluate(world).metrics["uniform"]
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


def test_intervals_stand_beside_their_figures(world):
    metrics = evaluate(world).metrics
    test, chance = metrics["uniform"]["test"], metrics["uniform"]["chance"]
    assert (test["auc_low"], test["auc_high"]) == (0.75, 1.0)  # of .75 and 1, two drawn
    assert chance["hr@1_low"] == chance["hr@1"] == chance["hr@1_high"]
    assert metrics["confidence"] == 0.9


def test_without_an_oracle_there_is_no_oracle_row(world):
    result = evaluate(world, oracle=False)
    assert "oracle" not in result.metrics["uniform"]
    assert "oracle" not in result.curves["scorer"].to_pylist()
    assert evaluation.POCKET_NOTE not in evaluation.format_table(result.metrics, result.comparisons)


def test_baselines_have_figures_of_their_own_on_the_same_candidates(world):
    metrics = evaluate(world, baselines=BASELINES).metrics["uniform"]
    assert metrics["sasrec"] == metrics["test"]
    assert metrics["item_knn"]["auc"] == pytest.approx(1 - metrics["test"]["auc"])
    others = {name: v for name, v in metrics.items() if name not in BASELINES}
    assert others == evaluate(world).metrics["uniform"]


def test_baselines_stand_in_every_table_between_the_oracle_and_popularity(world):
    result = evaluate(world, baselines=reversed(BASELINES))
    evaluation.write_evaluation(result, world / "out")
    rows = pyarrow.parquet.read_table(world / "out/per_sequence.parquet").to_pylist()
    simple = ["target_popularity", "popularity", "chance"]
    scorers = [evaluation.MODEL, "oracle", "sasrec", "item_knn", *simple]
    assert {row["scorer"] for row in rows} == set(scorers)
    assert list(dict.fromkeys(result.curves["scorer"].to_pylist())) == scorers
    lines = evaluation.format_table(result.metrics, result.comparisons).splitlines()[2:9]
    named = [line.split("|")[1].strip() for line in lines]
    others = ["SASRec", "Item-kNN", "target popularity", "popularity", "chance"]
    assert named == [evaluation.MODEL, "oracle", *others]


def test_every_baseline_of_the_settings_has_a_name_in_the_table():
    settings = load_all_params()
    sections = (settings.baselines, settings.feature_baselines, settings.text_baselines)
    named = {name for section in sections for name in section.model_dump()}
    assert set(evaluation.BASELINES) == named - {"models"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "expected a table; got no such file; run the stage that writes it"),
        (score_rows()[1:], "1 candidates without a score, first: split valid"),
        (
            [*score_rows(), score_rows()[0] | {"item": "z"}],
            "1 scores without a candidate, first: split valid, sequence 1, item z",
        ),
    ],
    ids=["missing", "too few", "too many"],
)
def test_bad_scores_of_a_baseline_are_refused_and_its_file_named(world, rows, message):
    path = world / "baselines/sasrec.parquet"
    path.unlink()
    if rows:
        write_rows(Scores, rows, path)
    with pytest.raises(DataError, match=message) as error:
        evaluate(world, baselines=["sasrec"])
    assert str(path) in str(error.value)


def test_order_of_rows_in_the_tables_changes_nothing(world):
    before = evaluate(world).metrics
    write_scores(world, score_rows()[::-1])
    write_rows(Candidates, candidate_rows("test")[::-1], world / "filtered/test_candidates.parquet")
    assert evaluate(world).metrics == before


def refused(world: Path) -> str:
    with pytest.raises(DataError) as error:
        evaluate(world)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_scores_are_counted_and_the_first_named(world):
    write_scores(world, score_rows()[:-2])
    message = refused(world)
    assert "2 candidates without a score, first: split test, sequence 3, item b" in message
    assert str(world / "scores.parquet") in message


def test_scores_without_a_candidate_are_refused(world):
    extra = {"sequence": 3, "item": "z", "split": "test", "log_odds": 0.0}
    write_scores(world, [*score_rows(), extra])
    expected = "1 scores without a candidate, first: split test, sequence 3, item z"
    assert expected in refused(world)


def test_scores_under_another_split_are_refused(world):
    rows = [row | {"split": "valid"} if row["sequence"] == 3 else row for row in score_rows()]
    write_scores(world, rows)
    assert "3 scores without a candidate, first: split valid, sequence 3" in refused(world)


def test_a_nan_score_is_refused(world):
    rows = [*score_rows()[:-1], score_rows()[-1] | {"log_odds": math.nan}]
    table = pyarrow.Table.from_pylist(rows, schema=arrow_schema(Scores))
    pyarrow.parquet.write_table(table, world / "scores.parquet")  # another program's
    message = refused(world)
    assert "NaN" in message or "nan" in message
    assert "scores" in message.lower()


def test_two_scores_of_one_candidate_are_refused(world):
    table = pyarrow.parquet.read_table(world / "scores.parquet")
    doubled = pyarrow.concat_tables([table, table.slice(0, 1)])
    pyarrow.parquet.write_table(doubled, world / "scores.parquet")
    message = refused(world)
    assert "scores.parquet" in message
    assert "unique" in message


def test_two_utilities_of_one_item_are_refused(world):
    table = pyarrow.parquet.read_table(world / "oracle.parquet")
    doubled = pyarrow.concat_tables([table, table])
    pyarrow.parquet.write_table(doubled, world / "oracle.parquet")
    assert "oracle" in refused(world)


def test_a_candidate_without_popularity_is_refused(world):
    rows = [{"item": item, "interactions": 1} for item in list(POPULARITY)[:2]]
    write_rows(Popularity, rows, world / "filtered/popularity.parquet")
    assert "3 candidates without a score, first: split test, sequence 2, item c" in refused(world)


def test_a_test_sequence_without_candidates_is_refused(world):
    rows = [row for row in candidate_rows("test") if row["sequence"] == 2]
    write_rows(Candidates, rows, world / "filtered/test_candidates.parquet")
    assert "1 sequences without counterpart, first: split test, sequence 3" in refused(world)


@pytest.mark.parametrize("labels", [True, False])
def test_a_sequence_needs_exactly_one_target(world, labels):
    rows = [row | {"label": labels} for row in candidate_rows("test")]
    write_rows(Candidates, rows, world / "filtered/test_candidates.parquet")
    assert "one target and at least one negative" in refused(world)


def test_written_files_say_what_was_computed(world):
    result = evaluate(world)
    written = evaluation.write_evaluation(result, world / "out")
    assert {path.relative_to(world / "out").as_posix(): rows for path, rows in written.items()} == {
        "plots/metrics_at_k.csv": 10,  # 5 scorers at 2 cut-offs
        "plots/probabilities.csv": 40,
        "per_sequence.parquet": 15,  # 5 scorers on 3 sequences
        "comparisons.parquet": 2,  # the model with both kinds of popularity
        "metrics.json": 1,
    }
    assert evaluation.read_metrics(world / "out/metrics.json") == result.metrics
    compared = evaluation.read_comparisons(world / "out/comparisons.parquet")
    assert compared == result.comparisons
    assert sorted(path.name for path in (world / "out").iterdir()) == [
        "comparisons.parquet",
        "metrics.json",
        "per_sequence.parquet",
        "plots",
    ]


def test_every_metric_can_be_had_again_from_per_sequence(world):
    result = evaluate(world)
    evaluation.write_evaluation(result, world / "out")
    rows = pyarrow.parquet.read_table(world / "out/per_sequence.parquet").to_pylist()
    chosen = [row for row in rows if (row["scorer"], row["split"]) == (evaluation.MODEL, "test")]
    names = {"sequences": "sequence", "candidates": "candidates", "above": "above", "tied": "tied"}
    columns = {name: np.array([row[key] for row in chosen]) for name, key in names.items()}
    means = {name: v.mean() for name, v in measure(Placements(**columns), [1, 2]).items()}
    for name, mean in means.items():
        assert mean == pytest.approx(result.metrics["uniform"]["test"][name], abs=1e-6)


def test_plots_agree_with_the_metrics(world):
    result = evaluate(world)
    evaluation.write_evaluation(result, world / "out")
    curves = pyarrow.csv.read_csv(world / "out/plots/metrics_at_k.csv").to_pylist()
    model = {row["k"]: row for row in curves if row["scorer"] == evaluation.MODEL}
    assert model[2]["hr"] == result.metrics["uniform"]["test"]["hr@2"]
    assert model[2]["ndcg"] == result.metrics["uniform"]["test"]["ndcg@2"]
    bins = pyarrow.csv.read_csv(world / "out/plots/probabilities.csv").to_pylist()
    for label in ("target", "negative"):
        assert sum(row["share"] for row in bins if row["label"] == label) == pytest.approx(1)
    full = {(row["label"], row["p_yes"]): row["share"] for row in bins if row["share"]}
    # sigmoid(2) = .88, sigmoid(1) = .73; negatives at log-odds 1, 0, 1 and -1
    assert full == {
        ("target", 0.85): 0.5,
        ("target", 0.7): 0.5,
        ("negative", 0.7): 0.5,
        ("negative", 0.5): 0.25,
        ("negative", 0.25): 0.25,
    }


def test_a_failure_while_writing_leaves_the_earlier_files(world):
    result = evaluate(world)
    evaluation.write_evaluation(result, world / "out")
    before = {path: path.read_bytes() for path in (world / "out").rglob("*") if path.is_file()}
    unwritable = replace(result, metrics=result.metrics | {"uniform": {"auc": object()}})
    with pytest.raises(TypeError):
        evaluation.write_evaluation(unwritable, world / "out")
    after = {path: path.read_bytes() for path in (world / "out").rglob("*") if path.is_file()}
    assert after == before


def table_of(result: evaluation.Evaluation) -> str:
    return evaluation.format_table(result.metrics, result.comparisons)


def test_the_table_has_a_row_per_scorer_in_markdown(world):
    lines = table_of(evaluate(world)).splitlines()
    assert " ".join(lines[0].split()) == "| test | AUC, uniform | HR@1 | NDCG@1 | MRR@1 |"
    scorers = [evaluation.MODEL, "oracle", "target popularity", "popularity", "chance"]
    assert [line.split("|")[1].strip() for line in lines[2:7]] == scorers
    assert "0.875 [0.750, 1.000]" in lines[2]
    assert lines[8:] == [
        "negatives: uniform; test sequences: uniform: 2",
        "in brackets: 90% bootstrap intervals over sequences; those of the other figures are in"
        " metrics.json",
        "not shown to be above the rows that do not know the user (difference in AUC, paired"
        " randomisation tests, Holm-corrected, p < 0.05):",
        "  uniform: MLLM-MSR (target popularity, popularity)",
        "pocket world: an embedded toy, no claim about real data",
    ]
    assert len({len(line) for line in lines[:7]}) == 1


def test_the_table_shows_the_papers_cut_off_where_it_is_measured(world):
    settings = SETTINGS | {"ks": [3, 5, 10]}
    paths = (world / "scores.parquet", world / "filtered", None)
    table = table_of(evaluation.evaluate(*paths, {}, **settings))
    assert "HR@5" in table
    assert "HR@3" not in table


def ask_about_targets(world: Path) -> None:
    """Add a sampling whose negatives are the target of the other test sequence; valid has none."""
    other = {2: "b", 3: "a"}
    rows = [
        {"sampling": "targets", "sequence": sequence, "position": position}
        | {"item": item, "label": item == target}
        for sequence, target in ((2, "a"), (3, "b"))
        for position, item in enumerate((target, other[sequence]))
    ]
    path = world / "filtered/test_candidates.parquet"
    write_rows(Candidates, [*candidate_rows("test"), *rows], path)


def test_samplings_stand_side_by_side(world):
    before = evaluate(world, baselines=BASELINES)
    ask_about_targets(world)
    result = evaluate(world, baselines=BASELINES)
    # No figure of the one sampling depends on the other.
    assert result.metrics["uniform"] == before.metrics["uniform"]
    targets = result.metrics["targets"]
    assert "valid" not in targets
    assert (targets["test"]["auc"], targets["item_knn"]["auc"]) == (0.75, 0.25)
    assert targets["popularity"]["auc"] == 0.5  # a above b, which is a hit once and a miss once
    assert targets["chance"]["hr@1"] == 0.5
    head, _, first, *_ = table_of(result).splitlines()
    assert [cell.strip() for cell in head.split("|")[2:-1]] == [
        *("AUC, uniform", "HR@1", "NDCG@1", "MRR@1"),
        *("AUC, targets", "HR@1", "NDCG@1", "MRR@1"),
    ]
    assert "0.875 [0.750, 1.000] | 0.750" in first
    assert "0.750 [0.500, 1.000] | 0.750" in first
    assert set(result.curves["sampling"].to_pylist()) == {"uniform", "targets"}
    shares = [row for row in result.histogram.to_pylist() if row["sampling"] == "targets"]
    assert sum(row["share"] for row in shares) == pytest.approx(2)


def test_a_sampling_may_leave_out_sequences_but_uniform_may_not(world):
    ask_about_targets(world)
    path = world / "filtered/test_candidates.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    partial = [row for row in rows if row["sampling"] == "uniform" or row["sequence"] == 2]
    write_rows(Candidates, partial, path)
    assert evaluate(world).metrics["targets"]["test"]["sequences"] == 1
    write_rows(Candidates, [row for row in rows if row["sequence"] == 2], path)
    assert "1 sequences without counterpart" in refused(world)


def test_without_scores_of_a_model_the_others_are_measured(world):
    before = evaluate(world, baselines=BASELINES)
    write_scores(world, [])
    result = evaluate(world, baselines=BASELINES)
    for name, figures in result.metrics["uniform"].items():
        assert figures == before.metrics["uniform"][name]
    assert not {"test", "valid"} & result.metrics["uniform"].keys()
    assert evaluation.MODEL not in table_of(result)
    assert result.histogram.num_rows == 0
    evaluation.write_evaluation(result, world / "out")
    header = (world / "out/plots/probabilities.csv").read_text().strip()
    assert header == '"sampling","label","p_yes","p_yes_end","share"'


def test_target_popularity_counts_training_targets_and_breaks_ties_by_popularity(world):
    result = evaluate(world)
    placed = result.placements["uniform", "target_popularity", "test"]
    # a is the one training target; b and c are equally popular.
    assert (placed.above.tolist(), placed.tied.tolist()) == ([0, 1], [0, 1])
    more = [{"item": item, "interactions": n} for item, n in {"a": 1, "b": 9, "c": 3}.items()]
    write_rows(Popularity, more, world / "filtered/popularity.parquet")
    placed = evaluate(world).placements["uniform", "target_popularity", "test"]
    assert (placed.above.tolist(), placed.tied.tolist()) == ([0, 1], [0, 0])


def test_each_scorer_that_knows_the_user_is_tested_on_each_that_does_not(world):
    result = evaluate(world, baselines=BASELINES)
    pairs = [(each.sampling, each.scorer, each.baseline) for each in result.comparisons]
    assert pairs == [
        ("uniform", scorer, baseline)
        for scorer in (evaluation.MODEL, "sasrec", "item_knn")
        for baseline in ("target_popularity", "popularity")
    ]
    for each in result.comparisons:
        section = "test" if each.scorer == evaluation.MODEL else each.scorer
        ours, other = (result.metrics["uniform"][name]["auc"] for name in (section, each.baseline))
        assert each.difference.value == pytest.approx(ours - other, abs=1e-6)
    # Of two sequences each sign pattern counts a quarter, so no p is below .5; by Holm it is 1.
    assert {each.difference.p for each in result.comparisons} == {1.0}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"test": {}}', '{"confidence": 0.9}'])
def test_unreadable_metrics_are_a_one_line_error(tmp_path, content):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match="run the stage evaluate"):
        evaluation.read_metrics(path)


def test_the_templates_of_plots_name_only_columns_that_are_written(world):
    result = evaluate(world)
    drawn = {
        "curves": (result.curves, {"scorer", "sampling"}),
        "histogram": (result.histogram, {"label", "sampling"}),
    }
    for name, (table, needed) in drawn.items():
        template = (Path(__file__).parents[2] / f"plots/{name}.json").read_text()
        json.loads(template)
        fields = set(re.findall(r'"field": "(\w+)"', template)) - {"rev"}  # DVC's own
        assert needed <= fields <= set(table.column_names)
