"""What a study found: a row for each scorer, with its figures and its test against one of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mllm_msr.comparisons import Difference, compare, correct, mean_interval
from mllm_msr.errors import DataError
from mllm_msr.evaluation import BASELINES, MODEL
from mllm_msr.figures import Estimate
from mllm_msr.metrics import Placements, auc, measure
from mllm_msr.study.experiments import Experiment, Ranked, read_ranked
from mllm_msr.study.plans import Study, Variant, look_up

MEAN = "mean"  # key of the row of a mean over runs
CUTOFF = 5  # the paper's
NO_SCORERS = {"confidence", "valid", "test"}  # sections of metrics.json
GROUPS: dict[str, tuple[str, ...]] = {  # of the main table, in its order; scorers by their sections
    "ours": (),
    "LLM": (),
    "multimodal": ("vbpr",),
    "sequential with features": ("gru4rec_f", "sasrec_f"),
    "sequential": ("bert4rec", "sasrec", "gru4rec", "fpmc", "markov"),
    "content": ("content_knn_summary", "word_overlap", "content_knn"),
    "other": (),  # what no group names
    "simple": ("item_knn", "recent_popularity", "popularity", "chance"),
    "bound": ("oracle",),
}
SIMPLE = ("popularity", "chance", "oracle")  # in the table of every study, where there are any
IMPERSONAL = {"popularity", "recent_popularity", "chance", "oracle"}  # not tested on popularity


@dataclass(frozen=True)
class Row:
    """One scorer of one experiment.

    Attributes:
        key: The variant's name, or the scorer's section in ``metrics.json``.
        label: What tables and figures call it.
        group: Of the main table, else empty.
        scorer: Its name in the table PerSequence.
        experiment: Whose figures it shows.
        figures: Metric to figure and interval.
        difference: Of its AUC to the reference's, if it was tested; p is Holm-corrected.
        over_popularity: Of its AUC to popularity's, alike, if it knows whom it is asked about.
    """

    key: str
    label: str
    group: str
    scorer: str
    experiment: Experiment
    figures: Mapping[str, Estimate]
    difference: Difference | None = None
    over_popularity: Difference | None = None


@dataclass(frozen=True)
class Results:
    """All that is written of a study.

    Attributes:
        study: Which.
        rows: Of the table, in order.
        reference: The row that others are tested against; None where nothing is tested.
        best: Of the main table: the best row, the best other one, and their difference in AUC.
    """

    study: Study
    rows: Sequence[Row]
    reference: Row | None = None
    best: tuple[Row, Row, Difference] | None = None


def gather_results(
    study: Study,
    params: Mapping[str, Any],
    variants: Mapping[str, Variant],
    experiments: Mapping[str, Experiment],
) -> Results:
    """Put together what a study's experiments found.

    Args:
        study: The study.
        params: Settings of the workspace.
        variants: By the names of their experiments.
        experiments: Finished ones, among them all of the variants'.

    Raises:
        DataError: A scorer is missing in an experiment, or two that are compared did not rank the
            same candidates.
    """
    rows = [row for name, each in variants.items() for row in _rows(each, experiments[name])]
    rivals = _rivals(study, rows[0].experiment)
    if study.kind == "repetitions":
        return Results(study, [*rows, *([_mean(rows)] if len(rows) > 1 else []), *rivals])
    reference, ranked = _reference(study, rows, params), _read(rows)
    table, last, best = [*rows, *rivals], len(rows), None
    if study.rivals == "all":
        table.sort(key=lambda row: list(GROUPS).index(row.group))
        last, best = len(table), _best(table, ranked)
    others = [place for place in range(last) if table[place] is not reference]
    tested = _test(table, others, reference, ranked)
    placed = _test_on_popularity(table, ranked) if study.kind == "rows" else {}
    table = [
        replace(row, difference=tested.get(place), over_popularity=placed.get(place))
        for place, row in enumerate(table)
    ]
    return Results(study, table, reference, best)


def compare_rankings(ours: Ranked, other: Ranked) -> dict[str, tuple[float, float, Difference]]:
    """Compare the model of two revisions by every metric.

    Returns:
        For each metric the mean of either, and their difference; p is not corrected.

    Raises:
        DataError: They did not rank the same candidates.
    """
    placements = [_placements(each, MODEL) for each in (ours, other)]
    _refuse_other_questions((ours, other), *placements)
    mine, others = (measure(each, [CUTOFF]) for each in placements)
    return {
        metric: (
            float(mine[metric].mean()),
            float(others[metric].mean()),
            compare(mine[metric], others[metric], confidence=0.95),
        )
        for metric in mine
    }


def shown_metrics(figures: Mapping[str, Any]) -> list[str]:
    """Give the metrics that are shown: those at the paper's cut-off, or at the smallest."""
    cutoffs = [int(k) for k in re.findall(r"\bhr@(\d+)\b", " ".join(figures))]
    k = CUTOFF if CUTOFF in cutoffs else min(cutoffs)
    return ["auc", f"hr@{k}", f"ndcg@{k}", f"mrr@{k}"]


def _rows(variant: Variant, experiment: Experiment) -> list[Row]:
    """Give a variant's rows: the model's, or those of the scorers that it names."""
    return [
        _row(variant.name if scorer == MODEL else scorer, label, variant.group, scorer, experiment)
        for scorer, label in variant.shown().items()
    ]


def _row(key: str, label: str, group: str, scorer: str, experiment: Experiment) -> Row:
    section = "test" if scorer == MODEL else scorer
    if section not in experiment.metrics:
        known = ", ".join(experiment.metrics)
        remedy = "name it in baselines.models or feature_baselines.models, run the study again"
        raise DataError(f"metrics of {section}", known, experiment.name, remedy)
    figures = experiment.metrics[section]
    estimates = {
        metric: Estimate(figures[metric], figures[f"{metric}_low"], figures[f"{metric}_high"])
        for metric in shown_metrics(figures)
    }
    return Row(key, label, group, scorer, experiment, estimates)


def _rivals(study: Study, experiment: Experiment) -> list[Row]:
    """Give the scorers that stand beside a study's own, in the order of their groups."""
    known = [scorer for group in GROUPS.values() for scorer in group]
    sections = experiment.metrics.keys() - NO_SCORERS
    if study.rivals == "simple":
        wanted = [scorer for scorer in SIMPLE if scorer in sections]
    else:
        wanted = [*(each for each in known if each in sections), *sorted(sections - set(known))]
    return [
        _row(each, BASELINES.get(each, each), _group(study, each), each, experiment)
        for each in wanted
    ]


def _group(study: Study, scorer: str) -> str:
    if study.rivals == "simple":
        return ""
    return next((group for group, members in GROUPS.items() if scorer in members), "other")


def _reference(study: Study, rows: Sequence[Row], params: Mapping[str, Any]) -> Row:
    """Give the row of the workspace's own settings, or the first where no variant has them."""
    if study.kind == "sweep":
        own = {
            each.name
            for each in study.variants
            if all(look_up(params, key) == value for key, value in each.settings.items())
        }
        return next((row for row in rows if row.key in own), rows[0])
    return rows[0]


def _mean(rows: Sequence[Row]) -> Row:
    """Give the mean over runs; its interval is Student's, over runs and not over sequences."""
    confidence = rows[0].experiment.metrics["confidence"]
    figures = {
        metric: Estimate(*mean_interval([row.figures[metric].value for row in rows], confidence))
        for metric in rows[0].figures
    }
    return Row(MEAN, f"mean of {len(rows)}", "", MODEL, rows[0].experiment, figures)


def _test(
    rows: Sequence[Row], places: Sequence[int], other: Row, ranked: Mapping[str, Ranked]
) -> dict[int, Difference]:
    """Test the AUC of the rows in these places against another's, corrected for their number."""
    differences = correct([_difference(rows[place], other, ranked) for place in places])
    return dict(zip(places, differences, strict=True))


def _test_on_popularity(rows: Sequence[Row], ranked: Mapping[str, Ranked]) -> dict[int, Difference]:
    """Test whether each row that knows whom it is asked about is above popularity."""
    popularity = next((row for row in rows if row.key == "popularity"), None)
    if popularity is None:
        return {}
    personal = [place for place, row in enumerate(rows) if row.key not in IMPERSONAL]
    return _test(rows, personal, popularity, ranked)


def _best(rows: Sequence[Row], ranked: Mapping[str, Ranked]) -> tuple[Row, Row, Difference]:
    """Compare the best row with the best other one; the oracle, who knows the truth, is none."""
    best, other = sorted(
        (row for row in rows if row.group != "bound"), key=lambda row: -row.figures["auc"].value
    )[:2]
    return best, other, _difference(best, other, ranked)


def _read(rows: Sequence[Row]) -> dict[str, Ranked]:
    """Read the rankings of the rows' experiments, each once."""
    revisions = dict.fromkeys(row.experiment.revision for row in rows)
    return {revision: read_ranked(revision) for revision in revisions}


def _difference(row: Row, other: Row, ranked: Mapping[str, Ranked]) -> Difference:
    pair = [ranked[each.experiment.revision] for each in (row, other)]
    mine, others = (
        _placements(each, which.scorer) for each, which in zip(pair, (row, other), strict=True)
    )
    _refuse_other_questions(pair, mine, others)
    return compare(auc(mine), auc(others), confidence=row.experiment.metrics["confidence"])


def _placements(ranked: Ranked, scorer: str) -> Placements:
    if scorer not in ranked.placements:
        came, remedy = ", ".join(ranked.placements), "run the stage evaluate again"
        raise DataError(f"the rankings of {scorer}", came, "per_sequence.parquet", remedy)
    return ranked.placements[scorer]


def _refuse_other_questions(pair: Sequence[Ranked], ours: Placements, others: Placements) -> None:
    """Refuse a paired comparison of scorers that were not asked the same."""
    alike = pair[0].candidates == pair[1].candidates and all(
        np.array_equal(getattr(ours, counts), getattr(others, counts))
        for counts in ("sequences", "candidates")
    )
    if not alike:
        remedy = "compare runs with equal settings of preprocess and filter_sequences"
        raise DataError(
            "two rankings of the same candidates", "different ones", "per_sequence.parquet", remedy
        )
