"""Paired tests and intervals of the difference between two scorers, over the test sequences.

Both scorers rank the same candidates of the same sequences, so the test is of each sequence's
difference. It is Fisher's paired randomisation test, which assumes no distribution: if the two
scorers were equally good, each difference could have had the other sign with equal probability
(Fisher 1935; Smucker, Allan and Carterette, CIKM 2007, for rankings).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from mllm_msr.core.arrays import Floats
from mllm_msr.evaluation.metrics import bootstrap_interval

SAMPLES = 10_000  # resamples of a paired interval, sign patterns of a paired test
SEED = 2026
# Sums in another order differ by rounding: sums that are this close, relatively, count as equal.
ROUNDING = 1e-9
MAX_DRAWS = 1 << 20  # random numbers held in memory at once
LEVEL = 0.05  # of the tests


class Difference(NamedTuple):
    """The mean difference between two scorers, its interval and its p value."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """The difference in AUC on test of a scorer and a baseline that does not know the user."""

    sampling: str
    scorer: str
    baseline: str
    difference: Difference  # p is Holm-corrected

    @property
    def is_above(self) -> bool:
        """Return whether the scorer is shown to be above the baseline."""
        return self.difference.low > 0 and self.difference.p < LEVEL


def compare(
    values: Floats,
    others: Floats,
    *,
    confidence: float,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> Difference:
    """Compare two scorers by one metric of the same sequences.

    Args:
        values: [sequences] The metric of one scorer.
        others: [sequences] The metric of the other, in the same order.
        confidence: Coverage of the paired BCa bootstrap interval, such as 0.95.
        samples: Resamples of the interval, and sign patterns of the test.
        seed: Seed of the resamples and patterns.

    Returns:
        The mean of ``values - others``, its interval, and p of :func:`randomisation_test`.

    Raises:
        ValueError: The shapes differ, or there is no sequence.
    """
    (difference,) = compare_pairs(
        [(values, others)], confidence=confidence, samples=samples, seed=seed
    )
    return difference


def compare_pairs(
    pairs: Sequence[tuple[Floats, Floats]],
    *,
    confidence: float,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> list[Difference]:
    """Compare the two scorers of each pair, as one family of tests: p is Holm-corrected.

    The intervals are not corrected. All pairs share the resamples of one bootstrap.

    Args:
        pairs: The metric of both scorers, [sequences] each; the same sequences in every pair.
        confidence: Coverage of the intervals.
        samples: Resamples of an interval, and sign patterns of a test.
        seed: Seed of the resamples and patterns.

    Raises:
        ValueError: The shapes differ, or there is no sequence.
    """
    if not pairs:
        return []
    shape = pairs[0][0].shape
    if not shape[0] or any(values.shape != shape for pair in pairs for values in pair):
        raise ValueError("both scorers need a value for each of the same sequences")
    differences = np.column_stack([values - others for values, others in pairs])
    lows, highs = bootstrap_interval(differences, samples, confidence, seed)
    corrected = holm([randomisation_test(column, samples, seed) for column in differences.T])
    bounds = zip(differences.mean(axis=0), lows, highs, corrected, strict=True)
    return [Difference(*map(float, figures)) for figures in bounds]


def randomisation_test(differences: Floats, samples: int, seed: int) -> float:
    """Return the two-sided p value of the mean difference under random signs.

    If there are no more sign patterns than ``samples``, all are counted and p is exact. Otherwise
    ``samples`` patterns are drawn and the observed one is added, so that p is never 0 and the test
    keeps its level: ``p = (1 + as large) / (1 + samples)`` (Davison and
    Hinkley 1997, ch. 4; Phipson and Smyth 2010).

    Args:
        differences: [sequences].
        samples: Sign patterns to draw.
        seed: Seed of the patterns.
    """
    sizes = np.abs(differences[differences != 0])  # a zero has no sign to change
    limit = abs(float(differences.sum())) - ROUNDING * float(sizes.sum())
    if len(sizes) < 63 and 2 ** len(sizes) <= samples:
        return float(np.mean(np.abs(_all_sums(sizes)) >= limit))
    as_large = np.count_nonzero(np.abs(_drawn_sums(sizes, samples, seed)) >= limit)
    return float(1 + as_large) / (1 + samples)


def holm(p_values: npt.ArrayLike) -> Floats:
    """Return Holm-corrected p values, [tests] in and out (Holm 1979).

    The smallest is multiplied by the number of tests, the next by one less, and so on. None is
    smaller than one before it, or larger than 1.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return corrected


def mean_interval(values: npt.ArrayLike, confidence: float) -> tuple[float, float, float]:
    """Return the mean of a few runs and its bounds by Student's t; the bounds of one run are NaN.

    Args:
        values: [runs].
        confidence: Coverage, such as 0.95.
    """
    runs = np.asarray(values, dtype=np.float64)
    mean = float(runs.mean())
    if len(runs) < 2:
        return mean, float("nan"), float("nan")
    quantile = float(stdtrit(len(runs) - 1, (1 + confidence) / 2))
    margin = quantile * float(runs.std(ddof=1)) / len(runs) ** 0.5
    return mean, mean - margin, mean + margin


def _all_sums(sizes: Floats) -> Floats:
    """Return the sum under every pattern of signs, [2 ** sizes]."""
    patterns = np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes)) & 1
    sums: Floats = (2.0 * patterns - 1) @ sizes
    return sums


def _drawn_sums(sizes: Floats, samples: int, seed: int) -> Floats:
    """Return the sum under random signs, [samples].

    Of ``c`` equal sizes, the number with a positive sign is binomial(c, 1/2). A metric of ranks has
    few different values, so few numbers are drawn.
    """
    values, counts = np.unique(sizes.round(12), return_counts=True)
    generator = np.random.default_rng(seed)
    sums, step = np.empty(samples), max(1, MAX_DRAWS // len(values))
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        positive = generator.binomial(counts, 0.5, size=(rows, len(values)))
        sums[start : start + rows] = (2 * positive - counts) @ values
    return sums
