"""Sparse matrices of counts that several baselines build on.

Baselines import this module while settings are checked, so it imports SciPy only inside functions.
"""

from typing import TYPE_CHECKING

import numpy as np

from mllm_msr.core.arrays import Floats, Integers

if TYPE_CHECKING:
    from scipy import sparse

    from mllm_msr.baselines.task import Task


def count_pairs(rows: Integers, columns: Integers, shape: tuple[int, int]) -> "sparse.csr_array":
    """Count how often each pair of row and column occurs, as a matrix of that shape."""
    from scipy import sparse

    return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


def count_histories(task: "Task") -> "sparse.csr_array":
    """Count each item of each history, [questions, items]."""
    histories = task.questions.histories
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    return count_pairs(rows, np.concatenate(histories), (len(histories), len(task.items)))


def pick(matrix: "sparse.csr_array", rows: Integers, columns: Integers) -> Floats:
    """Return the value of the matrix at each pair of row and column, [pairs]."""
    picked: Floats = np.asarray(matrix[rows, columns], dtype=np.float64)
    return picked
