"""Where a target stands among its candidates, exact under ties: its rank, and the AUC.

A file of its own, since baselines that choose their epoch by AUC need no other metric.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Placements:
    """Where each sequence's target stands; three counts of shape [sequences].

    Attributes:
        sequences: Identifiers, ascending.
        candidates: Candidates asked about, the target included; at least 2.
        above: Negatives scored higher than the target.
        tied: Negatives with the target's score.
    """

    sequences: Integers
    candidates: Integers
    above: Integers
    tied: Integers


def place_targets(
    sequences: npt.ArrayLike, scores: npt.ArrayLike, labels: npt.ArrayLike
) -> Placements:
    """Count, for every sequence, the negatives above and level with its target.

    Args:
        sequences: [rows] Sequence of each candidate, rows in any order.
        scores: [rows] Any monotone score, higher is likelier; infinities are allowed.
        labels: [rows] True for the target.

    Raises:
        ValueError: A score is NaN, or a sequence has no negative or not exactly one target.
    """
    values, targets = np.asarray(scores), np.asarray(labels, dtype=bool)
    if np.isnan(values).any():
        raise ValueError("a score is NaN, which has no rank")
    names, row_of = np.unique(np.asarray(sequences, dtype=np.int64), return_inverse=True)
    candidates = np.bincount(row_of, minlength=len(names))
    if (np.bincount(row_of[targets], minlength=len(names)) != 1).any() or (candidates < 2).any():
        raise ValueError("every sequence needs exactly one target and at least one negative")
    score_of_target = np.empty(len(names), dtype=values.dtype)
    score_of_target[row_of[targets]] = values[targets]
    rival = score_of_target[row_of]  # [rows]
    above = np.bincount(row_of[values > rival], minlength=len(names))
    tied = np.bincount(row_of[(values == rival) & ~targets], minlength=len(names))
    return Placements(names, candidates, above, tied)


def rank(placements: Placements) -> Floats:
    """Give the target's expected rank, 1 the best: the middle of its ties, ``a + 1 + t / 2``."""
    return placements.above + 1 + placements.tied / 2


def auc(placements: Placements) -> Floats:
    """Give the area under each sequence's ROC curve, [sequences] in 0..1.

    The share of negatives below the target, ties counted half: ``(n - rank) / (n - 1)`` (Mann and
    Whitney 1947; Hanley and McNeil 1982). Its mean weighs every sequence alike.
    """
    return (placements.candidates - rank(placements)) / (placements.candidates - 1)
