"""The rank of each target among its candidates, exact under ties, and the AUC that follows from it.

This module is apart from the other metrics, so that baselines that select their epoch by AUC depend
on nothing else of the evaluation.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mllm_msr.core.arrays import Floats, Integers


@dataclass(frozen=True)
class TargetRanks:
    """The rank of each sequence's target, as three counts of shape [sequences].

    Attributes:
        sequences: Identifiers, ascending.
        candidates: Number of candidates, the target included; at least 2.
        above: Negatives scored higher than the target.
        tied: Negatives with the target's score.
    """

    sequences: Integers
    candidates: Integers
    above: Integers
    tied: Integers


def rank_targets(
    sequences: npt.ArrayLike, scores: npt.ArrayLike, labels: npt.ArrayLike
) -> TargetRanks:
    """Count, for every sequence, the negatives scored higher than its target and equal to it.

    Args:
        sequences: [rows] Sequence of each candidate, rows in any order.
        scores: [rows] Scores, higher means more likely; infinities are allowed.
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
    of_target = score_of_target[row_of]  # [rows]
    above = np.bincount(row_of[values > of_target], minlength=len(names))
    tied = np.bincount(row_of[(values == of_target) & ~targets], minlength=len(names))
    return TargetRanks(names, candidates, above, tied)


def expected_rank(ranks: TargetRanks) -> Floats:
    """Return each target's expected rank, [sequences], 1 the best: ``above + 1 + tied / 2``."""
    return ranks.above + 1 + ranks.tied / 2


def auc(ranks: TargetRanks) -> Floats:
    """Return the area under each sequence's ROC curve, [sequences] in 0..1.

    It is the share of negatives below the target, ties counted half: ``(n - rank) / (n - 1)`` with
    ``n`` candidates (Mann and Whitney 1947; Hanley and McNeil 1982). The mean over sequences gives
    every sequence the same weight.
    """
    return (ranks.candidates - expected_rank(ranks)) / (ranks.candidates - 1)
