"""The results of a study: a row for each scorer, with its figures and tests by sampling."""

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
from mllm_msr.evaluation.metrics import CUTOFF, measure
from mllm_msr.evaluation.results import count_sequences, samplings_of, shown_metrics
from mllm_msr.evaluation.scorers import (
    MODEL,
    NON_PERSONAL,
    OWN_SECTIONS,
    UNTESTED,
    label_of,
    section_of,
)
from mllm_msr.ranking import TargetRanks, auc
from mllm_msr.study.dvc_internals import Finished
from mllm_msr.study.experiments import Rankings, read_rankings
from mllm_msr.study.figures import Estimate
from mllm_msr.study.plans import Study, Variant, look_up

MEAN = "mean"  # key of the row of a mean over runs
GROUPS: dict[str, tuple[str, ...]] = {  # of the main table, in its order; scorers by their sections
    "ours": (),
    "LLM": (),
    "multimodal": ("vbpr",),
    "sequential with features": ("gru4rec_f", "sasrec_f"),
    "sequential": ("bert4rec", "sasrec", "gru4rec", "fpmc", "markov"),
    "text": ("content_knn_summary", "word_overlap"),
    "other": (),  # scorers that no group names
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
        label: Its name in tables and figures.
        group: Group of the main table, else empty.
        scorer: Its name in the table PerSequence.
        experiment: The experiment of its figures.
        figures: Figure and interval, by sampling and metric.
        differences: Difference in AUC to the reference, by sampling, if it was tested; p is
            Holm-corrected within the sampling.
        over: If the row knows the user, difference in AUC to each scorer that does not, by sampling
            and scorer; p is Holm-corrected within the sampling.
    """

    key: str
    label: str
    group: str
    scorer: str
    experiment: Finished
    figures: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Difference] = field(default_factory=dict)
    over: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)


class Best(NamedTuple):
    """The best row of a sampling, the second best, and their difference in AUC."""

    row: Row
    other: Row
    difference: Difference


@dataclass(frozen=True)
class Results:
    """The results of a study.

    Attributes:
        study: The study.
        rows: Rows of the table, in order.
        reference: The row that others are tested against; None if nothing is tested.
        best: The best rows of the main table, by sampling.
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
        """Comparisons of each row that knows the user, named by label, with each that does not."""
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
    experiments: Mapping[str, Finished],
) -> Results:
    """Gather the rows and tests of a study from its experiments.

    Args:
        study: The study.
        params: Settings of the workspace.
        variants: By the names of their experiments.
        experiments: Finished experiments by name, those of all variants included.

    Raises:
        DataError: A scorer or a sampling is missing in an experiment, or compared experiments did
            not rank the same candidates.
    """
    _refuse_other_samplings(experiments[name] for name in variants)
    if study.kind == "curves":
        rows = _curves(variants, experiments)
        return Results(study, [*rows, *_other_rows(study, rows[0].experiment)])
    rows = [row for name, each in variants.items() for row in _rows(each, experiments[name])]
    if study.kind == "folds":
        return Results(study, _average_folds(rows))
    others = _other_rows(study, rows[0].experiment)
    if study.kind == "repetitions":
        return Results(study, [*rows, *([_mean(rows)] if len(rows) > 1 else []), *others])
    reference, rankings = _reference(study, rows, params), _read(rows)
    table, last, best = [*rows, *others], len(rows), dict[str, Best]()
    if study.others == "all":
        table.sort(key=lambda row: list(GROUPS).index(row.group))
        last = len(table)
        best = {each: _find_best(table, each, rankings) for each in reference.figures}
    table = _test_on_reference(table, last, reference, rankings)
    if study.kind == "rows":
        table = _test_on_non_personal(table, rankings)
    return Results(study, table, reference, best)


def compare_rankings(
    ours: Rankings, other: Rankings
) -> dict[str, dict[str, tuple[float, float, Difference]]]:
    """Compare the model of two revisions by every metric of every sampling.

    Returns:
        By sampling and metric, the means of both and their difference; p is not corrected.

    Raises:
        DataError: They did not rank the same candidates, or one has no rankings of the model.
    """
    return {sampling: _compare_model(ours, other, sampling) for sampling in ours.samplings}


def _compare_model(
    ours: Rankings, other: Rankings, sampling: str
) -> dict[str, tuple[float, float, Difference]]:
    """Compare the model of two revisions by every metric of one sampling."""
    ranks = [_ranks_of(each, sampling, MODEL) for each in (ours, other)]
    _refuse_other_candidates((ours, other), *ranks)
    mine, others = (measure(each, [CUTOFF]) for each in ranks)
    return {
        metric: (
            float(mine[metric].mean()),
            float(others[metric].mean()),
            compare(mine[metric], others[metric], confidence=0.95),
        )
        for metric in mine
    }


def _refuse_other_samplings(experiments: Iterable[Finished]) -> None:
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


def _rows(variant: Variant, experiment: Finished) -> list[Row]:
    """Return a variant's rows: the model's, or those of the scorers that it names."""
    return [
        _row(variant.name if scorer == MODEL else scorer, label, variant.group, scorer, experiment)
        for scorer, label in variant.shown().items()
    ]


def _row(key: str, label: str, group: str, scorer: str, experiment: Finished) -> Row:
    section, figures = section_of(scorer), {}
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


def _other_rows(study: Study, experiment: Finished) -> list[Row]:
    """Return the rows of scorers that are not the study's own, in the order of groups."""
    known = [scorer for group in GROUPS.values() for scorer in group]
    first, *_ = samplings_of(experiment.metrics)
    sections = experiment.metrics[first].keys() - set(OWN_SECTIONS)
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
    """Return the row of the workspace's settings, or the first if no variant has them."""
    if study.kind == "sweep":
        own = {
            each.name
            for each in study.variants
            if all(look_up(params, key) == value for key, value in each.settings.items())
        }
        return next((row for row in rows if row.key in own), rows[0])
    return rows[0]


def _mean(rows: Sequence[Row]) -> Row:
    """Return the row of the mean over runs; its interval is Student's t, over runs."""
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


def _curves(variants: Mapping[str, Variant], experiments: Mapping[str, Finished]) -> list[Row]:
    """Return a group of rows for each scorer, with a row for each variant that shows it."""
    scorers = dict.fromkeys(scorer for each in variants.values() for scorer in each.shown())
    return [
        _row(variant.name, variant.label, label_of(scorer), scorer, experiments[name])
        for scorer in scorers
        for name, variant in variants.items()
        if scorer in variant.shown()
    ]


def _average_folds(rows: Sequence[Row]) -> list[Row]:
    """Return a row per scorer: means over folds; the bounds are one standard deviation away."""
    by_scorer: dict[str, list[Row]] = {}
    for row in rows:
        by_scorer.setdefault(row.scorer, []).append(row)
    averaged = []
    for folds in by_scorer.values():
        first = folds[0]
        figures = {
            sampling: {
                metric: _spread([row.figures[sampling][metric].value for row in folds])
                for metric in metrics
            }
            for sampling, metrics in first.figures.items()
        }
        averaged.append(replace(first, figures=figures))
    return averaged


def _spread(values: Sequence[float]) -> Estimate:
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    return Estimate(mean, mean - deviation, mean + deviation)


def _test_on_reference(
    rows: Sequence[Row], last: int, reference: Row, rankings: Mapping[str, Rankings]
) -> list[Row]:
    """Test the AUC of the rows before ``last`` against the reference's, a family per sampling."""
    indices = [index for index in range(last) if rows[index] is not reference]
    tested: dict[int, dict[str, Difference]] = {index: {} for index in indices}
    for sampling in reference.figures:
        pairs = [(rows[index], reference) for index in indices]
        for index, difference in zip(indices, _compare(pairs, sampling, rankings), strict=True):
            tested[index][sampling] = difference
    return [replace(row, differences=tested.get(i, {})) for i, row in enumerate(rows)]


def _test_on_non_personal(rows: Sequence[Row], rankings: Mapping[str, Rankings]) -> list[Row]:
    """Test each row that knows the user against each that does not, a family per sampling."""
    baselines = [row for name in NON_PERSONAL for row in rows if row.scorer == name]
    personal = [index for index, row in enumerate(rows) if row.scorer not in UNTESTED]
    compared = [(index, baseline) for index in personal for baseline in baselines]
    tested: dict[int, dict[str, dict[str, Difference]]] = {index: {} for index in personal}
    for sampling in rows[0].figures:
        pairs = [(rows[index], baseline) for index, baseline in compared]
        found = zip(compared, _compare(pairs, sampling, rankings), strict=True)
        for (index, baseline), difference in found:
            tested[index].setdefault(sampling, {})[baseline.scorer] = difference
    return [replace(row, over=tested.get(i, {})) for i, row in enumerate(rows)]


def _find_best(rows: Sequence[Row], sampling: str, rankings: Mapping[str, Rankings]) -> Best:
    """Compare a sampling's best row with the second best; the oracle is left out."""
    best, other = sorted(
        (row for row in rows if row.group != "bound"),
        key=lambda row: -row.figures[sampling]["auc"].value,
    )[:2]
    (difference,) = _compare([(best, other)], sampling, rankings)
    return Best(best, other, difference)


def _read(rows: Sequence[Row]) -> dict[str, Rankings]:
    """Read the rankings of the rows' experiments by revision."""
    revisions = dict.fromkeys(row.experiment.revision for row in rows)
    return {revision: read_rankings(revision) for revision in revisions}


def _compare(
    pairs: Sequence[Pair], sampling: str, rankings: Mapping[str, Rankings]
) -> list[Difference]:
    """Compare the AUC of the rows of each pair, as one family."""
    if not pairs:
        return []
    values = []
    for pair in pairs:
        both = [rankings[row.experiment.revision] for row in pair]
        mine, others = (
            _ranks_of(each, sampling, row.scorer) for each, row in zip(both, pair, strict=True)
        )
        _refuse_other_candidates(both, mine, others)
        values.append((auc(mine), auc(others)))
    return compare_pairs(values, confidence=pairs[0][0].experiment.metrics["confidence"])


def _ranks_of(rankings: Rankings, sampling: str, scorer: str) -> TargetRanks:
    if (sampling, scorer) not in rankings.ranks:
        if scorer == MODEL and all(name != MODEL for _, name in rankings.ranks):
            fix = "name revisions with a recommender.model; metrics: dvc metrics diff"
            where = "per_sequence.parquet"
            raise DataError(
                expected=f"a revision that scored {MODEL}",
                got="baselines alone",
                where=where,
                fix=fix,
            )
        expected = f"rankings of {scorer}, {sampling}"
        got = "; ".join(f"{name}, {each}" for each, name in rankings.ranks)
        fix = "run the stage evaluate again"
        raise DataError(expected=expected, got=got, where="per_sequence.parquet", fix=fix)
    return rankings.ranks[sampling, scorer]


def _refuse_other_candidates(
    pair: Sequence[Rankings], ours: TargetRanks, others: TargetRanks
) -> None:
    """Refuse a paired comparison of scorers that did not rank the same candidates."""
    first, second = pair
    same = (first.candidates, first.samplings) == (second.candidates, second.samplings) and all(
        np.array_equal(getattr(ours, counts), getattr(others, counts))
        for counts in ("sequences", "candidates")
    )
    if not same:
        fix = "compare runs with equal settings of preprocess and filter_sequences"
        raise DataError(
            expected="two rankings of the same candidates",
            got="different ones",
            where="per_sequence.parquet",
            fix=fix,
        )
