"""Baselines that only count: no chance, no epochs, figures that can be worked by hand."""

import numpy as np
from scipy import sparse

from mllm_msr.baselines.task import Floats, Integers, Task
from mllm_msr.core.errors import DataError

MS_PER_DAY = 86_400_000


def recent_popularity(task: Task, *, days: int) -> Floats:
    """Count the known interactions with a candidate in the days before the question.

    Those strictly earlier than the target's time and no more than ``days`` before it (Ji et al.,
    SIGIR 2020, "A Re-visit of the Popularity Baseline in Recommender Systems"). Where all that is
    known is earlier, as under the split by time, the window ends with it.

    Args:
        task: What is known and asked.
        days: Length of the window.

    Returns:
        A count per candidate, [candidates].

    Raises:
        DataError: An interaction has no timestamp.
    """
    known, asked = task.known, task.candidates
    if known.timestamps is None or task.questions.timestamps is None:
        raise DataError(
            expected="a timestamp for every interaction, to tell which are recent",
            got="interactions without",
            where="baselines.models, recent_popularity",
            fix="leave it out, or bring timestamps",
        )
    moments = np.unique(known.timestamps)
    now = np.minimum(task.questions.timestamps, moments[-1] + 1)[asked.questions]
    # One ascending number for (item, time): how many are smaller says how many are earlier.
    row = len(moments) + 1
    keys = np.sort(known.items * row + np.searchsorted(moments, known.timestamps))
    first, last = (
        np.searchsorted(keys, asked.items * row + np.searchsorted(moments, time))
        for time in (now - days * MS_PER_DAY, now)
    )
    counts: Floats = (last - first).astype(np.float64)
    return counts


def item_knn(task: Task, *, neighbours: int, shrinkage: float) -> Floats:
    """Add up the candidate's similarity to each item of the history.

    Similarity of two items is the cosine of their columns of users, shrunk where few users took
    both: common / (sqrt(users of one * users of the other) + shrinkage). An item of the history
    speaks for its nearest neighbours alone (Deshpande and Karypis, TOIS 2004).

    Args:
        task: What is known and asked.
        neighbours: Of an item.
        shrinkage: In users; 0 is the plain cosine.

    Returns:
        A sum per candidate, [candidates].
    """
    known = task.known
    taken = _ones(known.users, known.items, (len(task.users), len(task.items)))
    common = (taken.T @ taken).tocoo()  # [items, items]
    users = taken.sum(axis=0)
    other = common.row != common.col
    rows, columns = common.row[other], common.col[other]
    cosines = common.data[other] / (np.sqrt(users[rows] * users[columns]) + shrinkage)
    near = _nearest(rows, columns, cosines, neighbours)
    similar = sparse.csr_array((cosines[near], (rows[near], columns[near])), shape=common.shape)
    return _pick(count_histories(task) @ similar, task.candidates.questions, task.candidates.items)


def markov(task: Task, *, smoothing: float) -> Floats:
    """Give the log-probability of the candidate after the last item of the history.

    A Markov chain of first order over all known steps from one item of a user to the next. With
    few steps from the last item it backs off to how often the candidate is taken at all: p =
    (steps to it + smoothing * popularity) / (steps + smoothing), popularity being
    (interactions + 1) / (all interactions + items) (Dirichlet smoothing, Zhai and Lafferty, TOIS
    2004).

    Args:
        task: What is known and asked.
        smoothing: Steps that popularity counts for.

    Returns:
        A log-probability per candidate, [candidates].
    """
    known, asked, items = task.known, task.candidates, len(task.items)
    same_user = known.users[1:] == known.users[:-1]
    steps = _ones(known.items[:-1][same_user], known.items[1:][same_user], (items, items))
    popularity = (np.bincount(known.items, minlength=items) + 1) / (len(known.items) + items)
    last = np.array([history[-1] for history in task.questions.histories])[asked.questions]
    taken = _pick(steps, last, asked.items) + smoothing * popularity[asked.items]
    probabilities: Floats = taken / (steps.sum(axis=1)[last] + smoothing)
    return np.log(probabilities)


def _ones(rows: Integers, columns: Integers, shape: tuple[int, int]) -> sparse.csr_array:
    """Give a matrix that counts how often each pair occurs."""
    return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


def count_histories(task: Task) -> sparse.csr_array:
    """Count each item of each history, [questions, items]."""
    histories = task.questions.histories
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    return _ones(rows, np.concatenate(histories), (len(histories), len(task.items)))


def _nearest(rows: Integers, columns: Integers, values: Floats, most: int) -> Integers:
    """Give the places of each row's largest values, at most so many; equal ones by column."""
    order = np.lexsort((columns, -values, rows))
    starts = np.searchsorted(rows[order], rows[order])
    return order[np.arange(len(order)) - starts < most]


def _pick(matrix: sparse.csr_array, rows: Integers, columns: Integers) -> Floats:
    """Give one value of the matrix per pair of row and column."""
    picked: Floats = np.asarray(matrix[rows, columns], dtype=np.float64)
    return picked
