"""Item-kNN: items that the same users took (Deshpande and Karypis, TOIS 2004)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mllm_msr.baselines.counts import count_histories, count_pairs, pick
from mllm_msr.baselines.discovery import Baseline, Inputs, Learner
from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.core.params import Count, Section

if TYPE_CHECKING:
    from scipy import sparse

    from mllm_msr.baselines.task import Task, Training


class ItemKnnParams(Section):
    """Which neighbours of an item count, and how much."""

    neighbours: Count  # of an item of the history
    shrinkage: Annotated[float, Field(ge=0)]  # users; weakens what few have in common


class ItemKnnLearner:
    """The similarities of items, which are added up over a history.

    Similarity of two items is the cosine of their columns of users, shrunk where few users took
    both: common / (sqrt(users of one * users of the other) + shrinkage). Only the nearest
    neighbours of an item of the history add to the sum.
    """

    def __init__(self, training: "Training", settings: ItemKnnParams) -> None:
        """Take what is known."""
        self.training, self.settings = training, settings
        self.similar: sparse.csr_array  # [items, items], a row for each item of a history

    def fit(self) -> None:
        """Compute the similarities."""
        from scipy import sparse

        known, size = self.training.known, len(self.training.items)
        taken = count_pairs(known.users, known.items, (len(self.training.users), size))
        common = (taken.T @ taken).tocoo()  # [items, items]
        users = taken.sum(axis=0)
        other = common.row != common.col
        rows, columns = common.row[other], common.col[other]
        shrunk = np.sqrt(users[rows] * users[columns]) + self.settings.shrinkage
        cosines = common.data[other] / shrunk
        near = _nearest(rows, columns, cosines, self.settings.neighbours)
        values = (cosines[near], (rows[near], columns[near]))
        self.similar = sparse.csr_array(values, shape=common.shape)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return the sparse matrix of similarities."""
        return {name: getattr(self.similar, name) for name in ("data", "indices", "indptr")}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Load the sparse matrix of similarities."""
        from scipy import sparse

        size = len(self.training.items)
        parts = (state["data"], state["indices"], state["indptr"])
        self.similar = sparse.csr_array(parts, shape=(size, size))

    def score_items(self, _: int | None, history: Integers) -> Floats:
        """Add up each item's similarity to the items of a history."""
        counts = count_pairs(np.zeros_like(history), history, (1, len(self.training.items)))
        summed: Floats = (counts @ self.similar).toarray()[0]
        return summed

    def score_candidates(self, task: "Task") -> Floats:
        """Add up the candidate's similarity to each item of the history."""
        asked = task.candidates
        return pick(count_histories(task) @ self.similar, asked.questions, asked.items)


def build(training: "Training", settings: ItemKnnParams, _: Inputs) -> Learner:
    """Build item-kNN."""
    return ItemKnnLearner(training, settings)


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
    build=build,
    grid=({"neighbours": [50, 200, 1000, 5000], "shrinkage": [0.0, 10.0, 100.0, 1000.0]},),
)
