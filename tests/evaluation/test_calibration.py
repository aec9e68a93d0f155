"""Calibration: errors by hand, scalings that are known, and cases without an ordinary fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from mllm_msr.core.arrays import Floats
from mllm_msr.evaluation.calibration import (
    BINS,
    Scaling,
    bin_by_probability,
    brier_score,
    calibrate,
    calibration_error,
    fit_scaling,
    scaling_of,
    sigmoid,
)
from mllm_msr.evaluation.scored_candidates import ScoredCandidates

METHODS = ["temperature", "platt"]
scores = st.floats(-1e3, 1e3).map(lambda value: round(value, 6))
candidates = st.lists(st.tuples(scores, st.booleans()), min_size=1, max_size=60)

every_method = pytest.mark.parametrize("method", METHODS)


def split(rows: list[tuple[float, bool]]) -> tuple[Floats, np.ndarray]:
    log_odds, labels = zip(*rows, strict=True)
    return np.array(log_odds), np.array(labels)


def draw(scaling: Scaling, count: int, seed: int = 0) -> tuple[Floats, np.ndarray]:
    """Draw log-odds, and labels whose probability is their scaling."""
    generator = np.random.default_rng(seed)
    log_odds = generator.normal(0, 2, count)
    return log_odds, generator.random(count) < scaling.apply(log_odds)


def error(probabilities: Floats, labels: np.ndarray) -> float:
    return calibration_error(bin_by_probability(probabilities, labels))


def scored(log_odds: Floats, labels: np.ndarray) -> ScoredCandidates:
    return ScoredCandidates(np.arange(len(labels)), log_odds, labels)


# -- errors ----------------------------------------------------------------------------------------


def test_the_errors_are_those_computed_by_hand() -> None:
    probabilities = np.array([0.1, 0.1, 0.8, 0.6])
    labels = np.array([False, True, True, False])
    low, high = bin_by_probability(probabilities, labels, bins=2)
    assert low == (pytest.approx(0.1), 0.5, 2)
    assert high == (pytest.approx(0.7), 0.5, 2)
    assert calibration_error([low, high]) == pytest.approx((0.4 + 0.2) / 2)
    assert brier_score(probabilities, labels) == pytest.approx((0.01 + 0.81 + 0.04 + 0.36) / 4)


@given(candidates)
def test_errors_are_between_0_and_1(rows: list[tuple[float, bool]]) -> None:
    log_odds, labels = split(rows)
    probabilities = sigmoid(log_odds)
    assert 0 <= error(probabilities, labels) <= 1
    assert 0 <= brier_score(probabilities, labels) <= 1


@given(candidates)
def test_bins_hold_every_candidate_once_and_ascend(rows: list[tuple[float, bool]]) -> None:
    log_odds, labels = split(rows)
    bins = bin_by_probability(sigmoid(log_odds), labels)
    assert sum(each.candidates for each in bins) == len(rows)
    assert sum(each.candidates * each.target_share for each in bins) == pytest.approx(labels.sum())
    means = [each.probability for each in bins]
    assert means == sorted(means)
    assert 1 <= len(bins) <= BINS


def test_equal_probabilities_are_in_one_bin() -> None:
    labels = np.arange(100) < 20
    assert bin_by_probability(np.full(100, 0.2), labels) == [(pytest.approx(0.2), 0.2, 100)]
    assert error(np.full(100, 0.2), labels) == pytest.approx(0)


def test_probabilities_that_labels_are_drawn_by_are_calibrated() -> None:
    log_odds, labels = draw(Scaling(1, 0), 50_000)
    assert error(sigmoid(log_odds), labels) < 0.01
    assert error(sigmoid(2 * log_odds), labels) > 0.05


def test_no_log_odds_overflow() -> None:
    with np.errstate(all="raise"):
        assert sigmoid(np.array([-1e308, 0.0, 1e308])).tolist() == [0, 0.5, 1]


# -- scalings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [Scaling(1, 0), Scaling(0.5, -2), Scaling(3, 1)])
def test_platt_scaling_finds_the_scaling_that_labels_are_drawn_by(scaling: Scaling) -> None:
    log_odds, labels = draw(scaling, 50_000)
    assert fit_scaling(log_odds, labels, "platt") == pytest.approx(scaling, abs=0.1)


def test_temperature_scaling_finds_the_slope_and_has_no_intercept() -> None:
    log_odds, labels = draw(Scaling(0.5, 0), 50_000)
    slope, intercept = fit_scaling(log_odds, labels, "temperature")
    assert slope == pytest.approx(0.5, abs=0.02)
    assert intercept == 0


@every_method
@pytest.mark.parametrize("seed", range(5))
def test_a_fit_is_the_greatest_likelihood_that_another_optimizer_finds(
    method: str, seed: int
) -> None:
    log_odds, labels = draw(Scaling(0.7, -1), 200, seed)
    targets, negatives = labels.sum(), (~labels).sum()
    wanted = np.where(labels, (targets + 1) / (targets + 2), 1 / (negatives + 2))

    def loss(coefficients: Floats) -> float:
        slope, intercept = (*coefficients, 0.0)[:2]
        odds = slope * log_odds + intercept
        return float(np.sum(np.logaddexp(0, odds) - wanted * odds))

    start = [1.0, 0.0] if method == "platt" else [1.0]
    found = minimize(loss, start, method="BFGS").x
    fitted = fit_scaling(log_odds, labels, method)
    assert fitted[: len(start)] == pytest.approx(found, abs=1e-3)


@every_method
@given(rows=candidates)
def test_a_scaling_is_finite_and_never_turns_the_order_around(
    method: str, rows: list[tuple[float, bool]]
) -> None:
    log_odds, labels = split(rows)
    scaling = fit_scaling(log_odds, labels, method)
    assert np.isfinite(scaling).all()
    assert scaling.slope >= 0
    scaled = scaling.apply(log_odds)
    assert ((scaled >= 0) & (scaled <= 1)).all()
    ascending = scaled[np.argsort(log_odds)]
    assert (np.diff(ascending) >= 0).all()


@given(st.lists(st.integers(-20, 20), min_size=1, unique=True), st.floats(0.1, 1))
def test_a_positive_slope_keeps_every_pair_in_order(log_odds: list[int], slope: float) -> None:
    values = np.array(log_odds, dtype=float)
    probabilities = Scaling(slope, -1.9).apply(values)
    assert np.argsort(probabilities).tolist() == np.argsort(values).tolist()


@every_method
def test_the_same_candidates_give_the_same_scaling(method: str) -> None:
    log_odds, labels = draw(Scaling(0.7, -1), 500)
    fits = {fit_scaling(log_odds.copy(), labels.copy(), method) for _ in range(3)}
    assert len(fits) == 1


# -- cases without an ordinary fit -----------------------------------------------------------------


@every_method
def test_scores_that_separate_the_labels_have_a_finite_slope(method: str) -> None:
    log_odds = np.array([-3.0, -2.0, -1.0, 1.0, 2.0])
    slope, _ = fit_scaling(log_odds, log_odds > 0, method)
    assert 0.1 < slope < 10


@pytest.mark.parametrize("label", [False, True])
def test_labels_of_one_class_have_a_finite_scaling(label: bool) -> None:
    log_odds, labels = np.array([-1.0, 0.5, 2.0]), np.full(3, label)
    probabilities = fit_scaling(log_odds, labels, "platt").apply(log_odds)
    assert probabilities == pytest.approx(np.full(3, 0.8 if label else 0.2))


@every_method
def test_scores_in_the_wrong_order_say_nothing(method: str) -> None:
    log_odds = np.array([-2.0, -1.0, 0.5, 1.0, 2.0])
    labels = log_odds < -1.5
    slope, intercept = fit_scaling(log_odds, labels, method)
    assert slope == 0
    assert sigmoid(np.array(intercept)) == pytest.approx(
        # Platt's targets: 2/3 of one candidate, 1/6 of four
        (2 / 3 + 4 / 6) / 5 if method == "platt" else 0.5
    )


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_equal_scores_get_the_share_of_targets(value: float) -> None:
    labels = np.arange(21) == 0
    scaling = fit_scaling(np.full(21, value), labels, "platt")
    assert scaling.slope == 0
    assert scaling.apply(np.array([value]))[0] == pytest.approx((2 / 3 + 20 / 22) / 21)


def test_the_scale_of_the_scores_does_not_matter() -> None:
    log_odds, labels = draw(Scaling(1, -1), 500)
    slope, intercept = fit_scaling(log_odds, labels, "platt")
    for factor in (1e-6, 1e6):
        scaled = fit_scaling(factor * log_odds, labels, "platt")
        assert scaled.slope * factor == pytest.approx(slope)
        assert scaled.intercept == pytest.approx(intercept)


# -- the section -----------------------------------------------------------------------------------


def test_a_scaling_fitted_on_valid_lowers_the_error_on_test() -> None:
    truth = Scaling(0.6, -2)
    test, valid = (scored(*draw(truth, 5_000, seed)) for seed in (1, 2))
    figures, bins = calibrate(test, valid, "platt")
    assert figures["ece"] > 0.1
    assert figures["ece_calibrated"] < 0.03
    assert figures["brier_calibrated"] < figures["brier"]
    assert scaling_of(figures) == pytest.approx(truth, abs=0.2)
    assert list(bins) == ["none", "platt"]
    assert figures["candidates"] == 5_000


def ask(targets: int, negatives: int, seed: int) -> ScoredCandidates:
    """Draw sequences of one target and some negatives; only the negatives' number varies."""
    generator = np.random.default_rng(seed)
    labels = np.tile(np.arange(negatives + 1) == 0, targets)
    return scored(generator.normal(np.where(labels, 2.0, 0.0), 1.0), labels)


@pytest.mark.parametrize("negatives", [1, 5, 100])
def test_another_number_of_negatives_in_valid_moves_the_intercept(negatives: int) -> None:
    test, same, other = ask(3_000, 20, 1), ask(3_000, 20, 2), ask(3_000, negatives, 3)
    wanted = scaling_of(calibrate(test, same, "platt")[0])
    figures, _ = calibrate(test, other, "platt")
    assert scaling_of(figures) == pytest.approx(wanted, abs=0.2)
    assert figures["ece_calibrated"] < 0.01
    fitted = fit_scaling(other.scores, other.labels, "platt")
    unmoved = fitted.apply(test.scores)
    assert error(unmoved, test.labels) > 2 * figures["ece_calibrated"]


@every_method
def test_equal_numbers_of_negatives_move_nothing(method: str) -> None:
    test, valid = ask(150, 20, 1), ask(90, 20, 2)
    fitted = fit_scaling(valid.scores, valid.labels, method)
    assert fitted.move(valid.labels, test.labels) == fitted


@pytest.mark.parametrize(("has_valid", "method"), [(False, "platt"), (True, "none")])
def test_without_valid_or_a_method_p_yes_alone_is_measured(has_valid: bool, method: str) -> None:
    candidates = scored(*draw(Scaling(1, 0), 100))
    figures, bins = calibrate(candidates, candidates if has_valid else None, method)
    assert list(figures) == ["candidates", "target_share", "ece", "brier"]
    assert list(bins) == ["none"]
    assert scaling_of(figures) is None


def test_a_run_without_a_model_has_no_scaling() -> None:
    assert scaling_of(None) is None
