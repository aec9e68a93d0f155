"""The paired tests: by hand, against SciPy, and what must hold for any differences."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mllm_msr.evaluation.comparisons import (
    compare,
    compare_pairs,
    holm,
    mean_interval,
    randomisation_test,
)

SAMPLES = 2000

differences = st.lists(st.integers(-40, 40), min_size=1, max_size=30).map(
    lambda values: np.array(values) / 40  # as differences of an AUC with 20 negatives are
)
few_settings = settings(max_examples=40, deadline=None)


def test_few_sequences_are_counted_by_hand():
    # Of the eight patterns of 1, 2, 3 only all plus and all minus reach a sum of 6.
    assert randomisation_test(np.array([1.0, 2.0, 3.0]), SAMPLES, 0) == 2 / 8
    # 1 + 2 - 3 = 0: every pattern is as large.
    assert randomisation_test(np.array([1.0, 2.0, -3.0]), SAMPLES, 0) == 1


@few_settings
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=9))
def test_an_exact_p_is_the_share_of_sign_patterns_that_are_as_large(values):
    observed = abs(sum(values))
    patterns = list(product((1, -1), repeat=len(values)))
    sums = [abs(sum(s * abs(v) for s, v in zip(p, values, strict=True))) for p in patterns]
    expected = np.mean([each >= observed for each in sums])
    assert randomisation_test(np.array(values) / 40, 10_000, 0) == pytest.approx(expected)


def test_a_drawn_p_is_scipys():
    values = np.random.default_rng(5).normal(0.2, 1, size=60)
    scipys = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=20_000, rng=1
    )
    assert randomisation_test(values, 20_000, 0) == pytest.approx(scipys.pvalue, abs=0.015)


@few_settings
@given(differences, st.integers(0, 9))
def test_a_p_value_does_not_depend_on_who_is_first(values, seed):
    assert randomisation_test(values, SAMPLES, seed) == randomisation_test(-values, SAMPLES, seed)


@few_settings
@given(differences, st.randoms())
def test_a_p_value_does_not_depend_on_the_order_of_the_sequences(values, random):
    shuffled = np.array(random.sample(list(values), len(values)))
    assert randomisation_test(shuffled, SAMPLES, 3) == randomisation_test(values, SAMPLES, 3)


@few_settings
@given(differences)
def test_sequences_without_a_difference_change_nothing(values):
    padded = np.concatenate([values, np.zeros(50)])
    assert randomisation_test(padded, SAMPLES, 3) == randomisation_test(values, SAMPLES, 3)


@few_settings
@given(differences)
def test_a_p_value_is_above_0_and_at_most_1(values):
    assert 0 < randomisation_test(values, 50, 0) <= 1


@pytest.mark.parametrize("sequences", [1, 5, 1000])
def test_scorers_that_are_alike_have_p_1_and_no_difference(sequences):
    values = np.random.default_rng(0).random(sequences)
    assert compare(values, values.copy(), samples=100, confidence=0.95, seed=0) == (0, 0, 0, 1)


def test_an_obvious_difference_is_found():
    generator = np.random.default_rng(1)
    worse = generator.random(100)
    better = worse + generator.normal(0.2, 0.1, size=100)
    found = compare(better, worse, samples=SAMPLES, confidence=0.95, seed=0)
    assert found.p == 1 / (SAMPLES + 1)  # none drawn is as large, and the observed one counts
    assert 0.15 < found.low < found.value < found.high < 0.25
    assert found.value == pytest.approx((better - worse).mean())


def test_p_is_uniform_where_there_is_no_difference():
    generator = np.random.default_rng(7)
    found = [randomisation_test(generator.normal(size=30), 400, seed=case) for case in range(400)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.025)


def test_the_test_keeps_its_level_on_few_coarse_differences():
    generator = np.random.default_rng(8)
    found = [
        randomisation_test(generator.integers(-2, 3, size=12) / 2, 500, seed=case)
        for case in range(400)
    ]
    assert np.mean(np.array(found) <= 0.05) <= 0.07


def test_the_interval_of_a_difference_is_paired():
    # Both vary a lot from sequence to sequence, and always by the same from each other.
    values = np.random.default_rng(2).normal(0, 10, size=50)
    found = compare(values + 0.5, values, samples=100, confidence=0.95, seed=0)
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))


def test_a_paired_comparison_needs_pairs():
    with pytest.raises(ValueError, match="same sequences"):
        compare(np.ones(3), np.ones(4), samples=10, confidence=0.95, seed=0)


@few_settings
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_a_family_is_each_comparison_with_p_values_of_holm(sequences, size, seed):
    generator = np.random.default_rng(seed)
    pairs = [tuple(generator.integers(0, 5, size=(2, sequences)) / 4) for _ in range(size)]
    settings = {"samples": 200, "confidence": 0.95, "seed": 0}
    single = [compare(*pair, **settings) for pair in pairs]
    family = compare_pairs(pairs, **settings)
    assert [each.p for each in family] == pytest.approx(holm([each.p for each in single]))
    for one, other in zip(family, single, strict=True):
        assert one[:3] == pytest.approx(other[:3], abs=1e-9)


def test_a_family_of_no_pair_has_no_difference():
    assert compare_pairs([], confidence=0.95) == []


def test_a_family_needs_the_same_sequences_in_every_pair():
    pairs = [(np.ones(3), np.ones(3)), (np.ones(4), np.ones(4))]
    with pytest.raises(ValueError, match="same sequences"):
        compare_pairs(pairs, samples=10, confidence=0.95)


def test_holms_correction_by_hand():
    # Sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, and none below one before it.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.7, 0.6]).tolist() == [1, 1]
    assert holm([]).tolist() == []


@few_settings
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holms_correction_never_makes_smaller_and_keeps_the_order(values):
    corrected = holm(values)
    assert (corrected >= values).all()
    assert (corrected <= 1).all()
    order = np.argsort(values, kind="stable")
    assert (np.diff(corrected[order]) >= 0).all()
    assert min(corrected) == pytest.approx(min(1, len(values) * min(values)))


def test_an_interval_over_runs_is_students():
    runs = [0.917, 0.899, 0.927]
    mean, low, high = mean_interval(runs, 0.95)
    expected = stats.t.interval(0.95, 2, loc=np.mean(runs), scale=stats.sem(runs))
    assert (mean, low, high) == pytest.approx((np.mean(runs), *expected))


def test_one_run_has_no_interval_over_runs():
    mean, *bounds = mean_interval([0.9], 0.95)
    assert mean == 0.9
    assert np.isnan(bounds).all()
