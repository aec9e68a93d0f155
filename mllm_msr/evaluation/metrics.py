"""The ranking metrics: one list, :data:`METRICS`, that every table, curve and plot reads.

All metrics follow from three counts per sequence (:mod:`mllm_msr.ranking`): ``n`` candidates, ``a``
negatives scored higher than the target, ``t`` negatives with the target's score. Under ties, each
metric is its expected value when tied candidates are put in a uniformly random order. The target's
rank is then uniform on ``a + 1 .. a + t + 1``, and a metric ``f(rank)`` becomes

    value = 1 / (t + 1) * sum of f(r) for r = a + 1 .. a + t + 1

(McSherry and Najork, ECIR 2008, "Computing Information Retrieval Performance Measures Efficiently
in the Presence of Tied Scores"; scikit-learn's ``ndcg_score`` does the same). A constant scorer
therefore gets exactly the figures of chance, and never the 1.0 or 0.0 of a lucky sort.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

from mllm_msr.core.arrays import Floats
from mllm_msr.ranking import TargetRanks, auc

CUTOFF = 5  # the paper's, for tables that show one cut-off
TIED_MEANS = 1e-9  # of the largest value: resampled means this close are equal
TINY = 1e-9


class Metric(NamedTuple):
    """A metric of one target among its candidates.

    Attributes:
        name: Its key in ``metrics.json``, to which a cut-off is added: ``hr`` gives ``hr@5``.
        label: Its title in tables and charts.
        has_cutoff: Whether it looks at the first k candidates only.
        function: Maps TargetRanks, and k where it has a cut-off, to values of shape [sequences].
        about: What it measures, in a few words; a caption of the report.
    """

    name: str
    label: str
    has_cutoff: bool
    function: Callable[..., Floats]
    about: str = ""

    def key(self, k: int) -> str:
        """Return the key of the metric in ``metrics.json``, at cut-off k where it has one."""
        return f"{self.name}@{k}" if self.has_cutoff else self.name


def hit_rate(ranks: TargetRanks, k: int) -> Floats:
    """Return HR@k, the probability that the target is among the first k: f(r) = [r <= k]."""
    return _expect(ranks, np.ones(k))


def ndcg(ranks: TargetRanks, k: int) -> Floats:
    """Return NDCG@k: f(r) = [r <= k] / log2(1 + r).

    The ideal ranking has the one target first and gains 1, so DCG is NDCG (Järvelin and Kekäläinen
    2002, binary gain).
    """
    return _expect(ranks, 1 / np.log2(np.arange(2, k + 2)))


def reciprocal_rank(ranks: TargetRanks, k: int) -> Floats:
    """Return MRR@k before the mean over sequences: f(r) = [r <= k] / r (Voorhees 1999)."""
    return _expect(ranks, 1 / np.arange(1, k + 1))


# In the order of columns. AUC is also the metric of the paired tests and of the order of rows.
METRICS: tuple[Metric, ...] = (
    Metric("auc", "AUC", False, auc, "share of negatives below the target"),
    Metric("hr", "HR", True, hit_rate, "share of targets among the first k"),
    Metric("ndcg", "NDCG", True, ndcg, "share of targets among the first k, discounted by rank"),
    Metric("mrr", "MRR", True, reciprocal_rank, "mean of 1 / rank, 0 beyond rank k"),
)


def metrics_with_cutoff() -> list[Metric]:
    """Return the metrics that have a value for each cut-off k, those of the curves over k."""
    return [metric for metric in METRICS if metric.has_cutoff]


def metric_keys(k: int) -> list[str]:
    """Return the keys of all metrics at one cut-off, in the order of columns."""
    return [metric.key(k) for metric in METRICS]


def metric_title(key: str) -> str:
    """Return the title of a column: of the key ``hr@5``, ``HR@5``."""
    name, at, k = key.partition("@")
    labels = {metric.name: metric.label for metric in METRICS}
    return f"{labels[name]}{at}{k}"


def find_cutoffs(keys: Collection[str]) -> list[int]:
    """Return the cut-offs k of keys such as ``hr@5``, ascending."""
    names = {metric.name for metric in metrics_with_cutoff()}
    found = (key.partition("@") for key in keys)
    return sorted({int(k) for name, _, k in found if name in names and k.isdecimal()})


def choose_cutoff(ks: Collection[int]) -> int:
    """Return the cut-off that tables show: the paper's, or the smallest if it is not measured."""
    return CUTOFF if CUTOFF in ks else min(ks)


def measure(ranks: TargetRanks, ks: Sequence[int]) -> dict[str, Floats]:
    """Compute every metric of every sequence.

    Returns:
        First the metrics without a cut-off, such as ``auc``, then for each k those with one, such
        as ``hr@k``; [sequences] each.
    """
    values = {each.name: each.function(ranks) for each in METRICS if not each.has_cutoff}
    for k in ks:
        values |= {each.key(k): each.function(ranks, k) for each in metrics_with_cutoff()}
    return values


def share_of_ties(ranks: TargetRanks) -> float:
    """Return the share of sequences whose target has the score of some negative, 0..1."""
    return float(np.mean(ranks.tied > 0))


def bootstrap_interval(
    values: Floats, samples: int, confidence: float, seed: int
) -> tuple[Floats, Floats]:
    """Bound means by the BCa bootstrap over sequences (bias-corrected and accelerated, Efron 1987).

    Per-sequence metrics are skewed: most targets rank high and a few very low. The percentile
    bootstrap then covers the true mean too rarely. BCa uses other percentiles of the same resampled
    means (:func:`_bca_levels`), and its bounds stay within the range of the values.

    A resample is stored as the number of times it draws each sequence, and its means are one
    product with these counts, so that memory grows with sequences + samples and not with their
    product. All columns share their resamples, as do calls with the same seed and number of
    sequences.

    Args:
        values: [sequences, metrics].
        samples: Number of resamples.
        confidence: Coverage, such as 0.95.
        seed: Seed of the resamples.

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
    ranks: TargetRanks, *, ks: Sequence[int], samples: int, confidence: float, seed: int
) -> dict[str, float]:
    """Average every metric over the sequences, each with its interval.

    Returns:
        For each metric its mean, ``<metric>_low`` and ``<metric>_high``; then ``ties``, the share
        of sequences with a tied target, and ``sequences``, their number. Rounded to 6 decimals, so
        that machines that add in another order write the same file.
    """
    metrics = measure(ranks, ks)
    values = np.column_stack(list(metrics.values()))  # [sequences, metrics]
    low, high = bootstrap_interval(values, samples, confidence, seed)
    summary: dict[str, float] = {}
    for column, name in enumerate(metrics):
        summary[name] = round(float(values[:, column].mean()), 6)
        summary[f"{name}_low"] = round(float(low[column]), 6)
        summary[f"{name}_high"] = round(float(high[column]), 6)
    ties = round(share_of_ties(ranks), 6)
    return summary | {"ties": ties, "sequences": len(ranks.sequences)}


def _expect(ranks: TargetRanks, gains: Floats) -> Floats:
    """Average gains over the ranks ``a + 1 .. a + t + 1``.

    Args:
        ranks: The target's possible ranks.
        gains: [k] Gain at each rank; 0 beyond rank k.
    """
    total = np.concatenate([[0.0], np.cumsum(gains)])  # total[r]: gain of ranks 1 .. r
    first, last = ranks.above, ranks.above + ranks.tied + 1
    k = len(gains)
    summed: Floats = total[np.minimum(last, k)] - total[np.minimum(first, k)]
    return summed / (ranks.tied + 1)


def _bca_levels(values: Floats, means: Floats, confidence: float) -> Floats:
    """Return the levels of the quantiles of the resampled means that bound the mean, [2].

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
    # Means that were added in another order count as equal.
    margin = TIED_MEANS * np.abs(values).max()
    below = np.mean(means < mean - margin) + np.mean(means <= mean + margin)
    # Without a resample on one side the bias would be infinite.
    bias = ndtri(np.clip(below / 2, 0.5 / len(means), 1 - 0.5 / len(means)))
    deviations = values - mean
    scale = np.sum(deviations**2) ** 1.5
    acceleration = np.sum(deviations**3) / (6 * scale) if scale else 0.0
    shifted = bias + ndtri([(1 - confidence) / 2, (1 + confidence) / 2])
    # Beyond its pole the formula changes sign; at the pole the level is 0 or 1.
    levels: Floats = ndtr(bias + shifted / np.maximum(1 - acceleration * shifted, TINY))
    return levels
