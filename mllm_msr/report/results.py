"""The main table of every scorer that was measured, and its charts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from mllm_msr.evaluation import BASELINES, MODEL, read_metrics
from mllm_msr.report.charts import Bin, Estimate, draw_histograms, draw_intervals, draw_lines
from mllm_msr.report.inputs import Inputs, read_csv
from mllm_msr.report.settings import Settings

BOUNDS = ("oracle", "chance")
RIVALS = 3  # whose curves are drawn


class Row(NamedTuple):
    """A scorer's figures; None where a metric was not measured."""

    name: str
    cells: list[Estimate | None]
    sequences: int


class Curve(NamedTuple):
    """A metric over the cut-off k; its chart leaves scorers out, its figures do not."""

    metric: str  # such as HR
    chart: Markup
    ks: list[str]
    figures: dict[str, list[str]]  # scorer -> one figure per k


@dataclass(frozen=True)
class Results:
    """What the section shows.

    Attributes:
        metrics: Names of the columns.
        rows: Scorers on the test sequences, the model first if it was run.
        model: The model's row; None in a run without a recommender.
        valid: The model on the validation sequences, if measured.
        chart: AUC of all rows.
        curves: HR and NDCG at k.
        histogram: p(yes) by label.
    """

    metrics: list[str]
    rows: list[Row]
    model: Row | None
    valid: Row | None
    chart: Markup
    curves: list[Curve]
    histogram: Markup


def describe_results(inputs: Inputs, settings: Settings) -> Results:
    """Read the metrics and draw their charts.

    Every section of the metrics that has an AUC is a scorer.

    Raises:
        DataError: A file of ``evaluate`` is missing.
    """
    measured = read_metrics(inputs.evaluated / "metrics.json")
    names = ["auc", *(f"{metric}@{settings.k}" for metric in ("hr", "ndcg", "mrr"))]
    sections = {k: v for k, v in measured.items() if isinstance(v, dict) and "auc" in v}
    valid = sections.pop("valid", None)
    model = sections.pop("test", None)
    scorers = {BASELINES.get(k, k): v for k, v in sections.items()}
    scorers = ({MODEL: model} if model else {}) | scorers
    leads = 1 if model else 0
    rows = [_make_row(name, figures, names) for name, figures in scorers.items()]
    aucs = [row.cells[0] for row in rows if row.cells[0]]
    plots = inputs.evaluated / "plots"
    points = read_csv(plots / "metrics_at_k.csv")
    drawn = _choose_drawn(scorers)
    return Results(
        metrics=[name.upper() for name in names],
        rows=rows,
        model=rows[0] if model else None,
        valid=_make_row(f"{MODEL}, validation", valid, names) if valid else None,
        chart=draw_intervals("AUC of each scorer with its interval", aucs, 0.5, leads=leads),
        curves=[_make_curve(points, metric, drawn) for metric in ("hr", "ndcg")],
        histogram=_draw_probabilities(read_csv(plots / "probabilities.csv")),
    )


def make_estimate(name: str, figures: Mapping[str, Any], metric: str) -> Estimate | None:
    """Take a metric and its interval from a section of the metrics; None where it has none."""
    if metric not in figures:
        return None
    value = figures[metric]
    low, high = (figures.get(f"{metric}_{end}", value) for end in ("low", "high"))
    return Estimate(name, value, low, high)


def _make_row(name: str, figures: Mapping[str, Any], metrics: list[str]) -> Row:
    cells = [make_estimate(name, figures, metric) for metric in metrics]
    return Row(name, cells, figures["sequences"])


def _choose_drawn(scorers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Choose whose curves can be told apart: the model, its bounds, and the best of the others."""
    others = [name for name in scorers if name not in {MODEL, *BOUNDS}]
    best = sorted(others, key=lambda name: -scorers[name]["auc"])[:RIVALS]
    return [name for name in scorers if name in {MODEL, *BOUNDS, *best}]


def _make_curve(points: list[dict[str, str]], metric: str, drawn: list[str]) -> Curve:
    """Draw a metric over k, a line per chosen scorer, and keep all figures for a table."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        place = (float(point["k"]), float(point[metric]))
        name = BASELINES.get(point["scorer"], point["scorer"])
        lines.setdefault(name, []).append(place)
    return Curve(
        metric=metric.upper(),
        chart=draw_lines(
            f"{metric.upper()}@k over k",
            {name: lines[name] for name in drawn if name in lines},
            "k",
        ),
        ks=[f"{k:g}" for k, _ in next(iter(lines.values()))],
        figures={name: [f"{value:.3f}" for _, value in line] for name, line in lines.items()},
    )


def _draw_probabilities(rows: list[dict[str, str]]) -> Markup:
    histograms = {
        f"{label}s": [
            Bin(*(float(row[column]) for column in ("p_yes", "p_yes_end", "share")))
            for row in rows
            if row["label"] == label
        ]
        for label in ("target", "negative")
    }
    if not rows:
        return Markup()
    return draw_histograms("Share of p(yes), targets and negatives apart", histograms, "p(yes)")
