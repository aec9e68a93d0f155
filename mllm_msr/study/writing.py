"""A study's results as they are read: a Markdown table with its notes, CSV, and a figure."""

import csv
import io
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mllm_msr.comparisons import SAMPLES, Difference, show_difference
from mllm_msr.evaluation import MODEL, POCKET_NOTE, format_markdown
from mllm_msr.figures import Estimate, Mark, draw_rows, draw_sweep, save_figure
from mllm_msr.files import written_whole
from mllm_msr.study.plans import look_up
from mllm_msr.study.published import SOURCES, find_published
from mllm_msr.study.results import MEAN, Results, Row

CHOSEN = ("history", "target")  # settings of filter_sequences
LEVEL = 0.05  # of the tests on popularity
IN_SWEEP = {"popularity", "chance", "oracle"}  # in the table; a figure of theirs would be no curve


def write_results(results: Results, params: Mapping[str, Any], commit: str, folder: Path) -> None:
    """Write a study's ``table.md``, ``table.csv``, ``figure.svg`` and ``figure.png``, all or none.

    Args:
        results: What the study found.
        params: Settings of the workspace.
        commit: From which the experiments start.
        folder: To write; one that is there is replaced.

    Raises:
        DataError: The disk is full.
    """
    with written_whole(folder) as temporary:
        temporary.mkdir()
        text = format_results(results, params, commit)
        (temporary / "table.md").write_text(text, encoding="utf-8")
        (temporary / "table.csv").write_text(_format_csv(results), encoding="utf-8")
        save_figure(_draw(results, params), temporary)


def format_results(results: Results, params: Mapping[str, Any], commit: str) -> str:
    """Lay out a study's results as a Markdown table and its notes."""
    rows, tested = results.rows, results.reference is not None
    placed = any(row.over_popularity for row in rows)
    metrics, grouped = list(rows[0].figures), any(row.group for row in rows)
    head = [*(["group"] if grouped else []), results.study.varied, *map(str.upper, metrics)]
    head += ["difference in AUC", "p"] if tested else []
    lines = [[*head, *(["AUC over popularity", "p"] if placed else [])]]
    for row in rows:
        cells = [*([row.group] if grouped else []), row.label]
        cells += [_show(row.figures[metric]) for metric in metrics]
        cells += _show_test(row.difference) if tested else []
        lines.append([*cells, *(_show_test(row.over_popularity) if placed else [])])
    notes = _notes(results, params, commit)
    return "\n".join([results.study.about, "", format_markdown(lines), "", *notes, ""])


def format_comparison(
    names: tuple[str, str], compared: Mapping[str, tuple[float, float, Difference]], sequences: int
) -> str:
    """Lay out the comparison of two revisions as a Markdown table and its note."""
    lines = [[MODEL, *names, "difference", "p"]]
    for metric, (ours, other, difference) in compared.items():
        cells = [f"{ours:.3f}", f"{other:.3f}", *show_difference(difference)]
        lines.append([metric.upper(), *cells])
    note = (
        f"{sequences:,} test sequences; in brackets 95% paired bootstrap intervals;"
        f" p of paired randomisation tests with {SAMPLES:,} sign patterns, two-sided, not corrected"
    )
    return "\n".join([format_markdown(lines), "", note])


def _show(figure: Estimate | Difference) -> str:
    interval = f" [{figure.low:.3f}, {figure.high:.3f}]" if not isnan(figure.low) else ""
    return f"{figure.value:.3f}{interval}"


def _show_test(difference: Difference | None) -> list[str]:
    return show_difference(difference) if difference else ["", ""]


def _notes(results: Results, params: Mapping[str, Any], commit: str) -> list[str]:
    """Say what the figures are, of how much, and of what they are no proof."""
    metrics = results.rows[0].experiment.metrics
    sequences, share = metrics["test"]["sequences"], f"{metrics['confidence']:.0%}"
    notes = [
        f"{sequences:,} test sequences; in brackets: {share} bootstrap intervals over sequences"
    ]
    if any(row.key == MEAN for row in results.rows):
        notes[0] += "; those of the mean: Student's t over runs on the same"
        notes[0] += " sequences: how far the seed moves them, not how far other sequences would"
    if results.reference:
        tests = sum(row.difference is not None for row in results.rows)
        notes.append(
            f"difference in AUC to {results.reference.label}, {share} paired bootstrap interval;"
            f" p: two-sided paired randomisation test over sequences, Holm-corrected for {tests}"
        )
    notes += _note_popularity(results.rows, share)
    if results.best:
        best, other, difference = results.best
        shown, p = show_difference(difference)
        notes.append(
            f"best row and best other row by these same figures (no oracle): {best.label} and"
            f" {other.label}, difference in AUC {shown}, p {p}, not corrected for the choice"
        )
        if "popular" in (look_up(params, f"filter_sequences.{key}") for key in CHOSEN):
            notes.append(
                "histories or targets are chosen by popularity: baselines learned from whole logs,"
                " MLLM-MSR from sequences chosen alike"
            )
    notes.append(f"commit {commit}; table.csv names each row's experiment (dvc exp show)")
    return [f"- {note}" for note in [*notes, *_pocket(params)]]


def _note_popularity(rows: Sequence[Row], share: str) -> list[str]:
    """Say which rows are not shown to be above popularity, of those that were tested on it."""
    tested = {row.label: each for row in rows if (each := row.over_popularity)}
    below = [label for label, each in tested.items() if each.low <= 0 or each.p >= LEVEL]
    note = (
        f"AUC over popularity: difference in AUC to popularity, {share} interval and p likewise, of"
        f" the personalised rows, Holm-corrected for {len(tested)}; not shown to be above it"
        f" (p < {LEVEL}): {', '.join(below) or 'none'}"
    )
    return [note] if tested else []


def _pocket(params: Mapping[str, Any]) -> list[str]:
    return [POCKET_NOTE] if look_up(params, "preprocess.source") == "pocket" else []


def _format_csv(results: Results) -> str:
    metrics = list(results.rows[0].figures)
    bounds = [f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high")]
    tests, ends = ("auc_difference", "auc_over_popularity"), ("", "_low", "_high", "_p_holm")
    differences = [f"{test}{end}" for test in tests for end in ends]
    head = ["group", "key", "label", *bounds, *differences, "sequences", "experiment", "revision"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in results.rows:
        figures = [_number(each) for metric in metrics for each in row.figures[metric]]
        found = row.difference, row.over_popularity
        tested = [_number(each) for test in found for each in test or [float("nan")] * len(ends)]
        sequences = row.experiment.metrics["test"]["sequences"]
        origin = [row.experiment.name, row.experiment.revision] if row.key != MEAN else ["", ""]
        cells = [row.group, row.key, row.label, *figures, *tested, sequences, *origin]
        writer.writerow(cells)
    return text.getvalue()


def _number(value: float) -> str:
    return "" if isnan(value) else f"{value:.6f}"


def _draw(results: Results, params: Mapping[str, Any]) -> Figure:
    study, metrics = results.study, list(results.rows[0].figures)
    rows = [row for row in results.rows if study.kind != "sweep" or row.key not in IN_SWEEP]
    marks = [_mark(row, results, params) for row in rows]
    sequences = f"{rows[0].experiment.metrics['test']['sequences']:,} test sequences"
    share = f"bars: {rows[0].experiment.metrics['confidence']:.0%} intervals"
    note, published = "; ".join([sequences, share, *_pocket(params)]), SOURCES.get(study.name, "")
    if study.kind == "sweep":
        return draw_sweep(marks, metrics, varied=study.varied, note=note, published=published)
    return draw_rows(marks, metrics, note=note, published=published, chance="chance")


def _mark(row: Row, results: Results, params: Mapping[str, Any]) -> Mark:
    known = find_published(results.study.name, row.key, params)
    filled = row.key == MEAN or (results.reference is not None and row.key == results.reference.key)
    known = {metric: value for metric, value in known.items() if metric in row.figures}
    return Mark(row.label, row.figures, row.group, known, filled)
