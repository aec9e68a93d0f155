"""The Markdown table that compares all scorers, and the notes below it."""

from collections.abc import Mapping, Sequence
from typing import Any

from mllm_msr.evaluation.comparisons import LEVEL, Comparison, Difference
from mllm_msr.evaluation.evaluation import Metrics
from mllm_msr.evaluation.full_catalogue import DEPTH, FUSION, KS, RERANKED, RETRIEVER
from mllm_msr.evaluation.metrics import metric_title, metrics_with_cutoff
from mllm_msr.evaluation.results import count_sequences, samplings_of, shown_metrics
from mllm_msr.evaluation.scorers import MODEL, SCORERS, label_of, section_of
from mllm_msr.evaluation.strata import shown_strata

# Of lists of the whole catalogue: the metric that is tested comes first, with its interval.
LIST_METRICS = sorted(
    (metric.key(k) for metric in metrics_with_cutoff() for k in KS), key=f"ndcg@{DEPTH}".__ne__
)
LIST_PROPERTIES = {"coverage": ".3f", "popularity": ".1f", "similarity": ".3f"}  # and formats
POCKET_NOTE = "pocket world: an embedded toy, no claim about real data"


def format_table(metrics: Metrics, comparisons: Sequence[Comparison]) -> str:
    """Lay out the test figures as a Markdown table, the samplings side by side, and its notes.

    Args:
        metrics: As in ``metrics.json``; the lines of ``warnings``, if any, are above the table.
        comparisons: Those of the same evaluation.
    """
    samplings, shown = samplings_of(metrics), shown_metrics(metrics)
    head = ["test"]
    for sampling in samplings:
        head += column_titles(shown, sampling)
    lines = [head]
    for scorer in SCORERS:
        sections = [metrics[sampling].get(section_of(scorer)) for sampling in samplings]
        if all(sections):
            cells = [cell for figures in sections for cell in _cells(figures, shown)]
            lines.append([label_of(scorer), *cells])
    notes = [
        describe_samplings(count_sequences(metrics)),
        *describe_budget(metrics),
        f"in brackets: {metrics['confidence']:.0%} bootstrap intervals over sequences; those of the"
        " other figures are in metrics.json",
        *_note_comparisons(comparisons, samplings),
        *([POCKET_NOTE] if "oracle" in metrics[samplings[0]] else []),
    ]
    strata, warnings = format_strata(metrics), metrics.get("warnings", [])
    return "\n".join(
        [
            *warnings,
            *([""] if warnings else []),
            format_markdown(lines),
            "",
            *([strata, ""] if strata else []),
            *notes,
            *(["", format_full_catalogue(metrics)] if "full_catalogue" in metrics else []),
        ]
    )


def format_strata(metrics: Metrics) -> str:
    """Lay out AUC by the stratum of the target as a Markdown table; empty with too few sequences.

    Scorers are rows; strata, with their numbers of test sequences, are columns, sampling by
    sampling.
    """
    found = {each: shown_strata(metrics, each) for each in samplings_of(metrics)}
    shown = {sampling: strata for sampling, strata in found.items() if strata}
    if not shown:
        return ""
    titles = (
        f"AUC, {sampling}, {stratum} ({count:,})"
        for sampling, strata in shown.items()
        for stratum, count in strata.items()
    )
    lines = [["test", *titles]]
    for scorer in SCORERS:
        sections = {each: metrics["strata"][each].get(section_of(scorer)) for each in shown}
        if all(sections.values()):
            cells = [
                _cells(figures[stratum], ["auc"])[0]
                for sampling, figures in sections.items()
                for stratum in shown[sampling]
            ]
            lines.append([label_of(scorer), *cells])
    return format_markdown(lines)


def format_full_catalogue(metrics: Metrics) -> str:
    """Lay out the figures on the whole catalogue as a Markdown table, and its notes."""
    section = metrics["full_catalogue"]
    lines = [["whole catalogue, test", *list_titles()]]
    for name, figures in section["rows"].items():
        lines.append([label_of_list(name, section), *format_lists(figures)])
    found = (f"{each['recall']:.3f} at {number}" for number, each in section["recall"].items())
    return "\n".join(
        [
            format_markdown(lines),
            "",
            f"each row ranks {section['items']:,} items, less those that the user took before, for"
            f" {section['sequences']:,} test sequences; a target that is not among the"
            f" {section['candidates']:,} items of a row's list is a miss",
            f"recall of the retriever, the ceiling of the reranking: {', '.join(found)}",
            *describe_fusion(section),
        ]
    )


def list_titles() -> list[str]:
    """Return the titles of the columns of :func:`format_lists`."""
    return [*map(metric_title, LIST_METRICS), *(f"{name}@{DEPTH}" for name in LIST_PROPERTIES)]


def format_lists(figures: Mapping[str, float]) -> list[str]:
    """Format the figures of a row of the section ``full_catalogue``."""
    described = (format(figures[f"{key}@{DEPTH}"], form) for key, form in LIST_PROPERTIES.items())
    return [*_cells(figures, LIST_METRICS), *described]


def label_of_list(name: str, section: Mapping[str, Any]) -> str:
    """Return what tables call a row of the section ``full_catalogue``."""
    retriever = label_of(section["retriever"])
    ours = {
        RETRIEVER: f"{retriever}, the retriever",
        RERANKED: f"{retriever}, reranked by {MODEL}",
        FUSION: f"{retriever}, fused with {MODEL}",
    }
    return ours.get(name) or label_of(name)


def describe_fusion(section: Mapping[str, Any]) -> list[str]:
    """Note the weight of the fusion, and the tests of both rows of the model."""
    if "weight" not in section:
        return []
    notes = [
        f"fusion: {1 - section['weight']:.2f} of the standardized score of"
        f" {label_of(section['retriever'])} and {section['weight']:.2f} of the model's, chosen on"
        " validation sequences",
        f"difference in NDCG@{DEPTH} (paired randomisation tests, Holm-corrected):",
    ]
    for name, others in section["comparisons"].items():
        tests = []
        for other, each in others.items():
            found = Difference(each["difference"], each["low"], each["high"], each["p"])
            shown, p = format_difference(found)
            tests.append(f"{label_of_list(other, section)} {shown}, p {p}")
        notes.append(f"  {label_of_list(name, section)}, to {'; '.join(tests)}")
    return notes


def column_titles(keys: Sequence[str], sampling: str) -> list[str]:
    """Return the titles of a sampling's columns or panels; the first one names the sampling.

    Args:
        keys: Of metrics, such as ``hr@5``.
        sampling: Of the negatives.
    """
    first, *others = map(metric_title, keys)
    return [f"{first}, {sampling}", *others]


def describe_samplings(sequences: Mapping[str, int]) -> str:
    """Return a note on the negatives and the number of test sequences of each sampling."""
    counts = "; ".join(f"{sampling}: {count:,}" for sampling, count in sequences.items())
    return f"negatives: {' and '.join(sequences)}; test sequences: {counts}"


def describe_budget(metrics: Metrics) -> list[str]:
    """Return a note on the splits of which not all sequences are used; none without a budget."""
    limited = [
        f"{counts['used']:,} of {counts['sequences']:,} {split}"
        for split, counts in metrics.get("budget", {}).items()
    ]
    return [f"sequences used: {', '.join(limited)}"] if limited else []


def describe_failures(comparisons: Sequence[Comparison], sampling: str) -> str:
    """Name the scorers, in order, not significantly above those that do not know the user."""
    failed: dict[str, list[str]] = {}
    for each in comparisons:
        if each.sampling == sampling and not each.is_above:
            failed.setdefault(each.scorer, []).append(label_of(each.baseline))
    named = (f"{label_of(scorer)} ({', '.join(names)})" for scorer, names in failed.items())
    return ", ".join(named) or "none"


def format_difference(difference: Difference) -> list[str]:
    """Format a difference with its interval, such as ``+0.031 [+0.002, +0.060]``, and its p."""
    value, low, high, p = difference
    shown = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return [shown, "<0.001" if p < 0.001 else f"{p:.3f}"]


def format_markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lay out rows, the head first, as a Markdown table in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in ruled)


def _note_comparisons(comparisons: Sequence[Comparison], samplings: Sequence[str]) -> list[str]:
    """Name the scorers that know the user and are not significantly above those that do not."""
    if not comparisons:
        return []
    note = (
        "not significantly above the non-personalised baselines (difference in AUC, paired"
        f" randomisation tests, Holm-corrected, p < {LEVEL}):"
    )
    return [note, *(f"  {each}: {describe_failures(comparisons, each)}" for each in samplings)]


def _cells(figures: Mapping[str, float], keys: Sequence[str]) -> list[str]:
    """Format figures, the first with its interval, such as ``0.812 [0.790, 0.834]``."""
    first, low, high = (figures[f"{keys[0]}{end}"] for end in ("", "_low", "_high"))
    return [f"{first:.3f} [{low:.3f}, {high:.3f}]", *(f"{figures[key]:.3f}" for key in keys[1:])]
