"""Ranking metrics of one target among its candidates, exact under ties, vectorised over sequences.

Everything follows from three counts per sequence (:mod:`mllm_msr.ranking`): ``n``
candidates, ``a`` negatives scored above the target, ``t`` negatives with the target's score. A tie
is no rank, so each metric is its expected value when tied candidates are put in a uniformly random
order: the target's rank is then uniform on ``a + 1 .. a + t + 1``, and with a metric ``f(rank)``

    value = 1 / (t + 1) * sum of f(r) for r = a + 1 .. a + t + 1

(McSherry and Najork, ECIR 2008, "Computing Information Retrieval Performance Measures Efficiently
in the Presence of Tied Scores"; scikit-learn's ``ndcg_score`` does the same). A constant scorer
therefore gets exactly what chance gets, and never the 1.0 or the 0.0 that a lucky sort gives it.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, ndtri

from mllm_msr.ranking import Floats, Placements, auc

TIED_MEANS = 1e-9  # of the largest value: resampled means this close are equal
TINY = 1e-9


def hit_rate(placements: Placements, k: int) -> Floats:
    """Give HR@k, the chance that the target is among the first k: f(r) = [r <= k]."""
    return _expect(placements, np.ones(k))


def ndcg(placements: Placements, k: int) -> Floats:
    """Give NDCG@k: f(r) = [r <= k] / log2(1 + r).

    The ideal ranking puts the one target first and gains 1, so DCG is NDCG (Järvelin and
    Kekäläinen 2002, binary gain).
    """
    return _expect(placements, 1 / np.log2(np.arange(2, k + 2)))


def reciprocal_rank(placements: Placements, k: int) -> Floats:
    """Give MRR@k before the mean over sequences: f(r) = [r <= k] / r (Voorhees 1999)."""
    return _expect(placements, 1 / np.arange(1, k + 1))


def measure(placements: Placements, ks: Sequence[int]) -> dict[str, Floats]:
    """Give every metric of every sequence.

    Returns:
        ``auc``, then ``hr@k``, ``ndcg@k`` and ``mrr@k`` for each k; [sequences] each.
    """
    metrics = {"auc": auc(placements)}
    for k in ks:
        metrics[f"hr@{k}"] = hit_rate(placements, k)
        metrics[f"ndcg@{k}"] = ndcg(placements, k)
        metrics[f"mrr@{k}"] = reciprocal_rank(placements, k)
    return metrics


def share_of_ties(placements: Placements) -> float:
    """Give the share of sequences whose target has the score of some negative, 0..1."""
    return float(np.mean(placements.tied > 0))


def bootstrap_interval(
    values: Floats, samples: int, confidence: float, seed: int
) -> tuple[Floats, Floats]:
    """Bound means by the BCa bootstrap over sequences (bias-corrected and accelerated, Efron 1987).

    Per-sequence metrics are skewed: most targets rank high and a few very low. The percentile
    bootstrap then covers the true mean too rarely; BCa takes other percentiles of the same
    resampled means (:func:`_bca_levels`), and its bounds stay within the range of the values.

    A resample is how often it takes each sequence, and its means are one product with these
    counts: memory grows with sequences + samples and not with their product. Columns share their
    resamples, as do calls with equal seeds and equal numbers of sequences.

    Args:
        values: [sequences, metrics].
        samples: Number of resamples.
        confidence: Coverage, such as 0.95.
        seed: Of the resamples.

    Returns:
        Lower and upper bound of each column's mean, [metrics] each; equal to it up to rounding
        where all values of the column are equal.
    """
    generator, count = np.random.default_rng(seed), len(values)
    means = np.empty((samples, values.shape[1]))
    for sample in range(samples):
        drawn = np.bincount(generator.integers(count, size=count), minlength=count)
        means[sample] = drawn @ values / count
    bounds = np.array(
        [
            np.quantile(resampled, _bca_levels(column, resampled, confidence))
            for column, resampled in zip(values.T, means.T, strict=True)
        ]
    )
    return bounds[:, 0], bounds[:, 1]


def summarize(
    placements: Placements, *, ks: Sequence[int], samples: int, confidence: float, seed: int
) -> dict[str, float]:
    """Average every metric over the sequences, each with its interval.

    Returns:
        For each metric its mean, ``<metric>_low`` and ``<metric>_high``; then ``ties``, the share
        of sequences with a tied target, and ``sequences``, their number. Rounded to 6 decimals, so
        that machines which add in another order write the same file.
    """
    metrics = measure(placements, ks)
    values = np.column_stack(list(metrics.values()))  # [sequences, metrics]
    low, high = bootstrap_interval(values, samples, confidence, seed)
    summary: dict[str, float] = {}
    for column, name in enumerate(metrics):
        summary[name] = round(float(values[:, column].mean()), 6)
        summary[f"{name}_low"] = round(float(low[column]), 6)
        summary[f"{name}_high"] = round(float(high[column]), 6)
    ties = round(share_of_ties(placements), 6)
    return summary | {"ties": ties, "sequences": len(placements.sequences)}


def _expect(placements: Placements, gains: Floats) -> Floats:
    """Average ``gains`` over the ranks ``a + 1 .. a + t + 1``; [k], and zero beyond rank k."""
    total = np.concatenate([[0.0], np.cumsum(gains)])  # total[r]: gain of ranks 1 .. r
    first, last = placements.above, placements.above + placements.tied + 1
    k = len(gains)
    spread: Floats = total[np.minimum(last, k)] - total[np.minimum(first, k)]
    return spread / (placements.tied + 1)


def _bca_levels(values: Floats, means: Floats, confidence: float) -> Floats:
    """Give the quantiles of the resampled means that bound the mean, [lower, upper].

    With ``z`` a quantile of the normal distribution Phi, the level is ``Phi(b + (b + z) / (1 - a *
    (b + z)))``. The bias ``b`` is the quantile of the share of resampled means below the mean, ties
    counted half; the acceleration ``a`` is a sixth of the skewness of the mean, which for a mean
    the jackknife gives in closed form: ``sum(d ** 3) / (6 * sum(d ** 2) ** 1.5)`` with ``d`` the
    deviations from the mean (Efron 1987; Efron and Tibshirani 1993, ch. 14).

    Args:
        values: [sequences] One metric.
        means: [samples] Its mean in each resample.
        confidence: Coverage, such as 0.95.
    """
    mean = values.mean()
    # A mean that was added up in another order is still the same mean.
    margin = TIED_MEANS * np.abs(values).max()
    below = np.mean(means < mean - margin) + np.mean(means <= mean + margin)
    # No resample on one side would give a bias without bound.
    bias = ndtri(np.clip(below / 2, 0.5 / len(means), 1 - 0.5 / len(means)))
    deviations = values - mean
    scale = np.sum(deviations**2) ** 1.5
    acceleration = np.sum(deviations**3) / (6 * scale) if scale else 0.0
    shifted = bias + ndtri([(1 - confidence) / 2, (1 + confidence) / 2])
    # Beyond its pole the formula would turn round; at it the level is 0 or 1.
    levels: Floats = ndtr(bias + shifted / np.maximum(1 - acceleration * shifted, TINY))
    return levels
