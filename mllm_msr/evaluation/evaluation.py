"""The figures of the model beside those of other scorers, computed in memory.

Every scorer (:mod:`mllm_msr.evaluation.scorers`) ranks the same candidates, once for each sampling
of their negatives. Each scorer that knows the user is tested against each that does not: paired
tests of AUC over the test sequences, Holm-corrected for all tests of one sampling.

The model has figures of both splits, the other scorers of test only. The ranks of all scorers are
kept for both splits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow

from mllm_msr.core.arrays import Floats
from mllm_msr.evaluation.calibration import Calibration, Method, calibrate, sigmoid
from mllm_msr.evaluation.comparisons import Comparison, compare_pairs
from mllm_msr.evaluation.full_catalogue import measure_full_catalogue
from mllm_msr.evaluation.metrics import measure, metrics_with_cutoff, summarize
from mllm_msr.evaluation.retrieved_lists import RetrievedLists
from mllm_msr.evaluation.scored_candidates import (
    Key,
    ScoredCandidates,
    find_limited_splits,
    has_scores,
    score_candidates,
)
from mllm_msr.evaluation.scorers import MODEL, NON_PERSONAL, UNTESTED, section_of
from mllm_msr.evaluation.strata import measure_strata
from mllm_msr.ranking import TargetRanks, auc, rank_targets

BINS = 20  # of the histogram of p(yes)
HISTOGRAM = arrow.schema(
    [
        ("sampling", arrow.string()),
        ("label", arrow.string()),
        *((name, arrow.float64()) for name in ("p_yes", "p_yes_end", "share")),
    ]
)
RELIABILITY = arrow.schema(
    [
        ("sampling", arrow.string()),
        ("scaling", arrow.string()),
        *((name, arrow.float64()) for name in ("p_yes", "target_share")),
        ("candidates", arrow.int64()),
    ]
)

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation, all computed before any is written.

    Attributes:
        metrics: The document ``metrics.json``.
        comparisons: Of each scorer that knows the user with each that does not.
        ranks: By sampling, scorer and split.
        curves: Columns sampling, scorer, k and one for each metric with a cut-off; test only.
        histogram: Columns sampling, label, p_yes, p_yes_end, share of the model's test scores.
        reliability: Columns sampling, scaling, p_yes, target_share, candidates; a row per bin of
            the model's test scores, without a scaling and with the one that was fitted.
    """

    metrics: Metrics
    comparisons: Sequence[Comparison]
    ranks: Mapping[Key, TargetRanks]
    curves: arrow.Table
    histogram: arrow.Table
    reliability: arrow.Table


def evaluate(
    scores: Path | None,
    filtered: Path,
    oracle: Path | None,
    baselines: Mapping[str, Path],
    *,
    ks: Sequence[int],
    bootstrap_samples: int,
    confidence: float,
    seed: int,
    calibration: Method,
    only_used: bool = False,
    retriever: str = "",
    lists: RetrievedLists | None = None,
) -> Evaluation:
    """Evaluate the model and the other scorers on the candidates of valid and test.

    Args:
        scores: A table Scores with the log-odds of every such candidate. None, or a table without
            rows, leaves the model out.
        filtered: Folder of ``filter_sequences``.
        oracle: The pocket world's table Oracle, or None for other data.
        baselines: Tables Scores by the names of baselines, those of ``BASELINES``.
        ks: Cut-offs, ascending; the curves go up to the last.
        bootstrap_samples: Resamples per interval.
        confidence: Coverage of the intervals, 0..1.
        seed: Seed of the resamples, the same for every scorer.
        calibration: How the model's log-odds become probabilities
            (:mod:`mllm_msr.evaluation.calibration`); no rank depends on it.
        only_used: Whether the popularity of targets counts used training sequences only.
        retriever: Name of the retriever, if there are lists.
        lists: Of the whole catalogue (:mod:`mllm_msr.evaluation.full_catalogue`); None leaves that
            part out.

    Raises:
        DataError: A table is missing or breaks its model, or scores and candidates do not match
            (:func:`mllm_msr.evaluation.scored_candidates.score_candidates`).
    """
    popularity = filtered / "popularity.parquet"
    paths = {
        MODEL: scores if scores and has_scores(scores) else None,
        "oracle": oracle,
        **baselines,
        "target_popularity": popularity,
        "popularity": popularity,
        "chance": filtered,
    }
    scored = score_candidates(paths, filtered, only_used=only_used)
    ranks = {key: rank_targets(*rows) for key, rows in scored.items()}
    metrics: Metrics = {"confidence": confidence}
    if limited := find_limited_splits(filtered):
        metrics["budget"] = limited
    for (sampling, scorer, split), found in ranks.items():
        section = section_of(scorer) if split == "test" else split
        if scorer == MODEL or split == "test":
            metrics.setdefault(sampling, {})[section] = summarize(
                found, ks=ks, samples=bootstrap_samples, confidence=confidence, seed=seed
            )
    strata = measure_strata(
        ranks, filtered, samples=bootstrap_samples, confidence=confidence, seed=seed
    )
    if strata:
        metrics["strata"] = strata
    if lists:
        metrics["full_catalogue"] = measure_full_catalogue(
            retriever,
            *lists,
            samples=bootstrap_samples,
            confidence=confidence,
            seed=seed,
        )
    of_model = {
        sampling: rows
        for (sampling, scorer, split), rows in scored.items()
        if (scorer, split) == (MODEL, "test")
    }
    calibrations = {
        sampling: calibrate(rows, scored.get((sampling, MODEL, "valid")), calibration)
        for sampling, rows in of_model.items()
    }
    for sampling, calibrated in calibrations.items():
        metrics[sampling]["calibration"] = calibrated.figures
    return Evaluation(
        metrics=metrics,
        comparisons=_compare_all(ranks, confidence),
        ranks=ranks,
        curves=_curves(ranks, ks[-1]),
        histogram=_histogram(of_model),
        reliability=_reliability(calibrations),
    )


def _compare_all(ranks: Mapping[Key, TargetRanks], confidence: float) -> list[Comparison]:
    """Compare each scorer that knows the user with each that does not, on test."""
    values = {
        (sampling, scorer): auc(found)
        for (sampling, scorer, split), found in ranks.items()
        if split == "test"
    }
    compared: list[Comparison] = []
    for sampling in dict.fromkeys(sampling for sampling, _ in values):
        scorers = [scorer for each, scorer in values if each == sampling]
        pairs = [
            (scorer, baseline)
            for scorer in scorers
            if scorer not in UNTESTED
            for baseline in NON_PERSONAL
            if baseline in scorers
        ]
        differences = compare_pairs(
            [(values[sampling, scorer], values[sampling, baseline]) for scorer, baseline in pairs],
            confidence=confidence,
        )
        compared += [
            Comparison(sampling, *pair, difference)
            for pair, difference in zip(pairs, differences, strict=True)
        ]
    return compared


def _curves(ranks: Mapping[Key, TargetRanks], last: int) -> arrow.Table:
    """Average the metrics with a cut-off over test at each k from 1 to ``last``."""
    ks, metrics, rows = range(1, last + 1), metrics_with_cutoff(), []
    for (sampling, scorer, split), found in ranks.items():
        if split == "test":
            means = {key: values.mean() for key, values in measure(found, ks).items()}
            for k in ks:
                figures = {metric.name: round(means[metric.key(k)], 6) for metric in metrics}
                rows.append({"sampling": sampling, "scorer": scorer, "k": k, **figures})
    return arrow.Table.from_pylist(rows)


def _histogram(scored: Mapping[str, ScoredCandidates]) -> arrow.Table:
    """Count p(yes) = 1 / (1 + exp(-log-odds)) in bins, as shares of each label.

    Args:
        scored: The model's test candidates by sampling.
    """
    edges = np.linspace(0, 1, BINS + 1).round(6)
    rows = []
    for sampling, candidates in scored.items():
        for name, chosen in (("negative", ~candidates.labels), ("target", candidates.labels)):
            shares = _share_per_bin(candidates.scores[chosen], edges)
            for start, end, share in zip(edges[:-1], edges[1:], shares, strict=True):
                cells = {"p_yes": start, "p_yes_end": end, "share": share}
                rows.append({"sampling": sampling, "label": name, **cells})
    return arrow.Table.from_pylist(rows, HISTOGRAM)


def _reliability(calibrations: Mapping[str, Calibration]) -> arrow.Table:
    """Lay out the bins of the reliability diagrams, by sampling."""
    rows = [
        {
            "sampling": sampling,
            "scaling": method,
            "p_yes": round(each.probability, 6),
            "target_share": round(each.target_share, 6),
            "candidates": each.candidates,
        }
        for sampling, calibration in calibrations.items()
        for method, bins in calibration.bins.items()
        for each in bins
    ]
    return arrow.Table.from_pylist(rows, RELIABILITY)


def _share_per_bin(log_odds: Floats, edges: Floats) -> Floats:
    """Return the share of p(yes) between neighbouring edges."""
    counts, _ = np.histogram(sigmoid(log_odds), edges)
    shares: Floats = (counts / len(log_odds)).round(6)
    return shares
