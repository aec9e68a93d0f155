"""Whether two scorers differ: paired tests and intervals over the sequences that both ranked.

Both scorers rank the same candidates of the same sequences, so what is tested is each sequence's
difference. The test is Fisher's paired randomisation test, which assumes no distribution: were
the two scorers alike, each difference could as well have had the other sign (Fisher 1935; Smucker,
Allan and Carterette, CIKM 2007, for rankings).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from mllm_msr.metrics import Floats, bootstrap_interval

SAMPLES = 10_000  # resamples of a paired interval, sign patterns of a paired test
SEED = 2026
# Sums in another order differ by rounding; a sum this much smaller, relatively, is as large.
ROUNDING = 1e-9
DRAWS_AT_ONCE = 1 << 20  # numbers held in memory at once


class Difference(NamedTuple):
    """The mean difference between two scorers, its interval and its p value."""

    value: float
    low: float
    high: float
    p: float


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
        seed: Of the resamples and patterns.

    Returns:
        The mean of ``values - others``, its interval, and p of :func:`randomisation_test`.

    Raises:
        ValueError: The shapes differ, or there is no sequence.
    """
    if values.shape != others.shape or not values.size:
        raise ValueError("both scorers need a value for each of the same sequences")
    differences = values - others
    low, high = bootstrap_interval(differences[:, None], samples, confidence, seed)
    p = randomisation_test(differences, samples, seed)
    return Difference(float(differences.mean()), float(low[0]), float(high[0]), p)


def randomisation_test(differences: Floats, samples: int, seed: int) -> float:
    """Give the two-sided p value of the mean difference under random signs.

    Where there are no more sign patterns than ``samples``, all are counted and p is exact.
    Otherwise ``samples`` patterns are drawn, and the observed one counts as one more, so that p
    is never 0 and the test keeps its level: ``p = (1 + as large) / (1 + samples)`` (Davison and
    Hinkley 1997, ch. 4; Phipson and Smyth 2010).

    Args:
        differences: [sequences].
        samples: Sign patterns to draw.
        seed: Of the patterns.
    """
    sizes = np.abs(differences[differences != 0])  # a zero has no sign to change
    limit = abs(float(differences.sum())) - ROUNDING * float(sizes.sum())
    if len(sizes) < 63 and 2 ** len(sizes) <= samples:
        return float(np.mean(np.abs(_all_sums(sizes)) >= limit))
    as_large = np.count_nonzero(np.abs(_drawn_sums(sizes, samples, seed)) >= limit)
    return float(1 + as_large) / (1 + samples)


def holm(p_values: npt.ArrayLike) -> Floats:
    """Correct p values for their number, [tests] in and out (Holm 1979).

    The smallest is multiplied by the number of tests, the next by one less, and so on; none is
    smaller than one before it, or larger than 1.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return corrected


def correct(differences: Sequence[Difference]) -> list[Difference]:
    """Correct the p values of differences that make up one family, by :func:`holm`."""
    corrected = holm([each.p for each in differences])
    return [each._replace(p=float(p)) for each, p in zip(differences, corrected, strict=True)]


def show_difference(difference: Difference) -> list[str]:
    """Write a difference for a table: with its interval, such as ``+0.031 [+0.002, +0.060]``; p."""
    value, low, high, p = difference
    shown = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return [shown, "<0.001" if p < 0.001 else f"{p:.3f}"]


def mean_interval(values: npt.ArrayLike, confidence: float) -> tuple[float, float, float]:
    """Bound the mean of a few runs by Student's t: mean, low, high; no bounds (NaN) for one run.

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
    """Give the sum under every pattern of signs, [2 ** sizes]."""
    patterns = np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes)) & 1
    sums: Floats = (2.0 * patterns - 1) @ sizes
    return sums


def _drawn_sums(sizes: Floats, samples: int, seed: int) -> Floats:
    """Give the sum under random signs, [samples].

    Equal sizes are interchangeable: of ``c`` equal ones, the number that is positive is binomial
    (c, 1/2). A metric of ranks has few different values, so this draws little.
    """
    values, counts = np.unique(sizes.round(12), return_counts=True)
    generator = np.random.default_rng(seed)
    sums, step = np.empty(samples), max(1, DRAWS_AT_ONCE // len(values))
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        positive = generator.binomial(counts, 0.5, size=(rows, len(values)))
        sums[start : start + rows] = (2 * positive - counts) @ values
    return sums
