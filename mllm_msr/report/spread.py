"""How scores and metrics spread: by label, by length of history, by popularity of the items."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from mllm_msr.evaluation.evaluation import MODEL
from mllm_msr.evaluation.metrics import summarize
from mllm_msr.ranking import Floats, Integers, Placements
from mllm_msr.report.charts import Estimate, draw_intervals
from mllm_msr.report.results import CHANCE, make_estimate
from mllm_msr.report.settings import Settings

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LABELS = (("Targets", True), ("Negatives", False))


class LabelSpread(NamedTuple):
    """p(yes) of the candidates of one label."""

    label: str
    candidates: int
    quantiles: list[float]  # at QUANTILES
    above_half: float  # share with p(yes) > 0.5


class Group(NamedTuple):
    """Test sequences that are alike, and how the model does on them."""

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
    """p(yes) of the candidates that are about as popular: of targets and of negatives."""

    name: str
    targets: LabelSpread | None  # None where there is none
    negatives: LabelSpread | None


@dataclass(frozen=True)
class Spread:
    """What the section shows."""

    labels: list[LabelSpread]
    groupings: list[Grouping]
    items: list[ItemGroup]


@dataclass(frozen=True)
class _Asked:
    """The model's test scores and what is known of each sequence.

    Attributes:
        sequences: [rows] Of each candidate.
        labels: [rows]
        p_yes: [rows]
        interactions: [rows] Of the candidate.
        placed: Of the sequences, ascending.
        lengths: [sequences] Of the histories.
        popularity: [sequences] Interactions of the target.
    """

    sequences: Integers
    labels: npt.NDArray[np.bool_]
    p_yes: Floats
    interactions: Integers
    placed: Placements
    lengths: Integers
    popularity: Integers


def describe_spread(connection: duckdb.DuckDBPyConnection, settings: Settings) -> Spread:
    """Describe the test scores by label, and the metrics by group.

    Args:
        connection: Comes from :func:`mllm_msr.report.inputs.open_tables`.
        settings: Tell the groups and how intervals are made.
    """
    asked = _read_asked(connection)
    labels = [describe_label(name, asked.p_yes[asked.labels == label]) for name, label in LABELS]
    properties = {
        "Items in the history": asked.lengths,
        "Interactions of the target": asked.popularity,
    }
    groupings = [_group(name, values, asked, settings) for name, values in properties.items()]
    return Spread(labels, groupings, _group_items(asked, settings))


def describe_label(label: str, p_yes: Floats) -> LabelSpread:
    """Give count and quantiles of a label's p(yes)."""
    quantiles = [float(value) for value in np.quantile(p_yes, QUANTILES)]
    return LabelSpread(label, len(p_yes), quantiles, float((p_yes > 0.5).mean()))


def split_evenly(values: Integers, groups: int) -> Integers:
    """Number the group of each value: about as many values in each, equal values never parted.

    Where there are no more distinct values than groups, each has a group of its own. Otherwise a
    value's group is told by the middle of its ranks.

    Returns:
        [values] Numbers from 0 on without gaps, ascending with the value.
    """
    distinct, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(distinct) <= groups:
        return number.astype(np.int64)
    middles = np.cumsum(counts) - counts / 2
    rough = np.floor(groups * middles / len(values)).astype(np.int64)
    return np.unique(rough, return_inverse=True)[1][number].astype(np.int64)


def _group(name: str, values: Integers, asked: _Asked, settings: Settings) -> Grouping:
    numbers = split_evenly(values, settings.report.groups)
    groups = list(_measure_groups(values, numbers, asked, settings))
    aucs = [group.cells[0]._replace(name=f"{group.name} ({group.sequences:,})") for group in groups]
    leads = {each.name for each in aucs}
    chart = draw_intervals(f"AUC by {name.lower()}, with intervals", aucs, CHANCE, leads=leads)
    return Grouping(name, [metric.upper() for metric in _metrics(settings)], groups, chart)


def _measure_groups(
    values: Integers, numbers: Integers, asked: _Asked, settings: Settings
) -> Iterator[Group]:
    """Measure the sequences of each group by themselves."""
    for number in range(numbers.max() + 1):
        chosen = numbers == number
        placed = _choose(asked.placed, chosen)
        figures = summarize(
            placed,
            ks=[settings.k],
            samples=settings.evaluate.bootstrap_samples,
            confidence=settings.evaluate.confidence,
            seed=settings.evaluate.seed,
        )
        name = _name_range(values[chosen])
        cells = [make_estimate(name, figures, metric) for metric in _metrics(settings)]
        inside = np.isin(asked.sequences, placed.sequences)
        medians = [
            float(np.median(asked.p_yes[inside & (asked.labels == label)]))
            for label in (True, False)
        ]
        yield Group(name, int(chosen.sum()), [cell for cell in cells if cell], *medians)


def _group_items(asked: _Asked, settings: Settings) -> list[ItemGroup]:
    """Describe p(yes) of candidates in groups by their own popularity."""
    numbers = split_evenly(asked.interactions, settings.report.groups)
    groups = []
    for number in range(numbers.max() + 1):
        chosen = numbers == number
        of_label = [asked.p_yes[chosen & (asked.labels == label)] for _, label in LABELS]
        spreads = [
            describe_label(name, p_yes) if len(p_yes) else None
            for (name, _), p_yes in zip(LABELS, of_label, strict=True)
        ]
        groups.append(ItemGroup(_name_range(asked.interactions[chosen]), *spreads))
    return groups


def _metrics(settings: Settings) -> Sequence[str]:
    return ("auc", f"hr@{settings.k}", f"ndcg@{settings.k}")


def _choose(placed: Placements, chosen: npt.NDArray[np.bool_]) -> Placements:
    return Placements(
        placed.sequences[chosen],
        placed.candidates[chosen],
        placed.above[chosen],
        placed.tied[chosen],
    )


def _name_range(values: Integers) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _read_asked(connection: duckdb.DuckDBPyConnection) -> _Asked:
    """Fetch the test scores and the sequences' properties."""
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
    return _Asked(
        scores["sequence"],
        scores["label"],
        (1 + np.tanh(scores["log_odds"] / 2)) / 2,
        scores["interactions"],
        Placements(*(known[name] for name in ("sequence", "candidates", "above", "tied"))),
        known["history_length"],
        known["interactions"],
    )
