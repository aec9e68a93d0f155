"""The results of every scorer: a table for each sampling of negatives, and charts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from markupsafe import Markup

from mllm_msr.evaluation.comparisons import LEVEL, Comparison, Difference
from mllm_msr.evaluation.evaluation import Metrics
from mllm_msr.evaluation.metrics import Metric, metric_title, metrics_with_cutoff
from mllm_msr.evaluation.results import samplings_of, shown_metrics
from mllm_msr.evaluation.scorers import MODEL, NON_PERSONAL, label_of, section_of
from mllm_msr.evaluation.strata import shown_strata
from mllm_msr.evaluation.table import describe_failures, format_difference
from mllm_msr.report.charts import Bin, Estimate, draw_histograms, draw_intervals, draw_lines
from mllm_msr.report.inputs import Inputs, read_csv
from mllm_msr.report.settings import CANDIDATES

BOUNDS = ("oracle", "chance")
DRAWN = 3  # scorers whose curves are drawn, in addition to the model and the bounds
CHANCE = 0.5  # AUC of equal scores

Scorers = Mapping[str, Mapping[str, Any]]  # figures by scorer
Records = list[dict[str, str]]  # rows of a CSV file
Standing = Literal["above", "not shown to differ from", "below"]


class Row(NamedTuple):
    """A scorer's figures; None if a metric was not measured."""

    name: str
    cells: list[Estimate | None]
    sequences: int
    lead: bool = False  # whether it is the model


class Tested(NamedTuple):
    """A scorer's difference in AUC to one that does not know the user."""

    difference: str  # with its interval
    p: str
    standing: Standing


class TestedRow(NamedTuple):
    """A scorer's tests; None if a pair was not tested."""

    name: str
    cells: list[Tested | None]
    lead: bool


class StrataRow(NamedTuple):
    """A scorer's AUC by stratum; None where a stratum has no sequence."""

    name: str
    cells: list[Estimate | None]
    lead: bool


class StrataTable(NamedTuple):
    """AUC by the stratum of the target under one sampling of negatives."""

    title: str  # the sampling in words
    columns: list[str]  # strata with their numbers of sequences
    rows: list[StrataRow]


class Curve(NamedTuple):
    """A metric over the cut-off k: a chart of some scorers, and the figures of all."""

    metric: str  # its label, such as HR
    about: str  # what it measures
    chart: Markup
    ks: list[str]
    figures: dict[str, list[str]]  # scorer -> one figure per k


@dataclass(frozen=True)
class Protocol:
    """The results of one sampling of negatives.

    Attributes:
        sampling: Its name in the settings.
        title: Its name in words.
        rows: Scorers on the test sequences by AUC, highest first; bounds last.
        valid: The model on the validation sequences, if measured.
        non_personal: Scorers that do not know the user, the columns of ``tests``.
        tests: Of the scorers that know the user, in the order of ``rows``.
        failures: Scorers that are not significantly above the columns.
        chart: AUC of all rows.
        curves: Each metric with a cut-off, over k.
        histogram: p(yes) by label, where a model was scored.
    """

    sampling: str
    title: str
    rows: list[Row]
    valid: Row | None
    non_personal: list[str]
    tests: list[TestedRow]
    failures: str
    chart: Markup
    curves: list[Curve]
    histogram: Markup | None


@dataclass(frozen=True)
class Results:
    """The section of the report.

    Attributes:
        metrics: Names of the tables' columns.
        protocols: The samplings, in the order of tables.
    """

    metrics: list[str]
    protocols: list[Protocol]

    @property
    def scored(self) -> bool:
        """Whether a model was scored."""
        return any(row.lead for row in self.protocols[0].rows)


def describe_results(
    inputs: Inputs, metrics: Metrics, comparisons: Sequence[Comparison]
) -> Results:
    """Lay out the metrics and draw their charts.

    Every section of a sampling that has an AUC is a scorer.

    Args:
        inputs: Where the plots are.
        metrics: From :func:`mllm_msr.evaluation.results.read_metrics`.
        comparisons: Of the scorers that know the user with those that do not.

    Raises:
        DataError: A file of ``evaluate`` is missing.
    """
    plots = inputs.evaluated / "plots"
    points, shares = (read_csv(plots / f"{n}.csv") for n in ("metrics_at_k", "probabilities"))
    names = shown_metrics(metrics)
    samplings = samplings_of(metrics)
    extent = [
        figures[end]
        for sampling in samplings
        for figures in scorers_of(metrics[sampling]).values()
        for end in ("auc_low", "auc_high")
        if end in figures
    ]
    protocols = [
        _describe_protocol(
            sampling,
            metrics[sampling],
            names,
            [each for each in comparisons if each.sampling == sampling],
            [point for point in points if point["sampling"] == sampling],
            [share for share in shares if share["sampling"] == sampling],
            extent,
        )
        for sampling in samplings
    ]
    return Results([metric_title(name) for name in names], protocols)


def describe_strata(metrics: Metrics) -> list[StrataTable]:
    """Lay out AUC by the stratum of the target, for samplings with enough sequences of two strata.

    Args:
        metrics: From :func:`mllm_msr.evaluation.results.read_metrics`.
    """
    tables = []
    for sampling in samplings_of(metrics):
        if not (strata := shown_strata(metrics, sampling)):
            continue
        found = metrics["strata"][sampling]
        rows = [
            StrataRow(
                label_of(name),
                [make_estimate(name, found[section_of(name)].get(s, {}), "auc") for s in strata],
                name == MODEL,
            )
            for name in scorers_of(metrics[sampling])
        ]
        columns = [f"{stratum} ({count:,})" for stratum, count in strata.items()]
        tables.append(StrataTable(CANDIDATES[sampling], columns, rows))
    return tables


def scorers_of(sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the test figures of every scorer of a sampling, best AUC first, bounds last."""
    found = {
        MODEL if name == "test" else name: figures
        for name, figures in sections.items()
        if name != "valid" and isinstance(figures, dict) and "auc" in figures
    }
    order = sorted(found, key=lambda name: (name in BOUNDS, -found[name]["auc"]))
    return {name: found[name] for name in order}


def judge(difference: Difference) -> Standing:
    """Return what a test shows of a scorer and another."""
    if difference.p < LEVEL and difference.low > 0:
        return "above"
    return "below" if difference.p < LEVEL and difference.high < 0 else "not shown to differ from"


def make_estimate(name: str, figures: Mapping[str, Any], metric: str) -> Estimate | None:
    """Return a metric and its interval from a section of the metrics; None if it has none."""
    if metric not in figures:
        return None
    value = figures[metric]
    low, high = (figures.get(f"{metric}_{end}", value) for end in ("low", "high"))
    return Estimate(name, value, low, high)


def _describe_protocol(
    sampling: str,
    sections: Mapping[str, Any],
    names: Sequence[str],
    comparisons: Sequence[Comparison],
    points: Records,
    shares: Records,
    extent: Sequence[float],
) -> Protocol:
    """Lay out one sampling.

    Args:
        sampling: Its name.
        sections: Its metrics.
        names: The metrics shown.
        comparisons: Its tests.
        points: Its rows of ``metrics_at_k.csv``.
        shares: Its rows of ``probabilities.csv``.
        extent: Values that the axis of the chart of AUC covers, the same for all samplings.
    """
    scorers = scorers_of(sections)
    rows = [
        _make_row(label_of(name), figures, names, name == MODEL)
        for name, figures in scorers.items()
    ]
    title, valid = CANDIDATES[sampling], sections.get("valid")
    compared = {each.baseline for each in comparisons}
    baselines = [name for name in NON_PERSONAL if name in compared]
    return Protocol(
        sampling=sampling,
        title=title,
        rows=rows,
        valid=_make_row(f"{MODEL}, validation", valid, names) if valid else None,
        non_personal=[label_of(name) for name in baselines],
        tests=_list_tests(scorers, baselines, comparisons),
        failures=describe_failures(comparisons, sampling),
        chart=draw_intervals(
            f"AUC of each scorer with its interval, {title}",
            [cell for row in rows if (cell := row.cells[0])],
            CHANCE,
            leads={MODEL},
            extent=extent,
        ),
        curves=[_make_curve(points, metric, scorers, title) for metric in metrics_with_cutoff()],
        histogram=_draw_probabilities(shares, title) if shares else None,
    )


def _make_row(
    name: str, figures: Mapping[str, Any], metrics: Sequence[str], lead: bool = False
) -> Row:
    cells = [make_estimate(name, figures, metric) for metric in metrics]
    return Row(name, cells, figures["sequences"], lead)


def _list_tests(
    scorers: Scorers, baselines: Sequence[str], comparisons: Sequence[Comparison]
) -> list[TestedRow]:
    """Lay out the comparisons, a row for each scorer in the order given."""
    cells = {}
    for each in comparisons:
        difference, p = format_difference(each.difference)
        cells[each.scorer, each.baseline] = Tested(difference, p, judge(each.difference))
    tested = [name for name in scorers if any(each.scorer == name for each in comparisons)]
    return [
        TestedRow(
            label_of(name),
            [cells.get((name, baseline)) for baseline in baselines],
            name == MODEL,
        )
        for name in tested
    ]


def _choose_drawn(scorers: Scorers) -> list[str]:
    """Choose few enough scorers for a chart: the model, the bounds, and the best of the others."""
    best = [name for name in scorers if name not in {MODEL, *BOUNDS}][:DRAWN]
    return [name for name in (MODEL, *best, *BOUNDS) if name in scorers]


def _make_curve(points: Records, metric: Metric, scorers: Scorers, title: str) -> Curve:
    """Draw a metric over k, a line per chosen scorer, and keep all figures for a table."""
    found: dict[str, list[tuple[float, float]]] = {}  # scorer -> points (k, value)
    for point in points:
        values = (float(point["k"]), float(point[metric.name]))
        found.setdefault(point["scorer"], []).append(values)
    lines = {name: found[name] for name in scorers if name in found}
    drawn = [name for name in _choose_drawn(scorers) if name in lines]
    return Curve(
        metric=metric.label,
        about=metric.about,
        chart=draw_lines(
            f"{metric.label}@k over k, {title}",
            {label_of(name): lines[name] for name in drawn},
            "k",
        ),
        ks=[f"{k:g}" for k, _ in next(iter(lines.values()))],
        figures={
            label_of(name): [f"{value:.3f}" for _, value in line] for name, line in lines.items()
        },
    )


def _draw_probabilities(rows: Records, title: str) -> Markup:
    histograms = {
        f"{label}s": [
            Bin(*(float(row[column]) for column in ("p_yes", "p_yes_end", "share")))
            for row in rows
            if row["label"] == label
        ]
        for label in ("target", "negative")
    }
    label = f"Distribution of p(yes) of targets and of negatives, {title}"
    return draw_histograms(label, histograms, "p(yes)")
