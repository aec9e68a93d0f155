"""Scores that do not match the candidates are refused; joins drop nothing."""

import math
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest
from three_items import (
    POPULARITY,
    add_targets_sampling,
    candidate_rows,
    evaluate_world,
    popularity_rows,
    score_rows,
)

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import Candidates, Popularity, Scores, Sequences
from mllm_msr.core.tables import arrow_schema, read_rows, write_rows
from mllm_msr.evaluation.table import format_table


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
def test_bad_scores_of_a_baseline_name_its_file(world, rows, message):
    path = world / "baselines/sasrec.parquet"
    path.unlink()
    if rows:
        write_rows(Scores, rows, path)
    with pytest.raises(DataError, match=message) as error:
        evaluate_world(world, baselines=["sasrec"])
    assert str(path) in str(error.value)


def test_the_order_of_rows_in_the_tables_does_not_matter(world):
    before = evaluate_world(world).metrics
    write_rows(Scores, score_rows()[::-1], world / "scores.parquet")
    write_rows(Candidates, candidate_rows("test")[::-1], world / "filtered/test_candidates.parquet")
    assert evaluate_world(world).metrics == before


def refused(world: Path) -> str:
    with pytest.raises(DataError) as error:
        evaluate_world(world)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_scores_are_counted_and_the_first_named(world):
    write_rows(Scores, score_rows()[:-2], world / "scores.parquet")
    message = refused(world)
    assert "2 candidates without a score, first: split test, sequence 3, item b" in message
    assert str(world / "scores.parquet") in message


def test_scores_without_a_candidate_are_refused(world):
    extra = {"sequence": 3, "item": "z", "split": "test", "log_odds": 0.0}
    write_rows(Scores, [*score_rows(), extra], world / "scores.parquet")
    expected = "1 scores without a candidate, first: split test, sequence 3, item z"
    assert expected in refused(world)


def test_scores_under_another_split_are_refused(world):
    rows = [row | {"split": "valid"} if row["sequence"] == 3 else row for row in score_rows()]
    write_rows(Scores, rows, world / "scores.parquet")
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
    row = {"interactions": 1, "withheld": False}
    rows = [{"item": item} | row for item in list(POPULARITY)[:2]]
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


def test_only_partial_samplings_may_leave_out_sequences(world):
    add_targets_sampling(world)
    path = world / "filtered/test_candidates.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    partial = [row for row in rows if row["sampling"] == "uniform" or row["sequence"] == 2]
    write_rows(Candidates, partial, path)
    assert evaluate_world(world).metrics["targets"]["test"]["sequences"] == 1
    write_rows(Candidates, [row for row in rows if row["sequence"] == 2], path)
    assert "1 sequences without counterpart" in refused(world)


def test_target_popularity_breaks_ties_by_popularity(world):
    result = evaluate_world(world)
    ranks = result.ranks["uniform", "target_popularity", "test"]
    # a is the one training target; b and c are equally popular.
    assert (ranks.above.tolist(), ranks.tied.tolist()) == ([0, 1], [0, 1])
    more = {"a": 1, "b": 9, "c": 3}
    write_rows(Popularity, popularity_rows(more), world / "filtered/popularity.parquet")
    ranks = evaluate_world(world).ranks["uniform", "target_popularity", "test"]
    assert (ranks.above.tolist(), ranks.tied.tolist()) == ([0, 1], [0, 0])


def leave_unused(world: Path, *sequences: int) -> None:
    """Mark sequences as left out by a budget."""
    path = world / "filtered/sequences.parquet"
    rows = list(read_rows(Sequences, path, "sequence"))
    write_rows(Sequences, [row | {"used": row["sequence"] not in sequences} for row in rows], path)


def test_only_used_sequences_need_candidates(world):
    leave_unused(world, 3)
    assert "1 sequences without counterpart, first: split test, sequence 3" in refused(world)
    rows = [row for row in candidate_rows("test") if row["sequence"] == 2]
    write_rows(Candidates, rows, world / "filtered/test_candidates.parquet")
    scores = [row for row in score_rows() if row["sequence"] != 3]
    write_rows(Scores, scores, world / "scores.parquet")
    result = evaluate_world(world)
    assert result.metrics["uniform"]["test"]["sequences"] == 1
    assert result.metrics["budget"] == {"test": {"used": 1, "sequences": 2}}
    assert "sequences used: 1 of 2 test" in format_table(result.metrics, result.comparisons)


def test_without_a_budget_the_table_does_not_mention_one(world):
    result = evaluate_world(world)
    assert "budget" not in result.metrics
    assert "sequences used" not in format_table(result.metrics, result.comparisons)


def test_target_popularity_of_used_sequences_leaves_out_the_others(world):
    leave_unused(world, 0)
    key = ("uniform", "target_popularity", "test")
    whole = evaluate_world(world).ranks[key]
    used = evaluate_world(world, only_used=True).ranks[key]
    # Without the one training target a, popularity alone decides; it ranks a first too.
    assert whole.above.tolist() == used.above.tolist() == [0, 1]
    counts = {"a": 1, "b": 9, "c": 3}
    write_rows(Popularity, popularity_rows(counts), world / "filtered/popularity.parquet")
    assert evaluate_world(world).ranks[key].above.tolist() == [0, 1]
    assert evaluate_world(world, only_used=True).ranks[key].above.tolist() == [2, 0]
