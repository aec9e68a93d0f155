"""The verdict of a run in plain words: the first paragraph of the report.

The model is compared with the best of the baselines that know the user, with the scorers that do
not, and with chance. In a run without a model, the best baseline is compared instead. "Above" and
"below" are results of tests:

- against scorers that do not know the user, the tests of ``comparisons.parquet``
  (:mod:`mllm_msr.evaluation.evaluation`), Holm-corrected;
- against the best baseline, the same test, corrected for the number of baselines it is the best of
  (Bonferroni);
- against chance, whose AUC is known exactly, the interval.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import duckdb

from mllm_msr.core.arrays import Floats
from mllm_msr.core.errors import DataError
from mllm_msr.evaluation.comparisons import Comparison, Difference, compare
from mllm_msr.evaluation.evaluation import Metrics
from mllm_msr.evaluation.results import samplings_of
from mllm_msr.evaluation.scorers import BASELINES, MODEL, NON_PERSONAL, label_of
from mllm_msr.ranking import TargetRanks, auc
from mllm_msr.report.results import Standing, judge, scorers_of
from mllm_msr.report.settings import CANDIDATES

Figures = Mapping[str, Any]
STANDINGS: tuple[Standing, ...] = ("above", "not shown to differ from", "below")


class Relation(NamedTuple):
    """The result of comparing a scorer with another."""

    scorer: str
    value: float  # AUC of the other
    standing: Standing
    best: bool = False  # whether the other is the best baseline


@dataclass(frozen=True)
class Outcome:
    """The scorer of the verdict in one sampling.

    Attributes:
        sampling: Of the negatives.
        scorer: The model or, without one, the best baseline.
        figures: Its figures.
        relations: Its comparisons with the others.
    """

    sampling: str
    scorer: str
    figures: Figures
    relations: list[Relation]


@dataclass(frozen=True)
class Verdict:
    """The text of the paragraph.

    Attributes:
        conclusion: A sentence.
        details: A sentence for each sampling.
    """

    conclusion: str
    details: list[str]


def reach_verdict(
    connection: duckdb.DuckDBPyConnection,
    metrics: Metrics,
    comparisons: Sequence[Comparison],
    dataset: str,
) -> Verdict:
    """Return the verdict on the model, or on the best baseline in a run without a model.

    Args:
        connection: From :func:`mllm_msr.report.inputs.open_tables`.
        metrics: From :func:`mllm_msr.evaluation.results.read_metrics`.
        comparisons: From :func:`mllm_msr.evaluation.results.read_comparisons`.
        dataset: Name of the dataset.

    Raises:
        DataError: A comparison is missing.
    """
    outcomes = [
        _measure(connection, metrics, comparisons, sampling) for sampling in samplings_of(metrics)
    ]
    found = [outcome for outcome in outcomes if outcome]
    details = [_describe(outcome, metrics["confidence"]) for outcome in found]
    if any(outcome.scorer == MODEL for outcome in found):
        return Verdict(conclude(found, dataset), details)
    none = f"No model was scored in this run on {dataset}; it measured baselines alone."
    return Verdict(none, details or ["None of them is personalised."])


def conclude(outcomes: Sequence[Outcome], dataset: str) -> str:
    """Summarize the comparisons of the model in a sentence, the worst first.

    Args:
        outcomes: The model's outcome in each sampling.
        dataset: Name of the dataset.
    """
    start = f"On {dataset}, {MODEL}"
    if below := _name_non_personal(outcomes, "below"):
        return f"{start} loses to {below}: {_explain_loss(outcomes)}."
    if level := _name_non_personal(outcomes, "not shown to differ from"):
        return (
            f"{start} is not significantly above {level}: a non-personalised baseline may be"
            " as good."
        )
    best = _compare_best(outcomes)
    return f"{start} is above every non-personalised baseline{best}."


def _measure(
    connection: duckdb.DuckDBPyConnection,
    metrics: Metrics,
    comparisons: Sequence[Comparison],
    sampling: str,
) -> Outcome | None:
    """Compare the model, or else the best baseline, with the others; None without either."""
    scorers = scorers_of(metrics[sampling])
    baselines = [name for name in scorers if name in BASELINES and name not in NON_PERSONAL]
    if MODEL not in scorers and not baselines:
        return None
    scorer = MODEL if MODEL in scorers else baselines[0]
    relations = []
    if scorer == MODEL and baselines:
        aucs = [_read_aucs(connection, sampling, name) for name in (MODEL, baselines[0])]
        difference = compare(*aucs, confidence=metrics["confidence"])
        difference = difference._replace(p=min(1.0, difference.p * len(baselines)))
        standing = judge(difference)
        relations.append(Relation(baselines[0], scorers[baselines[0]]["auc"], standing, best=True))
    for name in NON_PERSONAL:
        if name in scorers:
            standing = judge(_find(comparisons, sampling, scorer, name))
            relations.append(Relation(name, scorers[name]["auc"], standing))
    relations.append(_relate_chance(scorers[scorer], scorers["chance"]["auc"]))
    return Outcome(sampling, scorer, scorers[scorer], relations)


def _relate_chance(figures: Figures, chance: float) -> Relation:
    """Compare a scorer with chance by the scorer's interval, as chance's AUC is exact.

    An interval without width is one of equal sequences, perhaps of a single one, and shows nothing.
    """
    low, high = figures["auc_low"], figures["auc_high"]
    if chance < low < high:
        return Relation("chance", chance, "above")
    below = low < high < chance
    return Relation("chance", chance, "below" if below else "not shown to differ from")


def _find(
    comparisons: Sequence[Comparison], sampling: str, scorer: str, baseline: str
) -> Difference:
    """Return a comparison.

    Raises:
        DataError: There is none.
    """
    for each in comparisons:
        if (each.sampling, each.scorer, each.baseline) == (sampling, scorer, baseline):
            return each.difference
    expected = f"a comparison of {scorer} with {baseline}, sampling {sampling}"
    raise DataError(
        expected=expected,
        got="none",
        where="comparisons.parquet",
        fix="run the stage evaluate again",
    )


def _read_aucs(connection: duckdb.DuckDBPyConnection, sampling: str, scorer: str) -> Floats:
    """Read a scorer's AUC of each test sequence, in the order of the sequences."""
    rows = connection.execute(
        "SELECT sequence, candidates, above, tied FROM all_per_sequence"
        " WHERE sampling = ? AND scorer = ? AND split = 'test' ORDER BY sequence",
        [sampling, scorer],
    ).fetchnumpy()
    return auc(TargetRanks(*rows.values()))


def _describe(outcome: Outcome, confidence: float) -> str:
    """Describe an outcome: the AUC with its interval, and which scorers it is above or below."""
    value, low, high = (outcome.figures[f"auc{end}"] for end in ("", "_low", "_high"))
    name = label_of(outcome.scorer)
    subject = name if outcome.scorer == MODEL else f"the best baseline, {name},"
    return (
        f"Among {CANDIDATES[outcome.sampling]}, {subject} has an AUC of {value:.3f}"
        f" ({confidence:.0%} interval {low:.3f} to {high:.3f}): {'; '.join(_group(outcome))}."
    )


def _group(outcome: Outcome) -> Iterator[str]:
    """Yield the other scorers with their AUC, grouped by standing."""
    for standing in STANDINGS:
        names = [
            f"{label_of(each.scorer)}"
            f" ({each.value:.3f}{', the best baseline' if each.best else ''})"
            for each in outcome.relations
            if each.standing == standing
        ]
        if names:
            yield f"{standing} {_join(names)}"


def _name_non_personal(outcomes: Sequence[Outcome], standing: Standing) -> str:
    """Name the scorers of a standing that do not know the user; empty if there are none."""
    return _name_by_sampling(outcomes, standing, best=False)


def _name_by_sampling(outcomes: Sequence[Outcome], standing: Standing, best: bool) -> str:
    """Name the scorers of a standing, and the sampling where it differs between samplings."""
    named = {
        outcome.sampling: [
            label_of(each.scorer)
            for each in outcome.relations
            if each.standing == standing and each.best == best
        ]
        for outcome in outcomes
    }
    parts = {sampling: _join(names) for sampling, names in named.items() if names}
    if len(parts) == len(outcomes) and len(set(parts.values())) == 1:
        return next(iter(parts.values()))
    return ", and ".join(f"{names} among {CANDIDATES[each]}" for each, names in parts.items())


def _explain_loss(outcomes: Sequence[Outcome]) -> str:
    """Explain a loss by the scorers that the model loses to."""
    lost = {
        each.scorer
        for outcome in outcomes
        for each in outcome.relations
        if each.standing == "below" and not each.best
    }
    if "chance" in lost:
        return "it ranks targets below negatives more often than above them"
    if lost == {"target_popularity"}:
        return "a score that only counts how often an item is a training target ranks better"
    return "a score that only counts popularity ranks better"


def _compare_best(outcomes: Sequence[Outcome]) -> str:
    """Return the end of a sentence: the standing of the model to the best baselines."""
    for standing in reversed(STANDINGS):  # the worst decides
        if named := _name_by_sampling(outcomes, standing, best=True):
            joined = "and" if standing == "above" else "but"
            return f", {joined} {standing} the best baseline, {named}"
    return "; no personalised baseline was measured"


def _join(names: Sequence[str]) -> str:
    """Join names with commas and a last "and"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
