"""Score distributions and metrics: by label, history length and popularity of the items."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.evaluation.calibration import sigmoid
from mllm_msr.evaluation.metrics import metric_keys, metric_title, summarize
from mllm_msr.evaluation.scorers import MODEL
from mllm_msr.ranking import TargetRanks
from mllm_msr.report.charts import Estimate, draw_intervals
from mllm_msr.report.results import CHANCE, make_estimate
from mllm_msr.report.settings import Settings

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LABELS = (("Targets", True), ("Negatives", False))


class ScoreDistribution(NamedTuple):
    """p(yes) of the candidates of one label."""

    label: str
    candidates: int
    quantiles: list[float]  # at QUANTILES
    above_half: float  # share with p(yes) > 0.5


class Group(NamedTuple):
    """A group of test sequences, and the figures of the model on them."""

    name: str
    sequences: int
    cells: list[Estimate]
    target_median: float  # of p(yes)
    negative_median: float


@dataclass(frozen=True)
class Grouping:
    """Test sequences in groups by one property.

    Attributes:
        name: The property.
        metrics: Names of the cells' columns.
        groups: In ascending order of the property.
        chart: AUC of the groups.
    """

    name: str
    metrics: list[str]
    groups: list[Group]
    chart: Markup


class ItemGroup(NamedTuple):
    """p(yes) of a group of candidates by popularity: of targets and of negatives."""

    name: str
    targets: ScoreDistribution | None  # None if the group has none
    negatives: ScoreDistribution | None


@dataclass(frozen=True)
class Distributions:
    """What the section shows."""

    labels: list[ScoreDistribution]
    groupings: list[Grouping]
    items: list[ItemGroup]


@dataclass(frozen=True)
class _TestScores:
    """The model's test scores, and properties of each sequence.

    Attributes:
        sequences: [rows] Sequence of each candidate.
        labels: [rows] True for the target.
        p_yes: [rows]
        interactions: [rows] Popularity of the candidate.
        ranks: Ranks of the targets, by sequence in ascending order.
        lengths: [sequences] Items in the history.
        popularity: [sequences] Interactions of the target.
    """

    sequences: Integers
    labels: npt.NDArray[np.bool_]
    p_yes: Floats
    interactions: Integers
    ranks: TargetRanks
    lengths: Integers
    popularity: Integers


def describe_distributions(
    connection: duckdb.DuckDBPyConnection, settings: Settings
) -> Distributions:
    """Return the distributions of the test scores by label, and the metrics by group.

    Args:
        connection: From :func:`mllm_msr.report.inputs.open_tables`.
        settings: Number of groups and settings of the intervals.
    """
    scores = _read_scores(connection)
    labels = [describe_scores(name, scores.p_yes[scores.labels == label]) for name, label in LABELS]
    properties = {
        "Items in the history": scores.lengths,
        "Interactions of the target": scores.popularity,
    }
    groupings = [_group(name, values, scores, settings) for name, values in properties.items()]
    return Distributions(labels, groupings, _group_items(scores, settings))


def describe_scores(label: str, p_yes: Floats) -> ScoreDistribution:
    """Return count and quantiles of a label's p(yes)."""
    quantiles = [float(value) for value in np.quantile(p_yes, QUANTILES)]
    return ScoreDistribution(label, len(p_yes), quantiles, float((p_yes > 0.5).mean()))


def split_evenly(values: Integers, groups: int) -> Integers:
    """Assign values to groups of about equal size; equal values are in the same group.

    If there are no more distinct values than groups, each is a group of its own. Otherwise the
    middle of a value's ranks decides its group.

    Returns:
        [values] Number of each value's group, from 0 without gaps, ascending with the value.
    """
    distinct, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(distinct) <= groups:
        return number.astype(np.int64)
    middles = np.cumsum(counts) - counts / 2
    rough = np.floor(groups * middles / len(values)).astype(np.int64)
    return np.unique(rough, return_inverse=True)[1][number].astype(np.int64)


def _group(name: str, values: Integers, scores: _TestScores, settings: Settings) -> Grouping:
    numbers = split_evenly(values, settings.report.groups)
    groups = list(_measure_groups(values, numbers, scores, settings))
    aucs = [group.cells[0]._replace(name=f"{group.name} ({group.sequences:,})") for group in groups]
    leads = {each.name for each in aucs}
    chart = draw_intervals(f"AUC by {name.lower()}, with intervals", aucs, CHANCE, leads=leads)
    return Grouping(name, [metric_title(key) for key in metric_keys(settings.k)], groups, chart)


def _measure_groups(
    values: Integers, numbers: Integers, scores: _TestScores, settings: Settings
) -> Iterator[Group]:
    """Yield the groups with the figures of their sequences."""
    for number in range(numbers.max() + 1):
        chosen = numbers == number
        ranks = _choose(scores.ranks, chosen)
        figures = summarize(
            ranks,
            ks=[settings.k],
            samples=settings.evaluate.bootstrap_samples,
            confidence=settings.evaluate.confidence,
            seed=settings.evaluate.seed,
        )
        name = _name_range(values[chosen])
        cells = [make_estimate(name, figures, key) for key in metric_keys(settings.k)]
        inside = np.isin(scores.sequences, ranks.sequences)
        medians = [
            float(np.median(scores.p_yes[inside & (scores.labels == label)]))
            for label in (True, False)
        ]
        yield Group(name, int(chosen.sum()), [cell for cell in cells if cell], *medians)


def _group_items(scores: _TestScores, settings: Settings) -> list[ItemGroup]:
    """Return the distribution of p(yes) by popularity of the candidates."""
    numbers = split_evenly(scores.interactions, settings.report.groups)
    groups = []
    for number in range(numbers.max() + 1):
        chosen = numbers == number
        of_label = [scores.p_yes[chosen & (scores.labels == label)] for _, label in LABELS]
        distributions = [
            describe_scores(name, p_yes) if len(p_yes) else None
            for (name, _), p_yes in zip(LABELS, of_label, strict=True)
        ]
        groups.append(ItemGroup(_name_range(scores.interactions[chosen]), *distributions))
    return groups


def _choose(ranks: TargetRanks, chosen: npt.NDArray[np.bool_]) -> TargetRanks:
    return TargetRanks(
        ranks.sequences[chosen],
        ranks.candidates[chosen],
        ranks.above[chosen],
        ranks.tied[chosen],
    )


def _name_range(values: Integers) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _read_scores(connection: duckdb.DuckDBPyConnection) -> _TestScores:
    """Read the test scores and the sequences' properties."""
    scores = connection.execute(
        "SELECT sequence, label, log_odds, coalesce(interactions, 0) AS interactions"
        " FROM candidates JOIN scores USING (sequence, item) LEFT JOIN popularity USING (item)"
        " ORDER BY sequence, item"
    ).fetchnumpy()
    known = connection.execute(
        "SELECT sequence, candidates, above, tied, history_length, interactions"
        " FROM per_sequence JOIN sequences USING (sequence, split)"
        " JOIN popularity ON item = target"
        " WHERE scorer = ? AND split = 'test' ORDER BY sequence",
        [MODEL],
    ).fetchnumpy()
    return _TestScores(
        scores["sequence"],
        scores["label"],
        sigmoid(scores["log_odds"]),
        scores["interactions"],
        TargetRanks(*(known[name] for name in ("sequence", "candidates", "above", "tied"))),
        known["history_length"],
        known["interactions"],
    )
