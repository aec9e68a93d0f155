"""Calibration: whether candidates with p(yes) = x are targets in a share x of the cases.

p(yes) is the sigmoid of the model's log-odds. The model was trained on pairs with another share of
targets than an evaluation has, so p(yes) need not be such a share. A scaling turns log-odds into
probabilities that are: ``sigmoid(slope * log_odds + intercept)``, fitted on the validation
candidates of the same protocol.

- ``platt``: both are fitted (Platt 1999, "Probabilistic Outputs for Support Vector Machines").
- ``temperature``: the intercept is 0, and the slope 1 / temperature (Guo et al. 2017, "On
  Calibration of Modern Neural Networks").

Where the candidates of test have another number of negatives to a target than those of valid, the
intercept moves by the logarithm of the ratio of both odds: the scores of targets and of negatives
are as they were, only their shares differ (Saerens et al. 2002, "Adjusting the Outputs of a
Classifier to New a Priori Probabilities").

The slope is never negative, so a scaling keeps the order of the candidates, and no metric of ranks
depends on it.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.evaluation.scored_candidates import ScoredCandidates

Method = Literal["none", "temperature", "platt"]
Labels = npt.NDArray[np.bool_]

BINS = 15  # as in Guo et al. (2017)
STEPS = 100  # of Newton's method; it needs about ten
CONVERGED = 1e-10  # greatest step that counts as none


class Scaling(NamedTuple):
    """Log-odds to probabilities, keeping their order."""

    slope: float  # 0 or more
    intercept: float

    def apply(self, log_odds: Floats) -> Floats:
        """Return the probability of each of the log-odds, any shape."""
        return sigmoid(self.slope * log_odds + self.intercept)

    def move(self, valid: Labels, test: Labels) -> "Scaling":
        """Return the scaling for the share of targets among other candidates of the same kind.

        Args:
            valid: [candidates] True for targets, of the candidates that it was fitted on.
            test: [candidates] The same of the others. Only the shares count, which the numbers of
                negatives decide.
        """
        # Products of counts, so that equal shares move nothing, not even by rounding.
        more, less = test.sum() * (~valid).sum(), valid.sum() * (~test).sum()
        return self._replace(intercept=self.intercept + float(np.log(more / less)))


class ReliabilityBin(NamedTuple):
    """Candidates of similar probability."""

    probability: float  # their mean
    target_share: float  # the share of targets among them
    candidates: int


def sigmoid(log_odds: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)); by tanh, since exp would overflow."""
    probabilities: Floats = (1 + np.tanh(np.asarray(log_odds) / 2)) / 2
    return probabilities


def fit_scaling(
    log_odds: Floats, labels: Labels, method: Literal["temperature", "platt"]
) -> Scaling:
    """Fit a scaling by maximum likelihood.

    Targets count as ``(n + 1) / (n + 2)`` instead of 1 and negatives as ``1 / (m + 2)`` instead of
    0, for n targets and m negatives, as Platt (1999) proposes. So the fit is finite where the
    scores separate targets from negatives, and where there are only negatives.

    Where a higher score goes with fewer targets, the best slope that keeps the order is 0: every
    candidate then has the same probability.

    Args:
        log_odds: [candidates] Finite; at least one.
        labels: [candidates] True for targets.
        method: Whether there is an intercept.
    """
    targets = int(labels.sum())
    wanted = np.where(labels, (targets + 1) / (targets + 2), 1 / (len(labels) - targets + 2))
    share = float(wanted.mean())
    level = float(np.log(share / (1 - share))) if method == "platt" else 0.0  # without the scores
    scale = float(np.abs(log_odds).max())
    if scale == 0 or (method == "platt" and np.ptp(log_odds) == 0):
        return Scaling(0.0, level)
    scores = log_odds / scale  # so that both columns are of one size
    columns = [scores, np.ones_like(scores)] if method == "platt" else [scores]
    start = np.array([0.0, level][: len(columns)])
    slope, *intercept = _maximize_likelihood(np.column_stack(columns), wanted, start)
    if slope <= 0:
        return Scaling(0.0, level)
    return Scaling(float(slope) / scale, float(intercept[0]) if intercept else 0.0)


def bin_by_probability(
    probabilities: Floats, labels: Labels, bins: int = BINS
) -> list[ReliabilityBin]:
    """Split candidates into bins of about equal size, ascending by probability.

    With one target among many negatives most probabilities are small, and bins of equal width would
    leave all but the first nearly empty. Equal probabilities are in one bin.

    Args:
        probabilities: [candidates] At least one.
        labels: [candidates] True for targets.
        bins: The greatest number of bins.
    """
    edges = np.quantile(probabilities, np.arange(1, bins) / bins)
    number = np.searchsorted(edges, probabilities, side="right")
    counts: Integers = np.bincount(number, minlength=bins)
    sums = np.bincount(number, probabilities, bins), np.bincount(number, labels, bins)
    return [
        ReliabilityBin(float(sum_ / count), float(targets / count), int(count))
        for sum_, targets, count in zip(*sums, counts, strict=True)
        if count
    ]


def calibration_error(bins: list[ReliabilityBin]) -> float:
    """Return the expected calibration error (ECE, Guo et al. 2017, equation 3), 0..1.

    Over the candidates, average how far the mean probability of their bin is from its share of
    targets.
    """
    total = sum(each.candidates for each in bins)
    return sum(each.candidates * abs(each.probability - each.target_share) / total for each in bins)


def brier_score(probabilities: Floats, labels: Labels) -> float:
    """Return the mean squared difference of probability and label (Brier 1950), 0..1."""
    return float(np.mean((probabilities - labels) ** 2))


class Calibration(NamedTuple):
    """What p(yes) is worth as a probability, on test candidates.

    Attributes:
        figures: The section ``calibration`` of ``metrics.json``: ``candidates``, ``target_share``,
            ``ece`` and ``brier`` of p(yes); with a scaling also its ``slope`` and ``intercept``,
            ``ece_calibrated`` and ``brier_calibrated``. Rounded to 6 decimals.
        bins: The reliability diagram by method, ``none`` and the one that was fitted.
    """

    figures: dict[str, float]
    bins: dict[Method, list[ReliabilityBin]]


def calibrate(
    test: ScoredCandidates, valid: ScoredCandidates | None, method: Method
) -> Calibration:
    """Measure the calibration of p(yes) on test, before and after a scaling fitted on valid.

    Args:
        test: The model's candidates of test.
        valid: Those of valid, of the same sampling; without them there is no scaling.
        method: Of the scaling.
    """
    bins: dict[Method, list[ReliabilityBin]] = {}
    figures = {"candidates": len(test.labels), "target_share": float(test.labels.mean())}
    bins["none"] = bin_by_probability(sigmoid(test.scores), test.labels)
    figures["ece"] = calibration_error(bins["none"])
    figures["brier"] = brier_score(sigmoid(test.scores), test.labels)
    if valid is not None and method != "none":
        fitted = fit_scaling(valid.scores, valid.labels, method)
        scaling = fitted.move(valid.labels, test.labels)
        probabilities = scaling.apply(test.scores)
        bins[method] = bin_by_probability(probabilities, test.labels)
        figures |= scaling._asdict()
        figures["ece_calibrated"] = calibration_error(bins[method])
        figures["brier_calibrated"] = brier_score(probabilities, test.labels)
    return Calibration({name: round(figure, 6) for name, figure in figures.items()}, bins)


def scaling_of(figures: Mapping[str, float] | None) -> Scaling | None:
    """Return the scaling of a section ``calibration`` of the metrics, if one was fitted."""
    if figures is None or "slope" not in figures:
        return None
    return Scaling(figures["slope"], figures["intercept"])


def _maximize_likelihood(columns: Floats, wanted: Floats, start: Floats) -> Floats:
    """Fit a logistic regression by Newton's method, with steps halved until they improve.

    Args:
        columns: [rows, coefficients]
        wanted: [rows] Probability that a row is of the positive class, in 0..1 exclusive.
        start: [coefficients]

    Returns:
        [coefficients]
    """

    def loss(coefficients: Floats) -> float:
        odds = columns @ coefficients
        return float(np.sum(np.logaddexp(0, odds) - wanted * odds))

    found, least = start, loss(start)
    for _ in range(STEPS):
        probabilities = sigmoid(columns @ found)
        gradient = columns.T @ (wanted - probabilities)
        curvature = (columns.T * (probabilities * (1 - probabilities))) @ columns
        step = np.linalg.lstsq(curvature, gradient, rcond=None)[0]  # singular for equal scores
        while loss(found + step) > least and np.abs(step).max() > CONVERGED:
            step = step / 2
        if np.abs(step).max() <= CONVERGED * max(1.0, float(np.abs(found).max())):
            break
        found = found + step
        least = loss(found)
    return found
