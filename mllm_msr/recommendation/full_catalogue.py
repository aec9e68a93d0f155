"""The first items of the whole catalogue for every sequence that is evaluated, by a retriever.

A retriever is popularity or a baseline that learns. It knows what its own stage lets it know
(:mod:`mllm_msr.baselines.task`), so no held-out interaction, and is loaded where that stage kept
it. Items that the user is known to have taken are left out. A target gets no other treatment than
the other items: if it is not among the first ones, it was not retrieved.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mllm_msr.baselines.discovery import Baseline, Inputs, Learner, find_baseline
from mllm_msr.baselines.learning.trained import fit_or_load
from mllm_msr.baselines.task import Task
from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.core.errors import ModelError
from mllm_msr.core.files import state_dir
from mllm_msr.core.params import BaselineStageParams, Section

POPULARITY = "popularity"


def list_retrievers(sections: Iterable[BaselineStageParams]) -> list[str]:
    """Return popularity and the baselines of the settings that score all items, as they learn."""
    named = [name for section in sections for name in section.models]
    return [POPULARITY, *(name for name in named if find_baseline(name).build)]


def load_learner(
    name: str, settings: Section, task: Task, filtered: Path, features: Path
) -> Learner:
    """Load a trained baseline, or train it if its stage did not.

    Args:
        name: Of a baseline that learns.
        settings: Its own.
        task: What to learn from.
        filtered: Folder of ``filter_sequences``.
        features: The table of ``encode_items``, for baselines that read it.

    Raises:
        DataError: A table is missing or of another run.
        ModelError: The baseline needs a package that is not installed.
    """
    baseline = find_baseline(name)
    inputs = find_inputs(baseline, filtered, features)
    return fit_or_load(baseline, task.training, settings, inputs, state_dir() / "baselines")


def find_inputs(baseline: Baseline, filtered: Path, features: Path) -> Inputs:
    """Return the tables that a baseline that learns reads beside the interactions."""
    if baseline.stage == "feature_baselines":
        return Inputs(features=features)
    return Inputs(items=filtered / "items.parquet")


def retrieve_first(
    task: Task, name: str, learner: Learner | None, number: int, splits: Collection[str]
) -> Iterator[Mapping[str, Any]]:
    """Yield the first items for each sequence of some splits, as rows of the table Retrieved.

    Args:
        task: What is known and asked.
        name: The retriever's.
        learner: The retriever; None is popularity.
        number: Items for each sequence; fewer where the catalogue has no more.
        splits: Of ``valid`` and ``test``.

    Raises:
        ModelError: A score is no finite number.
    """
    questions = task.questions
    popularity = np.bincount(task.known.items, minlength=len(task.items)).astype(np.float64)
    starts = np.searchsorted(task.known.users, np.arange(len(task.users) + 1))
    chosen = np.flatnonzero(np.isin(questions.splits, list(splits)))
    for question in chosen[np.argsort(questions.sequences[chosen])].tolist():
        user, history = int(questions.users[question]), questions.histories[question]
        scores = popularity if learner is None else learner.score_items(user, history)
        if not np.isfinite(scores).all():
            fix = "its training diverged: lower its learning rate"
            raise ModelError(expected="finite scores", got="inf or nan", where=name, fix=fix)
        taken = np.union1d(history, task.known.items[starts[user] : starts[user + 1]])
        for rank, item in enumerate(find_first(scores, taken, number).tolist(), start=1):
            yield {
                "sequence": int(questions.sequences[question]),
                "split": str(questions.splits[question]),
                "item": task.items[item],
                "rank": rank,
                "score": float(scores[item]),
            }


def find_first(scores: Floats, left_out: Integers, number: int) -> Integers:
    """Return the numbers of the items with the highest scores, best first; equal ones by number.

    Args:
        scores: [items].
        left_out: Numbers of items that are not returned.
        number: How many, at most.
    """
    order = np.argsort(-scores, kind="stable")
    return order[~np.isin(order, left_out)][:number]
