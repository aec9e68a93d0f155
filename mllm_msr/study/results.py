"""What a study found: a row for each scorer, with its figures and its tests, by sampling."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from mllm_msr.core.errors import DataError
from mllm_msr.evaluation.comparisons import (
    Comparison,
    Difference,
    compare,
    compare_pairs,
    mean_interval,
)
from mllm_msr.evaluation.metrics import measure
from mllm_msr.evaluation.results import count_sequences, samplings_of, shown_metrics
from mllm_msr.evaluation.scorers import MODEL, NON_PERSONAL, UNTESTED, label_of
from mllm_msr.ranking import TargetRanks, auc
from mllm_msr.study.experiments import Experiment, Ranked, read_ranked
from mllm_msr.study.figures import Estimate
from mllm_msr.study.plans import Study, Variant, look_up

MEAN = "mean"  # key of the row of a mean over runs
CUTOFF = 5  # the paper's
OWN_SECTIONS = {"valid", "test"}  # the model's figures; the other sections are named by scorers
GROUPS: dict[str, tuple[str, ...]] = {  # of the main table, in its order; scorers by their sections
    "ours": (),
    "LLM": (),
    "multimodal": ("vbpr",),
    "sequential with features": ("gru4rec_f", "sasrec_f"),
    "sequential": ("bert4rec", "sasrec", "gru4rec", "fpmc", "markov"),
    "text": ("content_knn_summary", "word_overlap"),
    "other": (),  # what no group names
    "simple": ("item_knn", "content_knn", *NON_PERSONAL, "chance"),
    "bound": ("oracle",),
}
# In the table of every study, where there are any.
SIMPLE = ("target_popularity", "popularity", "chance", "oracle")

Pair = tuple["Row", "Row"]


@dataclass(frozen=True)
class Row:
    """One scorer of one experiment.

    Attributes:
        key: The variant's name, or the scorer's section in ``metrics.json``.
        label: What tables and figures call it.
        group: Of the main table, else empty.
        scorer: Its name in the table PerSequence.
        experiment: Whose figures it shows.
        figures: Sampling to metric to figure and interval.
        differences: Sampling to the difference of its AUC to the reference's, if it was tested; p
            is Holm-corrected within the sampling.
        over: Sampling to scorer that does not know the user to the difference of the row's AUC to
            that scorer's, alike, if the row knows the user.
    """

    key: str
    label: str
    group: str
    scorer: str
    experiment: Experiment
    figures: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Difference] = field(default_factory=dict)
    over: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)


class Best(NamedTuple):
    """The best row of a sampling, the best other one, and their difference in AUC."""

    row: Row
    other: Row
    difference: Difference


@dataclass(frozen=True)
class Results:
    """All that is written of a study.

    Attributes:
        study: Which.
        rows: Of the table, in order.
        reference: The row that others are tested against; None where nothing is tested.
        best: Of the main table, by sampling.
    """

    study: Study
    rows: Sequence[Row]
    reference: Row | None = None
    best: Mapping[str, Best] = field(default_factory=dict)

    @property
    def sequences(self) -> dict[str, int]:
        """Number of test sequences by sampling, in the order of the tables."""
        return count_sequences(self.rows[0].experiment.metrics)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics in tables and figures."""
        return shown_metrics(self.rows[0].experiment.metrics)

    @property
    def confidence(self) -> float:
        """Coverage of the intervals."""
        return float(self.rows[0].experiment.metrics["confidence"])

    @property
    def comparisons(self) -> list[Comparison]:
        """Tests of each row that knows the user, called by its label, on each that does not."""
        return [
            Comparison(sampling, row.label, baseline, difference)
            for row in self.rows
            for sampling, differences in row.over.items()
            for baseline, difference in differences.items()
        ]


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
        DataError: A scorer or a sampling is missing in an experiment, or two that are compared did
            not rank the same candidates.
    """
    _refuse_other_samplings(experiments[name] for name in variants)
    rows = [row for name, each in variants.items() for row in _rows(each, experiments[name])]
    others = _other_rows(study, rows[0].experiment)
    if study.kind == "repetitions":
        return Results(study, [*rows, *([_mean(rows)] if len(rows) > 1 else []), *others])
    reference, ranked = _reference(study, rows, params), _read(rows)
    table, last, best = [*rows, *others], len(rows), dict[str, Best]()
    if study.others == "all":
        table.sort(key=lambda row: list(GROUPS).index(row.group))
        last = len(table)
        best = {each: _find_best(table, each, ranked) for each in reference.figures}
    table = _test_on_reference(table, last, reference, ranked)
    if study.kind == "rows":
        table = _test_on_non_personal(table, ranked)
    return Results(study, table, reference, best)


def compare_rankings(
    ours: Ranked, other: Ranked
) -> dict[str, dict[str, tuple[float, float, Difference]]]:
    """Compare the model of two revisions by every metric of every sampling.

    Returns:
        By sampling and metric the mean of either, and their difference; p is not corrected.

    Raises:
        DataError: They did not rank the same candidates, or one has no rankings of the model.
    """
    return {sampling: _compare_model(ours, other, sampling) for sampling in ours.samplings}


def _compare_model(
    ours: Ranked, other: Ranked, sampling: str
) -> dict[str, tuple[float, float, Difference]]:
    """Compare the model of two revisions by every metric of one sampling."""
    ranks = [_placements(each, sampling, MODEL) for each in (ours, other)]
    _refuse_other_questions((ours, other), *ranks)
    mine, others = (measure(each, [CUTOFF]) for each in ranks)
    return {
        metric: (
            float(mine[metric].mean()),
            float(others[metric].mean()),
            compare(mine[metric], others[metric], confidence=0.95),
        )
        for metric in mine
    }


def _refuse_other_samplings(experiments: Iterable[Experiment]) -> None:
    """Refuse experiments that were not measured by the same samplings of negatives, if any."""
    first, *others = experiments
    expected = samplings_of(first.metrics)
    for experiment in (first, *others):
        found = samplings_of(experiment.metrics)
        if not found or found != expected:
            raise DataError(
                expected=f"figures by sampling of negatives: {', '.join(expected) or 'uniform'}",
                got=", ".join(found) or "figures of an earlier version, without samplings",
                where=f"metrics of {experiment.name}",
                fix=f"dvc exp remove {experiment.name}, then run the study again",
            )


def _rows(variant: Variant, experiment: Experiment) -> list[Row]:
    """Return a variant's rows: the model's, or those of the scorers that it names."""
    return [
        _row(variant.name if scorer == MODEL else scorer, label, variant.group, scorer, experiment)
        for scorer, label in variant.shown().items()
    ]


def _row(key: str, label: str, group: str, scorer: str, experiment: Experiment) -> Row:
    section, figures = "test" if scorer == MODEL else scorer, {}
    for sampling in samplings_of(experiment.metrics):
        sections = experiment.metrics[sampling]
        if section not in sections:
            named = "name it in baselines.models or feature_baselines.models"
            fix = "run the stage score" if scorer == MODEL else named
            raise DataError(
                expected=f"metrics of {section}, {sampling}",
                got=", ".join(sections),
                where=experiment.name,
                fix=f"{fix}, then run the study again",
            )
        found = sections[section]
        figures[sampling] = {
            metric: Estimate(found[metric], found[f"{metric}_low"], found[f"{metric}_high"])
            for metric in shown_metrics(experiment.metrics)
        }
    return Row(key, label, group, scorer, experiment, figures)


def _other_rows(study: Study, experiment: Experiment) -> list[Row]:
    """Return the scorers that stand beside a study's own, in the order of their groups."""
    known = [scorer for group in GROUPS.values() for scorer in group]
    first, *_ = samplings_of(experiment.metrics)
    sections = experiment.metrics[first].keys() - OWN_SECTIONS
    if study.others == "simple":
        wanted = [scorer for scorer in SIMPLE if scorer in sections]
    else:
        wanted = [*(each for each in known if each in sections), *sorted(sections - set(known))]
    return [_row(each, label_of(each), _group(study, each), each, experiment) for each in wanted]


def _group(study: Study, scorer: str) -> str:
    if study.others == "simple":
        return ""
    return next((group for group, members in GROUPS.items() if scorer in members), "other")


def _reference(study: Study, rows: Sequence[Row], params: Mapping[str, Any]) -> Row:
    """Return the row of the workspace's own settings, or the first where no variant has them."""
    if study.kind == "sweep":
        own = {
            each.name
            for each in study.variants
            if all(look_up(params, key) == value for key, value in each.settings.items())
        }
        return next((row for row in rows if row.key in own), rows[0])
    return rows[0]


def _mean(rows: Sequence[Row]) -> Row:
    """Return the mean over runs; its interval is Student's, over runs and not over sequences."""
    first = rows[0]
    confidence = first.experiment.metrics["confidence"]
    figures = {
        sampling: {
            metric: Estimate(
                *mean_interval([row.figures[sampling][metric].value for row in rows], confidence)
            )
            for metric in metrics
        }
        for sampling, metrics in first.figures.items()
    }
    return Row(MEAN, f"mean of {len(rows)}", "", MODEL, first.experiment, figures)


def _test_on_reference(
    rows: Sequence[Row], last: int, reference: Row, ranked: Mapping[str, Ranked]
) -> list[Row]:
    """Test the AUC of the rows before ``last`` against the reference's, a family per sampling."""
    places = [place for place in range(last) if rows[place] is not reference]
    tested: dict[int, dict[str, Difference]] = {place: {} for place in places}
    for sampling in reference.figures:
        pairs = [(rows[place], reference) for place in places]
        for place, difference in zip(places, _compare(pairs, sampling, ranked), strict=True):
            tested[place][sampling] = difference
    return [replace(row, differences=tested.get(i, {})) for i, row in enumerate(rows)]


def _test_on_non_personal(rows: Sequence[Row], ranked: Mapping[str, Ranked]) -> list[Row]:
    """Test each row that knows the user against each that does not, a family per sampling."""
    baselines = [row for name in NON_PERSONAL for row in rows if row.scorer == name]
    personal = [place for place, row in enumerate(rows) if row.scorer not in UNTESTED]
    asked = [(place, baseline) for place in personal for baseline in baselines]
    tested: dict[int, dict[str, dict[str, Difference]]] = {place: {} for place in personal}
    for sampling in rows[0].figures:
        pairs = [(rows[place], baseline) for place, baseline in asked]
        found = zip(asked, _compare(pairs, sampling, ranked), strict=True)
        for (place, baseline), difference in found:
            tested[place].setdefault(sampling, {})[baseline.scorer] = difference
    return [replace(row, over=tested.get(i, {})) for i, row in enumerate(rows)]


def _find_best(rows: Sequence[Row], sampling: str, ranked: Mapping[str, Ranked]) -> Best:
    """Compare a sampling's best row with its best other one; the oracle is left out."""
    best, other = sorted(
        (row for row in rows if row.group != "bound"),
        key=lambda row: -row.figures[sampling]["auc"].value,
    )[:2]
    (difference,) = _compare([(best, other)], sampling, ranked)
    return Best(best, other, difference)


def _read(rows: Sequence[Row]) -> dict[str, Ranked]:
    """Read the rankings of the rows' experiments, each once."""
    revisions = dict.fromkeys(row.experiment.revision for row in rows)
    return {revision: read_ranked(revision) for revision in revisions}


def _compare(
    pairs: Sequence[Pair], sampling: str, ranked: Mapping[str, Ranked]
) -> list[Difference]:
    """Compare the AUC of the rows of each pair, as one family."""
    if not pairs:
        return []
    values = []
    for pair in pairs:
        both = [ranked[row.experiment.revision] for row in pair]
        mine, others = (
            _placements(each, sampling, row.scorer) for each, row in zip(both, pair, strict=True)
        )
        _refuse_other_questions(both, mine, others)
        values.append((auc(mine), auc(others)))
    return compare_pairs(values, confidence=pairs[0][0].experiment.metrics["confidence"])


def _placements(ranked: Ranked, sampling: str, scorer: str) -> TargetRanks:
    if (sampling, scorer) not in ranked.ranks:
        if scorer == MODEL and all(name != MODEL for _, name in ranked.ranks):
            fix = "name revisions with a recommender.model; metrics: dvc metrics diff"
            where = "per_sequence.parquet"
            raise DataError(
                expected=f"a revision that scored {MODEL}",
                got="baselines alone",
                where=where,
                fix=fix,
            )
        expected = f"rankings of {scorer}, {sampling}"
        got = "; ".join(f"{name}, {each}" for each, name in ranked.ranks)
        fix = "run the stage evaluate again"
        raise DataError(expected=expected, got=got, where="per_sequence.parquet", fix=fix)
    return ranked.ranks[sampling, scorer]


def _refuse_other_questions(pair: Sequence[Ranked], ours: TargetRanks, others: TargetRanks) -> None:
    """Refuse a paired comparison of scorers that were not asked the same."""
    first, second = pair
    alike = (first.candidates, first.samplings) == (second.candidates, second.samplings) and all(
        np.array_equal(getattr(ours, counts), getattr(others, counts))
        for counts in ("sequences", "candidates")
    )
    if not alike:
        fix = "compare runs with equal settings of preprocess and filter_sequences"
        raise DataError(
            expected="two rankings of the same candidates",
            got="different ones",
            where="per_sequence.parquet",
            fix=fix,
        )
