"""Small tasks for baselines: interactions of users with five items, and questions."""

from typing import Any

import numpy as np

from mllm_msr.baselines.discovery import Inputs, find_baseline
from mllm_msr.baselines.learning.trained import score_candidates
from mllm_msr.baselines.task import Candidates, Known, Questions, Task
from mllm_msr.core.arrays import Floats

DAY = 86_400_000  # milliseconds
NAMES = "abcde"


def make_task(
    log: list[list[str]],
    asked_after: list[tuple[int, str]],
    times: list[list[int]] | None = None,
    asked: list[int] | None = None,
) -> Task:
    """Return a task whose questions all have the candidates a to e, with the target a.

    Args:
        log: The items of each user, oldest first.
        asked_after: User and history of each question.
        times: Timestamps of the log, if it has any.
        asked: Timestamps of the questions' targets, if the log has any.
    """
    users = np.repeat(np.arange(len(log)), [len(items) for items in log])
    items = np.array([NAMES.index(item) for taken in log for item in taken])
    stamps = None if times is None else np.array([time for taken in times for time in taken])
    histories = [np.array([NAMES.index(item) for item in history]) for _, history in asked_after]
    count = len(asked_after)
    questions = Questions(
        sequences=np.arange(count),
        splits=np.array(["test"] * count),
        users=np.array([user for user, _ in asked_after]),
        histories=histories,
        taken=[np.unique(history) for history in histories],
        timestamps=None if asked is None else np.array(asked),
    )
    candidates = Candidates(
        questions=np.repeat(np.arange(count), len(NAMES)),
        items=np.tile(np.arange(len(NAMES)), count),
        labels=np.tile(np.arange(len(NAMES)) == 0, count),
    )
    names = [f"u{user}" for user in range(len(log))]
    known = Known(users, items, stamps)
    return Task(list(NAMES), names, known, questions, candidates, selection=candidates)


def score_by(baseline: str, task: Task, **settings: Any) -> Floats:
    """Score a task by a baseline that reads nothing else."""
    found = find_baseline(baseline)
    return score_candidates(found, task, found.params.model_validate(settings), Inputs())
