"""Sparse matrices of counts that several baselines build on."""

import numpy as np
from scipy import sparse

from mllm_msr.baselines.task import Task
from mllm_msr.core.arrays import Floats, Integers


def count_pairs(rows: Integers, columns: Integers, shape: tuple[int, int]) -> sparse.csr_array:
    """Count how often each pair of row and column occurs, as a matrix of that shape."""
    return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


def count_histories(task: Task) -> sparse.csr_array:
    """Count each item of each history, [questions, items]."""
    histories = task.questions.histories
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    return count_pairs(rows, np.concatenate(histories), (len(histories), len(task.items)))


def pick(matrix: sparse.csr_array, rows: Integers, columns: Integers) -> Floats:
    """Return the value of the matrix at each pair of row and column, [pairs]."""
    picked: Floats = np.asarray(matrix[rows, columns], dtype=np.float64)
    return picked
