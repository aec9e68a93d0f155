"""The files of a study's results: a Markdown table with notes, a CSV table, and a figure."""

import csv
import io
from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mllm_msr.core.files import atomic_write
from mllm_msr.evaluation.comparisons import LEVEL, SAMPLES, Difference
from mllm_msr.evaluation.metrics import metric_title
from mllm_msr.evaluation.scorers import MODEL, NON_PERSONAL, label_of
from mllm_msr.evaluation.table import (
    POCKET_NOTE,
    column_titles,
    describe_budget,
    describe_failures,
    describe_samplings,
    format_difference,
    format_markdown,
    format_strata,
)
from mllm_msr.study.figures import Estimate, Mark, draw_rows, draw_sweep, save_figure
from mllm_msr.study.plans import NO_SFT, look_up
from mllm_msr.study.published import SOURCES, find_published
from mllm_msr.study.results import MEAN, SIMPLE, Results, Row

CHOSEN = ("history", "target")  # settings of filter_sequences
PAPERS_SAMPLING = "uniform"  # of the figures that the paper is known for


def write_results(results: Results, params: Mapping[str, Any], commit: str, folder: Path) -> None:
    """Write a study's ``table.md``, ``table.csv``, ``figure.svg`` and ``figure.png``, all or none.

    Args:
        results: The results.
        params: Settings of the workspace.
        commit: From which the experiments start.
        folder: Folder to write; an existing one is replaced.

    Raises:
        DataError: The disk is full.
    """
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        text = format_results(results, params, commit)
        (temporary / "table.md").write_text(text, encoding="utf-8")
        (temporary / "table.csv").write_text(_format_csv(results), encoding="utf-8")
        save_figure(_draw(results, params), temporary)


def format_results(results: Results, params: Mapping[str, Any], commit: str) -> str:
    """Lay out a study's results as a Markdown table, the samplings side by side, and its notes."""
    grouped, tested = any(row.group for row in results.rows), results.reference is not None
    group = "scorer" if results.study.kind == "curves" else "group"
    head = [*([group] if grouped else []), results.study.varied]
    for sampling in results.sequences:
        head += column_titles(results.metrics, sampling)
        head += ["difference in AUC", "p"] if tested else []
    lines = [head]
    for row in results.rows:
        cells = [*([row.group] if grouped else []), row.label]
        for sampling in results.sequences:
            first, *others = (row.figures[sampling][metric] for metric in results.metrics)
            cells += [_show(first, results), *(f"{each.value:.3f}" for each in others)]
            cells += _show_test(row.differences.get(sampling)) if tested else []
        lines.append(cells)
    strata = format_strata(results.rows[0].experiment.metrics) if results.study.strata else ""
    notes = _notes(results, params, commit)
    table = [results.study.about, "", format_markdown(lines), ""]
    return "\n".join([*table, *([strata, ""] if strata else []), *notes, ""])


def format_comparison(
    names: tuple[str, str],
    compared: Mapping[str, Mapping[str, tuple[float, float, Difference]]],
    sequences: Mapping[str, int],
) -> str:
    """Lay out the comparison of two revisions as a Markdown table and its note.

    Args:
        names: Names of the revisions.
        compared: From :func:`mllm_msr.study.results.compare_rankings`.
        sequences: Number of test sequences of each sampling.
    """
    lines = [[MODEL, *names, "difference", "p"]]
    for sampling, metrics in compared.items():
        for metric, (ours, other, difference) in metrics.items():
            cells = [f"{ours:.3f}", f"{other:.3f}", *format_difference(difference)]
            lines.append([f"{metric_title(metric)}, {sampling}", *cells])
    note = (
        f"{describe_samplings(sequences)}; in brackets 95% paired bootstrap intervals;"
        f" p of paired randomisation tests with {SAMPLES:,} sign patterns, two-sided, not corrected"
    )
    return "\n".join([format_markdown(lines), "", note])


def _show(figure: Estimate, results: Results) -> str:
    """Format a figure with its interval or, of folds, with its standard deviation."""
    if results.study.kind == "folds":
        return f"{figure.value:.3f} ± {figure.high - figure.value:.3f}"
    interval = f" [{figure.low:.3f}, {figure.high:.3f}]" if not isnan(figure.low) else ""
    return f"{figure.value:.3f}{interval}"


def _show_test(difference: Difference | None) -> list[str]:
    return format_difference(difference) if difference else ["", ""]


def _notes(results: Results, params: Mapping[str, Any], commit: str) -> list[str]:
    """Return the notes below the table: what the figures are, and their limits."""
    intervals = (
        f"in brackets: {results.confidence:.0%} bootstrap intervals over sequences; those of the"
        " other figures are in table.csv"
    )
    if results.study.kind == "folds":
        intervals = (
            f"means over {len(results.study.variants)} folds, ± one standard deviation over the"
            " folds; in table.csv the bounds are one standard deviation from the mean; sequences"
            " and experiment are those of the first fold"
        )
    if any(row.key == MEAN for row in results.rows):
        intervals += "; those of the mean: Student's t over runs on the same"
        intervals += " sequences: how far the seed moves them, not how far other sequences would"
    notes = [
        describe_samplings(results.sequences),
        *_note_budget(results),
        intervals,
        *_note_reference(results),
        *_note_non_personal(results),
        *_note_best(results),
    ]
    if results.best and "popular" in (look_up(params, f"filter_sequences.{key}") for key in CHOSEN):
        notes.append(
            "histories or targets are chosen by popularity: baselines learned from whole logs,"
            " MLLM-MSR from sequences chosen alike"
        )
    notes.append(f"commit {commit}; table.csv names each row's experiment (dvc exp show)")
    return [f"- {note}" for note in [*notes, *_pocket(params)]]


def _note_budget(results: Results) -> list[str]:
    """Note how many sequences were used, or which points of a learning curve have all."""
    if results.study.kind != "curves":
        return describe_budget(results.rows[0].experiment.metrics)
    values = {variant.label for variant in results.study.variants if variant.settings != NO_SFT}
    all_used = {
        row.label
        for row in results.rows
        if row.label in values and "train" not in row.experiment.metrics.get("budget", {})
    }
    if not all_used:
        return []
    shown = ", ".join(sorted(all_used, key=int))
    return [f"there are no more training sequences than {shown}: all of them are used there"]


def _note_reference(results: Results) -> list[str]:
    """Note what the rows were tested against."""
    if results.reference is None:
        return []
    tests = sum(bool(row.differences) for row in results.rows)
    return [
        f"difference in AUC to {results.reference.label}, {results.confidence:.0%} paired bootstrap"
        " interval; p: two-sided paired randomisation test over sequences, Holm-corrected for"
        f" {tests} in each sampling"
    ]


def _note_non_personal(results: Results) -> list[str]:
    """Note which rows that know the user are not above those that do not."""
    compared = results.comparisons
    if not compared:
        return []
    baselines = [name for name in NON_PERSONAL if any(each.baseline == name for each in compared)]
    tests = len(compared) // len(results.sequences)
    return [
        "personalised rows against the non-personalised baselines"
        f" ({', '.join(label_of(name) for name in baselines)}): difference in AUC, interval"
        f" and p likewise in table.csv, Holm-corrected for {tests} in each sampling",
        *(
            f"not significantly above them (p < {LEVEL}), {sampling}:"
            f" {describe_failures(compared, sampling)}"
            for sampling in results.sequences
        ),
    ]


def _note_best(results: Results) -> list[str]:
    """Note the difference between the best two rows of each sampling."""
    notes = []
    for sampling, (best, other, difference) in results.best.items():
        shown, p = format_difference(difference)
        notes.append(
            f"best row and best other row by these same figures (no oracle), {sampling}:"
            f" {best.label} and {other.label}, difference in AUC {shown}, p {p}, not corrected for"
            " the choice"
        )
    return notes


def _pocket(params: Mapping[str, Any]) -> list[str]:
    return [POCKET_NOTE] if look_up(params, "preprocess.source") == "pocket" else []


def _format_csv(results: Results) -> str:
    """Return a line of CSV for each sampling and row, with all figures and tests.

    Columns: ``sampling``, of the negatives; ``group``, ``key`` and ``label`` of the row; each
    metric with the bounds of its interval, ``_low`` and ``_high``; ``auc_difference``, the
    difference in AUC to the reference, and ``auc_over_<scorer>``, to each scorer that does not know
    the user, with bounds and ``_p_holm``, empty if not tested; ``sequences``, the number of test
    sequences; ``experiment`` and ``revision``, empty for a mean over runs.
    """
    bounds = [f"{metric}{end}" for metric in results.metrics for end in ("", "_low", "_high")]
    tests = ("auc_difference", *(f"auc_over_{baseline}" for baseline in NON_PERSONAL))
    differences = [f"{test}{end}" for test in tests for end in ("", "_low", "_high", "_p_holm")]
    head = ["sampling", "group", "key", "label", *bounds, *differences]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, "sequences", "experiment", "revision"])
    for sampling, sequences in results.sequences.items():
        for row in results.rows:
            figures = [row.figures[sampling][metric] for metric in results.metrics]
            over = row.over.get(sampling, {})
            tested = [row.differences.get(sampling), *(over.get(each) for each in NON_PERSONAL)]
            numbers = [_number(number) for figure in figures for number in figure]
            for difference in tested:
                numbers += map(_number, difference or [float("nan")] * len(Difference._fields))
            origin = [row.experiment.name, row.experiment.revision] if row.key != MEAN else ["", ""]
            names = [sampling, row.group, row.key, row.label]
            writer.writerow([*names, *numbers, sequences, *origin])
    return text.getvalue()


def _number(value: float) -> str:
    return "" if isnan(value) else f"{value:.6f}"


def _draw(results: Results, params: Mapping[str, Any]) -> Figure:
    """Draw the metrics of the first sampling, then the first metric of each other one."""
    study = results.study
    # Figures over values leave out scorers that do not vary.
    over_values = study.kind in ("sweep", "curves")
    rows = [row for row in results.rows if not over_values or row.key not in SIMPLE]
    panels = _panels(results)
    marks = [_mark(row, results, panels, params) for row in rows]
    bars = f"bars: {results.confidence:.0%} intervals"
    if study.kind == "folds":
        bars = "bars: one standard deviation over the folds"
    note = "; ".join([describe_samplings(results.sequences), bars, *_pocket(params)])
    published = SOURCES.get(study.name, "")
    if over_values:
        return draw_sweep(marks, list(panels), varied=study.varied, note=note, published=published)
    return draw_rows(marks, list(panels), note=note, published=published, chance="chance")


def _panels(results: Results) -> dict[str, tuple[str, str]]:
    """Return the sampling and metric of each panel by its title."""
    first, *others = results.sequences
    titles = zip(column_titles(results.metrics, first), results.metrics, strict=True)
    panels = {title: (first, metric) for title, metric in titles}
    for sampling in others:
        panels[column_titles(results.metrics, sampling)[0]] = sampling, results.metrics[0]
    return panels


def _mark(
    row: Row, results: Results, panels: Mapping[str, tuple[str, str]], params: Mapping[str, Any]
) -> Mark:
    known = find_published(results.study.name, row.key, params)
    filled = row.key == MEAN or (results.reference is not None and row.key == results.reference.key)
    published = {
        title: known[metric]
        for title, (sampling, metric) in panels.items()
        if sampling == PAPERS_SAMPLING and metric in known
    }
    estimates = {title: row.figures[each][metric] for title, (each, metric) in panels.items()}
    return Mark(row.label, estimates, row.group, published, filled)
