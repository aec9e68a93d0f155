"""Coverage and popularity bias of the items that are ranked first."""

from typing import NamedTuple

import duckdb
import numpy as np

from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.evaluation.metrics import bootstrap_interval
from mllm_msr.evaluation.scorers import MODEL
from mllm_msr.report.charts import Estimate
from mllm_msr.report.settings import Settings

# Queries of (sequence, item, weight); the weights of a sequence sum to 1. Items that are tied for
# rank 1 share the weight.
FIRST = """
    SELECT sequence, item, 1 / count(*) OVER (PARTITION BY sequence) AS weight FROM
    (SELECT *, rank() OVER (PARTITION BY sequence ORDER BY {score} DESC) AS candidate_rank
    FROM {table})
    WHERE candidate_rank = 1
"""
BY_MODEL = f"Ranked first by {MODEL}"
CHOICES = {
    BY_MODEL: FIRST.format(score="log_odds", table="candidates JOIN scores USING (sequence, item)"),
    "Ranked first by popularity": FIRST.format(
        score="interactions", table="candidates JOIN popularity USING (item)"
    ),
    "Targets": "SELECT sequence, item, 1 AS weight FROM candidates WHERE label",
    "All candidates": "SELECT sequence, item, 1 / count(*) OVER (PARTITION BY sequence) AS weight"
    " FROM candidates",
}


class Coverage(NamedTuple):
    """Coverage and popularity of the items that one rule chooses from the test candidates."""

    name: str
    items: int  # chosen at least once
    share: float  # of the catalogue
    percentile: Estimate  # mean popularity percentile, 0..100, over sequences
    gini: float  # of how often each item of the catalogue is chosen


def describe_coverage(
    connection: duckdb.DuckDBPyConnection, settings: Settings, scored: bool
) -> list[Coverage]:
    """Describe the items that are ranked first, the targets and all candidates.

    Args:
        connection: From :func:`mllm_msr.report.inputs.open_tables`.
        settings: Settings of the intervals.
        scored: Whether there are scores of the model.
    """
    catalogue = connection.execute("FROM popularity ORDER BY item").fetchnumpy()
    percentiles = rank_percentiles(catalogue["interactions"])
    numbered = "(SELECT item, row_number() OVER (ORDER BY item) - 1 AS number FROM popularity)"
    found = []
    for name, query in CHOICES.items():
        if name == BY_MODEL and not scored:
            continue
        chosen = connection.execute(
            f"SELECT sequence, number, weight FROM ({query}) JOIN {numbered} USING (item)"
            " ORDER BY sequence, number"
        ).fetchnumpy()
        if not len(chosen["sequence"]):  # no scores of the model
            continue
        weights = chosen["weight"].astype(np.float64)
        taken = _sum_by(chosen["number"], weights, len(percentiles))
        sequence = np.unique(chosen["sequence"], return_inverse=True)[1]
        means = _sum_by(sequence, weights * percentiles[chosen["number"]])
        used = int((taken > 0).sum())
        share = used / len(taken)
        found.append(Coverage(name, used, share, _estimate(name, means, settings), gini(taken)))
    return found


def rank_percentiles(counts: Integers) -> Floats:
    """Return each count's percentile, 0 the least and 100 the greatest.

    Equal counts have the mean of their percentiles; a single count has 50.
    """
    if len(counts) == 1:
        return np.array([50.0])
    ordered = np.sort(counts)
    below = np.searchsorted(ordered, counts, "left")
    until = np.searchsorted(ordered, counts, "right") - 1
    percentiles: Floats = 100 * (below + until) / 2 / (len(counts) - 1)
    return percentiles


def gini(amounts: Floats) -> float:
    """Return the Gini coefficient, 0 if all amounts are equal, near 1 if one has everything.

    With amounts ascending, ``G = 2 sum(i x_i) / (n sum(x)) - (n + 1) / n`` (Damgaard and Weiner,
    Ecology 2000, 81(4):1139-1142).
    """
    ordered, count = np.sort(amounts), len(amounts)
    ranked = np.arange(1, count + 1) @ ordered
    return float(2 * ranked / (count * ordered.sum()) - (count + 1) / count)


def _sum_by(numbers: Integers, amounts: Floats, length: int = 0) -> Floats:
    """Sum amounts by their number, for 0 .. at least ``length`` - 1."""
    return np.bincount(numbers, amounts, length).astype(np.float64)


def _estimate(name: str, values: Floats, settings: Settings) -> Estimate:
    evaluate = settings.evaluate
    low, high = bootstrap_interval(
        values[:, None], evaluate.bootstrap_samples, evaluate.confidence, evaluate.seed
    )
    return Estimate(name, float(values.mean()), float(low[0]), float(high[0]))
