"""The files of the study of the whole catalogue: a table, a CSV table and a figure.

All figures are those of the section ``full_catalogue`` of each experiment's ``metrics.json``
(:mod:`mllm_msr.evaluation.full_catalogue`); an experiment is a retriever.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from mllm_msr.core.errors import DataError
from mllm_msr.core.files import atomic_write
from mllm_msr.evaluation.full_catalogue import DEPTH, FUSION, RERANKED, RETRIEVER
from mllm_msr.evaluation.table import (
    POCKET_NOTE,
    describe_fusion,
    format_lists,
    format_markdown,
    label_of_list,
    list_titles,
)
from mllm_msr.study.dvc_internals import Finished
from mllm_msr.study.figures import Estimate, Mark, draw_sweep, save_figure
from mllm_msr.study.plans import Study, Variant, look_up

SECTION = "full_catalogue"
OWN = (RETRIEVER, RERANKED, FUSION)  # rows of each experiment; others are the same in all


class Retrieval(NamedTuple):
    """An experiment: its retriever's label, and its section of the metrics."""

    label: str
    section: Mapping[str, Any]
    experiment: Finished
    confidence: float


def gather_retrievals(
    variants: Mapping[str, Variant], experiments: Mapping[str, Finished]
) -> list[Retrieval]:
    """Return the experiments in the study's order.

    Args:
        variants: By the names of their experiments.
        experiments: Finished experiments by name, those of all variants included.

    Raises:
        DataError: An experiment has no figures on the whole catalogue.
    """
    found = []
    for name, variant in variants.items():
        metrics = experiments[name].metrics
        if SECTION not in metrics:
            raise DataError(
                expected=f"metrics with the section {SECTION}",
                got=", ".join(metrics),
                where=name,
                fix=f"dvc exp remove {name}, then run the study again",
            )
        found.append(
            Retrieval(variant.label, metrics[SECTION], experiments[name], metrics["confidence"])
        )
    return found


def write_full_ranking(
    study: Study, found: list[Retrieval], params: Mapping[str, Any], commit: str, folder: Path
) -> None:
    """Write ``table.md``, ``table.csv``, ``figure.svg`` and ``figure.png``, all or none.

    Args:
        study: The study.
        found: Its experiments.
        params: Settings of the workspace.
        commit: From which the experiments start.
        folder: Folder to write; an existing one is replaced.

    Raises:
        DataError: The disk is full.
    """
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        text = format_full_ranking(study, found, params, commit)
        (temporary / "table.md").write_text(text, encoding="utf-8")
        (temporary / "table.csv").write_text(_format_csv(found), encoding="utf-8")
        save_figure(_draw(study, found, params), temporary)


def format_full_ranking(
    study: Study, found: list[Retrieval], params: Mapping[str, Any], commit: str
) -> str:
    """Lay out the rows of all retrievers and of the other baselines, and notes."""
    lines = [["row", "recall", *list_titles()]]
    for retrieval, name in _rows(found):
        section = retrieval.section
        size = section["candidates"]
        ceiling = f"{section['recall'][str(size)]['recall']:.3f} at {size}" if name in OWN else ""
        cells = format_lists(section["rows"][name])
        lines.append([label_of_list(name, section), ceiling, *cells])
    section, confidence = found[0].section, found[0].confidence
    notes = [
        f"{section['items']:,} items, less those that the user took before;"
        f" {section['sequences']:,} test sequences; a target that is not in a row's list is a miss",
        f"in brackets: {confidence:.0%} bootstrap intervals over sequences; those of the other"
        " figures are in table.csv",
        *(note for each in found for note in describe_fusion(each.section)),
        f"commit {commit}; table.csv names each row's experiment (dvc exp show)",
        *_pocket(params),
    ]
    shown = [f"- {note.strip()}" for note in notes]
    return "\n".join([study.about, "", format_markdown(lines), "", *shown, ""])


def _rows(found: list[Retrieval]) -> Iterator[tuple[Retrieval, str]]:
    """Yield the rows of each retriever, then each other baseline once."""
    for retrieval in found:
        yield from ((retrieval, name) for name in OWN if name in retrieval.section["rows"])
    retrievers = {each.section["retriever"] for each in found}
    for name in found[0].section["rows"]:
        if name not in (*OWN, *retrievers):
            yield found[0], name


def _format_csv(found: list[Retrieval]) -> str:
    """Return a line of CSV for each row: its retriever, label, figures and experiment."""
    text = io.StringIO()
    figures = list(found[0].section["rows"][RETRIEVER])
    head = ["retriever", "row", "label", "candidates", "recall", "weight", *figures]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, "sequences", "experiment", "revision"])
    for retrieval, name in _rows(found):
        section = retrieval.section
        size = section["candidates"]
        own = [section["retriever"], section["recall"][str(size)]["recall"]]
        retriever, recall = own if name in OWN else ["", ""]
        weight = section.get("weight", "") if name == FUSION else ""
        row = section["rows"][name]
        named = [retriever, name, label_of_list(name, section), size, recall, weight]
        origin = [section["sequences"], retrieval.experiment.name, retrieval.experiment.revision]
        writer.writerow([*named, *(row[figure] for figure in figures), *origin])
    return text.getvalue()


def _draw(study: Study, found: list[Retrieval], params: Mapping[str, Any]) -> Figure:
    """Draw recall and the figures of the reranking over the number of candidates."""
    key = f"ndcg@{DEPTH}"
    titles = ["recall of the retriever", f"NDCG@{DEPTH}, reranked"]
    marks = [
        Mark(
            size,
            {
                titles[0]: _estimate(section["recall"][size], "recall"),
                titles[1]: _estimate(section["by_candidates"][size], key),
            },
            label,
        )
        for label, section, *_ in sorted(found, key=lambda each: -each.section["candidates"])
        for size in section["recall"]
    ]
    note = "; ".join([f"bars: {found[0].confidence:.0%} intervals", *_pocket(params)])
    return draw_sweep(marks, titles, varied=study.varied, note=note, published="")


def _estimate(figures: Mapping[str, float], name: str) -> Estimate:
    return Estimate(*(figures[f"{name}{end}"] for end in ("", "_low", "_high")))


def _pocket(params: Mapping[str, Any]) -> list[str]:
    return [POCKET_NOTE] if look_up(params, "preprocess.source") == "pocket" else []
