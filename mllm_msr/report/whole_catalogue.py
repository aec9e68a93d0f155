"""The whole catalogue: what a retriever proposes, what the model makes of it, and baselines."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from mllm_msr.evaluation.comparisons import LEVEL, Difference
from mllm_msr.evaluation.evaluation import Metrics
from mllm_msr.evaluation.full_catalogue import DEPTH, FUSION, RERANKED
from mllm_msr.evaluation.metrics import metric_title
from mllm_msr.evaluation.scorers import MODEL, label_of
from mllm_msr.evaluation.table import (
    LIST_METRICS,
    LIST_PROPERTIES,
    format_difference,
    label_of_list,
)
from mllm_msr.report.charts import Estimate, draw_lines

TESTED = f"ndcg@{DEPTH}"


class ListRow(NamedTuple):
    """The figures of a row's lists."""

    name: str
    cells: list[Estimate]
    properties: list[str]  # of the first items, formatted
    lead: bool  # whether the model has a part in it


class ListTest(NamedTuple):
    """The differences of a row to those of the model; None where it was not tested."""

    name: str
    cells: list[tuple[str, str, bool] | None]  # difference with interval, p, whether it is shown


class WholeCatalogue(NamedTuple):
    """The section of the report.

    Attributes:
        retriever: Its label.
        items: Of the catalogue.
        candidates: Items of each list.
        sequences: Of test.
        metrics: Names of the columns with figures.
        properties: Names of the columns with properties of the first items.
        depth: Number of those first items.
        rows: The retriever, the model's rows, and the baselines.
        sizes: By number of candidates the recall, and NDCG of the reranking if there is a model.
        chart: Both over the number of candidates.
        weight: Of the model in the fusion; None without a model.
        tested: Names of the model's rows, the columns of ``tests``.
        tests: Of the other rows.
    """

    retriever: str
    items: int
    candidates: int
    sequences: int
    metrics: list[str]
    properties: list[str]
    depth: int
    rows: list[ListRow]
    sizes: dict[str, list[Estimate]]
    chart: Markup
    weight: float | None
    tested: list[str]
    tests: list[ListTest]


def describe_whole_catalogue(metrics: Metrics) -> WholeCatalogue | None:
    """Lay out the section ``full_catalogue`` of the metrics; None where no retriever was run.

    Args:
        metrics: From :func:`mllm_msr.evaluation.results.read_metrics`.
    """
    section = metrics.get("full_catalogue")
    if section is None:
        return None
    sizes = {size: _measure_size(section, size) for size in section["recall"]}
    names = [f"recall of {label_of(section['retriever'])}", f"NDCG@{DEPTH}, reranked by {MODEL}"]
    lines = {
        name: [(float(size), cells[number].value) for size, cells in sizes.items()]
        for number, name in enumerate(names)
        if number == 0 or "weight" in section
    }
    ours = [name for name in (RERANKED, FUSION) if name in section["rows"]]
    return WholeCatalogue(
        retriever=label_of(section["retriever"]),
        items=section["items"],
        candidates=section["candidates"],
        sequences=section["sequences"],
        metrics=[metric_title(name) for name in LIST_METRICS],
        properties=[f"{name}@{DEPTH}" for name in LIST_PROPERTIES],
        depth=DEPTH,
        rows=[
            ListRow(
                label_of_list(name, section),
                [_estimate(figures, each) for each in LIST_METRICS],
                [f"{figures[f'{each}@{DEPTH}']:{form}}" for each, form in LIST_PROPERTIES.items()],
                lead=name in ours,
            )
            for name, figures in section["rows"].items()
        ],
        sizes=sizes,
        chart=draw_lines("Recall and NDCG over the number of candidates", lines, "candidates"),
        weight=section.get("weight"),
        tested=[label_of_list(name, section) for name in ours],
        tests=[
            ListTest(
                label_of_list(other, section),
                [_read_test(section["comparisons"][name].get(other)) for name in ours],
            )
            for other in section["rows"]
            if ours and other != FUSION
        ],
    )


def _measure_size(section: Mapping[str, Any], size: str) -> list[Estimate]:
    """Return the recall at a number of candidates, and the figure of reranking so many."""
    found = [_estimate(section["recall"][size], "recall")]
    if "by_candidates" in section:
        found.append(_estimate(section["by_candidates"][size], TESTED))
    return found


def _estimate(figures: Mapping[str, float], name: str) -> Estimate:
    return Estimate(name, *(figures[f"{name}{end}"] for end in ("", "_low", "_high")))


def _read_test(found: Mapping[str, float] | None) -> tuple[str, str, bool] | None:
    if found is None:
        return None
    difference = Difference(found["difference"], found["low"], found["high"], found["p"])
    shown, p = format_difference(difference)
    return shown, p, difference.p < LEVEL and difference.value > 0
