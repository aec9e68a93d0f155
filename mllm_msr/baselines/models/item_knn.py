"""Item-kNN: items that the same users took (Deshpande and Karypis, TOIS 2004)."""

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from mllm_msr.baselines.counts import count_histories, count_pairs, pick
from mllm_msr.baselines.discovery import Baseline, Inputs
from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.core.params import Count, Section

if TYPE_CHECKING:
    from mllm_msr.baselines.task import Task


class ItemKnnParams(Section):
    """Which neighbours of an item count, and how much."""

    neighbours: Count  # of an item of the history
    shrinkage: Annotated[float, Field(ge=0)]  # users; weakens what few have in common


def score(task: "Task", settings: ItemKnnParams, _: Inputs) -> Floats:
    """Add up the candidate's similarity to each item of the history.

    Similarity of two items is the cosine of their columns of users, shrunk where few users took
    both: common / (sqrt(users of one * users of the other) + shrinkage). Only the nearest
    neighbours of an item of the history add to the sum.

    Returns:
        A sum per candidate, [candidates].
    """
    from scipy import sparse

    known = task.known
    taken = count_pairs(known.users, known.items, (len(task.users), len(task.items)))
    common = (taken.T @ taken).tocoo()  # [items, items]
    users = taken.sum(axis=0)
    other = common.row != common.col
    rows, columns = common.row[other], common.col[other]
    cosines = common.data[other] / (np.sqrt(users[rows] * users[columns]) + settings.shrinkage)
    near = _nearest(rows, columns, cosines, settings.neighbours)
    similar = sparse.csr_array((cosines[near], (rows[near], columns[near])), shape=common.shape)
    return pick(count_histories(task) @ similar, task.candidates.questions, task.candidates.items)


def _nearest(rows: Integers, columns: Integers, values: Floats, most: int) -> Integers:
    """Return the indices of each row's largest values, at most so many; equal ones by column."""
    order = np.lexsort((columns, -values, rows))
    starts = np.searchsorted(rows[order], rows[order])
    return order[np.arange(len(order)) - starts < most]


BASELINE = Baseline(
    label="Item-kNN",
    stage="baselines",
    order=130,
    params=ItemKnnParams,
    score=score,
    grid=({"neighbours": [50, 200, 1000, 5000], "shrinkage": [0.0, 10.0, 100.0, 1000.0]},),
)
