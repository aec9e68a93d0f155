"""The first items of the whole catalogue for every sequence that is evaluated, by each baseline.

A baseline knows what its own stage lets it know (:mod:`mllm_msr.baselines.task`), so no held-out
interaction. One that learns is loaded where that stage kept it; one that counts is asked about
every item as a candidate. Items that the user is known to have taken are left out. A target gets no
other treatment than the other items: if it is not among the first ones, it was not retrieved.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as arrow

from mllm_msr.baselines.discovery import Baseline, Inputs, Learner
from mllm_msr.baselines.learning.trained import fit_or_load
from mllm_msr.baselines.task import Candidates, Task
from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.core.errors import ModelError
from mllm_msr.core.files import state_dir
from mllm_msr.core.params import BaselineStageParams, Section
from mllm_msr.evaluation.target_popularity import count_target_popularity

POPULARITY, TARGET_POPULARITY = "popularity", "target_popularity"
PAIRS_AT_ONCE = 1 << 22  # of sequence and item that a baseline that counts is asked about


def list_rows(sections: Iterable[BaselineStageParams]) -> list[str]:
    """Return what ranks the whole catalogue: both popularities and the baselines of settings."""
    return [POPULARITY, TARGET_POPULARITY, *(name for each in sections for name in each.models)]


def find_inputs(
    baseline: Baseline,
    filtered: Path,
    features: Path,
    summaries: Path | None = None,
    preferences: Path | None = None,
) -> Inputs:
    """Return the tables that a baseline reads beside the interactions."""
    if baseline.stage == "feature_baselines":
        return Inputs(features=features)
    items = filtered / "items.parquet"
    if baseline.stage == "text_baselines":
        return Inputs(items=items, summaries=summaries, preferences=preferences)
    return Inputs(items=items)


def choose_questions(task: Task, splits: Collection[str]) -> Integers:
    """Return the indices of the questions of some splits, in the order of their sequences."""
    questions = task.questions
    chosen = np.flatnonzero(np.isin(questions.splits, list(splits)))
    ordered: Integers = chosen[np.argsort(questions.sequences[chosen])]
    return ordered


def score_by_popularity(
    name: str, asked: Integers, filtered: Path, *, only_used: bool
) -> Iterator[Floats]:
    """Yield the scores of all items by popularity or target popularity, the same ones each time.

    Args:
        name: Of the two.
        asked: Indices of the questions.
        filtered: Folder of ``filter_sequences``.
        only_used: Whether target popularity counts used training sequences only.

    Raises:
        DataError: A table is missing or breaks its model.
    """
    with duckdb.connect() as connection:
        count_target_popularity(connection, filtered, only_used)
        columns = connection.execute(
            "SELECT interactions::DOUBLE AS popularity, target_popularity"
            " FROM popularity JOIN target_popularity USING (item) ORDER BY item"
        ).fetchnumpy()
    scores = columns[name]
    return (scores for _ in asked)


def score_by_baseline(
    baseline: Baseline, task: Task, asked: Integers, settings: Section, inputs: Inputs
) -> Iterator[Floats]:
    """Yield the scores of all items by a baseline, [items], for each question.

    A baseline that learns is trained if its stage did not.

    Args:
        baseline: Any.
        task: What is known and asked.
        asked: Indices of the questions.
        settings: The baseline's own.
        inputs: Further tables (:func:`find_inputs`).

    Raises:
        DataError: A table is missing, of another run, or lacks what the baseline needs.
        ModelError: The baseline needs a package that is not installed, or its training diverges.
    """
    if baseline.build:
        kept = state_dir() / "baselines"
        learner = fit_or_load(baseline, task.training, settings, inputs, kept)
        return _ask_learner(learner, task, asked)
    return _ask_about_all(baseline, task, asked, settings, inputs)


def _ask_learner(learner: Learner, task: Task, asked: Integers) -> Iterator[Floats]:
    questions = task.questions
    for question in asked.tolist():
        yield learner.score_items(int(questions.users[question]), questions.histories[question])


def _ask_about_all(
    baseline: Baseline, task: Task, asked: Integers, settings: Section, inputs: Inputs
) -> Iterator[Floats]:
    """Ask a baseline that counts about every item as a candidate of each question."""
    assert baseline.score, "a baseline that does not learn has it"
    size = len(task.items)
    at_once = max(1, PAIRS_AT_ONCE // size)
    for start in range(0, len(asked), at_once):
        some = asked[start : start + at_once]
        candidates = Candidates(
            np.repeat(some, size),
            np.tile(np.arange(size), len(some)),
            np.zeros(len(some) * size, dtype=np.bool_),  # no target is known here
        )
        scores = baseline.score(replace(task, candidates=candidates), settings, inputs)
        yield from scores.reshape(len(some), size)


def retrieve_first(
    task: Task, name: str, asked: Integers, scores: Iterable[Floats], number: int
) -> arrow.Table:
    """Return the first items of each question, as columns of the table Retrieved.

    Args:
        task: What is known and asked.
        name: Of the baseline, for errors.
        asked: Indices of the questions.
        scores: Of all items for each of them.
        number: Items for each; fewer where the catalogue has no more.

    Raises:
        ModelError: A score is no finite number.
    """
    questions, first, values = task.questions, [], []
    for question, row in zip(asked.tolist(), scores, strict=True):
        if not np.isfinite(row).all():
            fix = "its training diverged: lower its learning rate"
            raise ModelError(expected="finite scores", got="inf or nan", where=name, fix=fix)
        left_out = np.union1d(questions.histories[question], questions.taken[question])
        first.append(find_first(row, left_out, number))
        values.append(row[first[-1]])
    lengths = [len(items) for items in first]
    rows = np.repeat(asked, lengths)
    return arrow.table(
        {
            "sequence": questions.sequences[rows],
            "split": questions.splits[rows].tolist(),
            "item": arrow.array(task.items).take(arrow.array(np.concatenate(first))),
            "rank": np.concatenate([np.arange(1, length + 1) for length in lengths]),
            "score": np.concatenate(values),
        }
    )


def find_first(
    scores: Floats, left_out: Integers, number: int, ties: Floats | None = None
) -> Integers:
    """Return the numbers of the items with the highest scores, best first.

    Args:
        scores: [items].
        left_out: Numbers of items that are not returned.
        number: How many, at most.
        ties: Of equal scores the item with the highest number here comes first, [items]; None, and
            where these are equal too: in the order of items.
    """
    allowed = np.delete(np.arange(len(scores)), left_out)
    if number < len(allowed):  # to sort all of a large catalogue takes ten times as long
        found = scores[allowed]
        allowed = allowed[found >= np.partition(found, -number)[-number]]
    others = np.zeros_like(scores) if ties is None else ties
    return allowed[np.lexsort((-others[allowed], -scores[allowed]))][:number]
