"""Figures on the whole catalogue: a retriever proposes N items, and the model ranks them again.

The rows are the retriever alone, the model's reranking of what it retrieved, a fusion of both, and
each baseline that scores all items. A target that is not in a row's list is a miss: it counts as
one at an infinite rank, so the recall of the retriever bounds every metric of the reranking.

The fusion adds the scores of both, standardized within each sequence: ``(1 - w) * z(retriever) +
w * z(model)``. The weight is the one with the highest NDCG@10 on the sequences of valid.

Three properties describe the lists of the first ten items: the share of the catalogue that is in
any of them, the known interactions of an item in them, and how alike the titles of a list are (the
mean cosine of the TF-IDF vectors of two of its items).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.evaluation.comparisons import compare_pairs
from mllm_msr.evaluation.metrics import bootstrap_interval, metrics_with_cutoff, ndcg
from mllm_msr.ranking import TargetRanks

KS = (5, 10, 20)  # of HR@k, NDCG@k and MRR@k
DEPTH = 10  # k of the choice of the weight, of the tests and of the properties of lists
SIZES = (5, 10, 20, 50, 100, 200, 500, 1000)  # numbers of candidates, as far as there are so many
WEIGHTS = tuple(step / 20 for step in range(21))
MISSED = 2**31  # above a target that is not in a list, so at no finite k
RETRIEVER, RERANKED, FUSION = "retriever", "reranked", "fusion"


@dataclass(frozen=True)
class Lists:
    """A ranked list of items for each sequence; [rows] each but for the first.

    Attributes:
        sequences: [sequences] Identifiers, ascending.
        rows: Index of each row's sequence, ascending.
        items: Number of each row's item.
        scores: Higher is better.
        labels: True for the target.
        places: Position in the list, from 1; it orders equal scores where a list is cut off.
    """

    sequences: Integers
    rows: Integers
    items: Integers
    scores: Floats
    labels: npt.NDArray[np.bool_]
    places: Integers

    def first(self, number: int) -> "Lists":
        """Return the first items of each list, at most so many."""
        kept = self.places <= number
        parts = ("rows", "items", "scores", "labels", "places")
        return replace(self, **{name: getattr(self, name)[kept] for name in parts})

    def by(self, scores: Floats) -> "Lists":
        """Return the same items in the order of other scores, [rows]; equal ones keep theirs."""
        order = np.lexsort((self.places, -scores, self.rows))
        starts = np.searchsorted(self.rows, self.rows)  # rows are ascending before and after
        return Lists(
            self.sequences,
            self.rows,
            self.items[order],
            scores[order],
            self.labels[order],
            np.arange(len(order)) - starts + 1,
        )


@dataclass(frozen=True)
class Catalogue:
    """What is known of the items, by their numbers.

    Attributes:
        interactions: [items] Known interactions.
        titles: [items, terms] Vectors of unit length, or of zeros.
    """

    interactions: Integers
    titles: sparse.csr_array


@dataclass(frozen=True)
class Reranked:
    """The lists of a retriever, and the model's scores of their rows, [rows].

    Attributes:
        lists: In the order of the retriever.
        scores: Log-odds; None where no model was run.
    """

    lists: Lists
    scores: Floats | None


def rank_in_lists(lists: Lists) -> TargetRanks:
    """Count the items above each target in its list; :data:`MISSED` where it is not in it."""
    count = len(lists.sequences)
    of_target = np.full(count, np.inf)
    of_target[lists.rows[lists.labels]] = lists.scores[lists.labels]
    values = of_target[lists.rows]  # [rows]
    above = np.bincount(lists.rows[lists.scores > values], minlength=count)
    level = (lists.scores == values) & ~lists.labels
    found = np.bincount(lists.rows[lists.labels], minlength=count) > 0
    candidates = np.bincount(lists.rows, minlength=count)
    tied = np.where(found, np.bincount(lists.rows[level], minlength=count), 0)
    return TargetRanks(lists.sequences, candidates, np.where(found, above, MISSED), tied)


def recall(lists: Lists, number: int) -> Floats:
    """Return whether each target is among the first items of its list, [sequences] of 0 and 1."""
    found = lists.labels & (lists.places <= number)
    counts: Integers = np.bincount(lists.rows[found], minlength=len(lists.sequences))
    return counts.astype(np.float64)


def standardize(rows: Integers, scores: Floats) -> Floats:
    """Return scores with mean 0 and deviation 1 in each sequence; 0 where all are equal."""
    count = np.maximum(np.bincount(rows), 1)
    lowest = np.full(len(count), np.inf)
    np.minimum.at(lowest, rows, scores)
    shifted = scores - lowest[rows]  # exactly 0 where all are equal
    centred = shifted - (np.bincount(rows, shifted) / count)[rows]
    deviations = np.sqrt(np.bincount(rows, centred**2) / count)[rows]
    standardized: Floats = np.zeros_like(centred)
    np.divide(centred, deviations, out=standardized, where=deviations > 0)
    return standardized


def fuse(reranked: Reranked, weight: float) -> Lists:
    """Return the lists in the order of both scores: 0 is the retriever's, 1 the model's."""
    lists = reranked.lists
    assert reranked.scores is not None, "there is a model to fuse with"
    if weight in (0, 1):  # exactly, without the rounding of standardized scores
        return lists.by(lists.scores if weight == 0 else reranked.scores)
    own, others = (standardize(lists.rows, each) for each in (lists.scores, reranked.scores))
    return lists.by((1 - weight) * own + weight * others)


def choose_weight(valid: Reranked) -> float:
    """Return the weight with the highest mean NDCG@10; of equal ones the middle one."""
    means = [
        round(float(ndcg(rank_in_lists(fuse(valid, weight)), DEPTH).mean()), 9)
        for weight in WEIGHTS
    ]
    best = [weight for weight, mean in zip(WEIGHTS, means, strict=True) if mean == max(means)]
    return best[len(best) // 2]


def describe_lists(lists: Lists, catalogue: Catalogue) -> dict[str, float]:
    """Return coverage, mean popularity and mean similarity within a list, of the first ten."""
    first = lists.first(DEPTH)
    shares = len(np.unique(first.items)) / len(catalogue.interactions)
    return {
        f"coverage@{DEPTH}": round(shares, 6),
        f"popularity@{DEPTH}": round(float(catalogue.interactions[first.items].mean()), 6),
        f"similarity@{DEPTH}": round(_measure_similarity(first, catalogue.titles), 6),
    }


def measure_full_catalogue(
    retriever: str,
    valid: Reranked,
    test: Reranked,
    baselines: Mapping[str, Lists],
    catalogue: Catalogue,
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Compute the section ``full_catalogue`` of ``metrics.json``.

    Args:
        retriever: Its name.
        valid: Lists of the sequences of valid, which choose the weight of the fusion.
        test: Lists of the sequences of test.
        baselines: Further lists of test, by scorer.
        catalogue: All items.
        samples: Resamples per interval.
        confidence: Coverage of the intervals.
        seed: Seed of the resamples.

    Returns:
        The retriever, numbers of items, candidates and sequences, ``weight``, ``recall`` by number
        of candidates, ``rows`` with the figures of each row, ``by_candidates`` with those of the
        reranking of fewer candidates at ten, and ``comparisons``, differences in NDCG@10 by row and
        other row with Holm-corrected p values.
    """
    size = int(test.lists.places.max())
    sizes = [*(each for each in SIZES if each < size), size]
    summarize = partial(_summarize, samples=samples, confidence=confidence, seed=seed)
    rows = {RETRIEVER: test.lists}
    section: dict[str, Any] = {
        "retriever": retriever,
        "items": len(catalogue.interactions),
        "candidates": size,
        "sequences": len(test.lists.sequences),
        "recall": {str(each): summarize({"recall": recall(test.lists, each)}) for each in sizes},
    }
    if test.scores is not None:
        section["weight"] = choose_weight(valid)
        rows |= {RERANKED: fuse(test, 1.0), FUSION: fuse(test, section["weight"])}
        section["by_candidates"] = {
            str(each): summarize(_measure(_cut(test, each), (DEPTH,))) for each in sizes
        }
    rows |= baselines
    section["rows"] = {
        name: summarize(_measure(lists, KS)) | describe_lists(lists, catalogue)
        for name, lists in rows.items()
    }
    section["comparisons"] = _compare(rows, confidence)
    return section


def _cut(reranked: Reranked, number: int) -> Lists:
    """Return the model's order of the first candidates of each sequence."""
    assert reranked.scores is not None, "there is a model"
    kept = reranked.lists.places <= number
    return reranked.lists.first(number).by(reranked.scores[kept])


def _measure(lists: Lists, ks: Sequence[int]) -> dict[str, Floats]:
    """Return each metric of each sequence, [sequences] each."""
    ranks = rank_in_lists(lists)
    return {
        metric.key(k): metric.function(ranks, k) for k in ks for metric in metrics_with_cutoff()
    }


def _summarize(
    values: Mapping[str, Floats], *, samples: int, confidence: float, seed: int
) -> dict[str, float]:
    """Average each metric over the sequences, with its interval, rounded to 6 decimals."""
    columns = np.column_stack(list(values.values()))
    lows, highs = bootstrap_interval(columns, samples, confidence, seed)
    summary: dict[str, float] = {}
    for name, mean, low, high in zip(values, columns.mean(axis=0), lows, highs, strict=True):
        figures = {name: mean, f"{name}_low": low, f"{name}_high": high}
        summary |= {key: round(float(figure), 6) for key, figure in figures.items()}
    return summary


def _compare(rows: Mapping[str, Lists], confidence: float) -> dict[str, dict[str, Any]]:
    """Test the NDCG@10 of the reranking and of the fusion against all other rows, as one family."""
    values = {name: ndcg(rank_in_lists(lists), DEPTH) for name, lists in rows.items()}
    ours = [name for name in (RERANKED, FUSION) if name in rows]
    pairs = [(name, other) for name in ours for other in rows if other not in ours]
    pairs += [(FUSION, RERANKED)] if ours else []
    found = compare_pairs(
        [(values[name], values[other]) for name, other in pairs], confidence=confidence
    )
    compared: dict[str, dict[str, Any]] = {}
    for (name, other), difference in zip(pairs, found, strict=True):
        named = ("difference", "low", "high", "p")
        figures = {key: round(each, 6) for key, each in zip(named, difference, strict=True)}
        compared.setdefault(name, {})[other] = figures
    return compared


def _measure_similarity(lists: Lists, titles: sparse.csr_array) -> float:
    """Return the mean cosine of two different items of a list; 0 where no list has two.

    The inner products of all pairs of a list are the square of the sum of its vectors, less the
    products of the vectors with themselves.
    """
    count = len(lists.sequences)
    places = (np.ones(len(lists.rows)), (lists.rows, np.arange(len(lists.rows))))
    vectors = titles[lists.items]
    sums = sparse.csr_array(places, shape=(count, len(lists.rows))) @ vectors
    squares = np.asarray(sums.multiply(sums).sum(axis=1)).ravel()
    own = np.bincount(lists.rows, np.asarray(vectors.multiply(vectors).sum(axis=1)).ravel(), count)
    sizes = np.bincount(lists.rows, minlength=count)
    several = sizes > 1
    if not several.any():
        return 0.0
    return float(((squares - own)[several] / (sizes * (sizes - 1))[several]).mean())
