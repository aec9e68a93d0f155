"""Markov chain of first order: items that follow the last one.

Dirichlet smoothing as in Zhai and Lafferty, TOIS 2004.
"""

from typing import TYPE_CHECKING

import numpy as np

from mllm_msr.baselines.counts import count_pairs, pick
from mllm_msr.baselines.discovery import Baseline, Inputs
from mllm_msr.core.arrays import Floats
from mllm_msr.core.params import Rate, Section

if TYPE_CHECKING:
    from mllm_msr.baselines.task import Task


class MarkovParams(Section):
    """How far a chain backs off to popularity."""

    smoothing: Rate  # steps that popularity counts for


def score(task: "Task", settings: MarkovParams, _: Inputs) -> Floats:
    """Return the log-probability of the candidate after the last item of the history.

    The chain is over all known steps from one item of a user to the next. With few steps from the
    last item it backs off to how often the candidate is taken at all: p = (steps to it +
    smoothing * popularity) / (steps + smoothing), popularity being (interactions + 1) / (all
    interactions + items).

    Returns:
        A log-probability per candidate, [candidates].
    """
    known, asked, items = task.known, task.candidates, len(task.items)
    same_user = known.users[1:] == known.users[:-1]
    steps = count_pairs(known.items[:-1][same_user], known.items[1:][same_user], (items, items))
    popularity = (np.bincount(known.items, minlength=items) + 1) / (len(known.items) + items)
    last = np.array([history[-1] for history in task.questions.histories])[asked.questions]
    taken = pick(steps, last, asked.items) + settings.smoothing * popularity[asked.items]
    probabilities: Floats = taken / (steps.sum(axis=1)[last] + settings.smoothing)
    return np.log(probabilities)


BASELINE = Baseline(
    label="Markov chain",
    stage="baselines",
    order=120,
    params=MarkovParams,
    score=score,
    grid=({"smoothing": [0.1, 1.0, 10.0, 1000.0, 3000.0, 10_000.0, 30_000.0, 100_000.0]},),
)
