"""The metrics against values computed by hand, scikit-learn, ranx, and properties of any scores."""

import tracemalloc
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranx_figures import KS, ranx_figures
from scipy import stats
from sklearn.metrics import ndcg_score, roc_auc_score

from mllm_msr import ranking
from mllm_msr.evaluation import metrics
from mllm_msr.evaluation.metrics import bootstrap_interval, measure, summarize
from mllm_msr.ranking import TargetRanks, rank_targets


def rank(*questions: list[float]) -> TargetRanks:
    """Rank the first score of each question among the rest."""
    sequences = np.repeat(np.arange(len(questions)), [len(q) for q in questions])
    labels = np.concatenate([np.arange(len(q)) == 0 for q in questions])
    return rank_targets(sequences, np.concatenate(questions).astype(float), labels)


def random_questions(seed: int, levels: int = 4) -> list[list[float]]:
    """Make questions of 2 to 21 candidates with scores of few levels, so that most have ties."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(2, 22, size=40)
    return [generator.integers(levels, size=size).astype(float).tolist() for size in sizes]


def test_a_target_without_ties_has_its_rank():
    ranks = rank([0.5, 0.9, 0.7, 0.1, 0.0])  # third of five
    assert ranking.expected_rank(ranks).tolist() == [3.0]
    assert ranking.auc(ranks).tolist() == [0.5]  # two of four negatives below
    assert [metrics.hit_rate(ranks, k)[0] for k in (2, 3)] == [0.0, 1.0]
    assert metrics.ndcg(ranks, 3)[0] == pytest.approx(0.5)  # 1 / log2(4)
    assert metrics.reciprocal_rank(ranks, 3)[0] == pytest.approx(1 / 3)
    assert metrics.ndcg(ranks, 2)[0] == metrics.reciprocal_rank(ranks, 2)[0] == 0


def test_a_tied_target_gets_the_mean_over_the_orders_of_its_ties():
    ranks = rank([0.5, 0.9, 0.5, 0.5, 0.1])  # ranks 2, 3 and 4 are as likely
    assert ranking.expected_rank(ranks).tolist() == [3.0]
    assert ranking.auc(ranks).tolist() == [0.5]  # one below, two halves
    assert metrics.hit_rate(ranks, 3)[0] == pytest.approx(2 / 3)
    assert metrics.ndcg(ranks, 3)[0] == pytest.approx((1 / np.log2(3) + 1 / 2) / 3)
    assert metrics.reciprocal_rank(ranks, 3)[0] == pytest.approx((1 / 2 + 1 / 3) / 3)


def test_every_order_of_the_ties_counts_alike():
    scores = [1.0, 2.0, 1.0, 1.0, 0.0]
    sorted_orders = [
        order
        for order in permutations(range(5))
        if [scores[i] for i in order] == sorted(scores, reverse=True)
    ]
    gains = [1 / (order.index(0) + 1) if order.index(0) < 3 else 0 for order in sorted_orders]
    assert metrics.reciprocal_rank(rank(scores), 3)[0] == pytest.approx(np.mean(gains))


def test_a_constant_scorer_has_the_figures_of_chance():
    figures = measure(rank([0.0] * 21), [5])
    rounded = {name: round(float(value[0]), 3) for name, value in figures.items()}
    assert rounded == {"auc": 0.5, "hr@5": 0.238, "ndcg@5": 0.140, "mrr@5": 0.109}


def test_sequences_may_differ_in_their_number_of_candidates():
    ranks = rank([1.0, 0.0], [0.0, 1.0, 2.0])
    assert ranks.candidates.tolist() == [2, 3]
    assert ranking.auc(ranks).tolist() == [1.0, 0.0]
    assert metrics.hit_rate(ranks, 10).tolist() == [1.0, 1.0]


def test_infinite_scores_rank_and_tie_like_others():
    ranks = rank([-np.inf, -np.inf, np.inf])
    assert (ranks.above.tolist(), ranks.tied.tolist()) == ([1], [1])


def test_the_share_of_ties_is_over_sequences():
    assert metrics.share_of_ties(rank([1.0, 1.0], [1.0, 0.0], [0.0, 1.0, 1.0])) == 1 / 3


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        rank([np.nan, 1.0])


@pytest.mark.parametrize("labels", [[False, False], [True, True]])
def test_a_sequence_without_exactly_one_target_is_refused(labels):
    with pytest.raises(ValueError, match="exactly one target"):
        rank_targets([7, 7], [0.0, 1.0], labels)


def test_a_sequence_without_negatives_is_refused():
    with pytest.raises(ValueError, match="at least one negative"):
        rank_targets([7], [0.0], [True])


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_scikit_learns_on_scores_with_ties(seed):
    questions = random_questions(seed)
    expected = [roc_auc_score(np.arange(len(q)) == 0, q) for q in questions]
    assert ranking.auc(rank(*questions)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", KS)
def test_ndcg_is_scikit_learns_on_scores_with_ties(k):
    questions = random_questions(k)
    expected = [ndcg_score([np.arange(len(q)) == 0], [q], k=k) for q in questions]
    assert metrics.ndcg(rank(*questions), k) == pytest.approx(expected, abs=1e-12)


def test_rank_metrics_are_ranxs_on_scores_without_ties():
    generator = np.random.default_rng(0)
    questions = [generator.permutation(21).astype(float).tolist() for _ in range(100)]
    figures = measure(rank(*questions), KS)
    for name, expected in ranx_figures(questions).items():
        assert figures[name] == pytest.approx(expected, abs=1e-9), name


@pytest.mark.slow
def test_rank_metrics_are_ranxs_mean_over_random_orders_of_ties():
    questions, orders = random_questions(1), 400
    noise = np.random.default_rng(1)
    shaken = [
        (np.array(q) + noise.uniform(0, 0.5, size=len(q))).tolist()
        for q in questions
        for _ in range(orders)
    ]
    figures = measure(rank(*questions), KS)
    for name, values in ranx_figures(shaken).items():
        expected = values.reshape(len(questions), orders).mean(axis=1)
        assert np.abs(figures[name] - expected).max() < 0.11, name  # 4 errors of a mean of 400
        assert figures[name].mean() == pytest.approx(expected.mean(), abs=0.01), name


questions_strategy = st.lists(
    st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=12), min_size=1, max_size=8
)


@given(questions_strategy)
def test_a_monotone_transformation_of_scores_changes_nothing(questions):
    other = [[np.exp(score / 2) - 7 for score in question] for question in questions]
    assert same(rank(*questions), rank(*other))


@given(questions_strategy, st.randoms())
def test_the_order_of_rows_changes_nothing(questions, random):
    rows = [(i, s, j == 0) for i, question in enumerate(questions) for j, s in enumerate(question)]
    random.shuffle(rows)
    assert same(rank(*questions), rank_targets(*map(np.array, zip(*rows, strict=True))))


@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.floats(-5, 5), st.integers(1, 12))
def test_any_constant_equals_the_uniform_mean_over_ranks(sizes, score, k):
    figures = measure(rank(*([score] * size for size in sizes)), [k])
    assert figures["auc"] == pytest.approx(0.5)
    assert figures[f"hr@{k}"] == pytest.approx([min(k, size) / size for size in sizes])
    assert figures[f"mrr@{k}"] == pytest.approx(
        [sum(1 / r for r in range(1, min(k, size) + 1)) / size for size in sizes]
    )


@given(questions_strategy)
def test_metrics_grow_with_k_and_keep_their_order(questions):
    figures = measure(rank(*questions), range(1, 13))
    for k in range(1, 13):
        hr, ndcg, mrr = (figures[f"{name}@{k}"] for name in ("hr", "ndcg", "mrr"))
        assert (hr >= ndcg - 1e-12).all()
        assert (ndcg >= mrr - 1e-12).all()
        if k > 1:
            assert (hr >= figures[f"hr@{k - 1}"] - 1e-12).all()
    assert figures["hr@12"] == pytest.approx(1.0)  # nobody has more than 12 candidates


@given(questions_strategy)
@settings(max_examples=30, deadline=None)
def test_the_interval_contains_the_mean(questions):
    figures = summarize(rank(*questions), ks=[5], samples=200, confidence=0.95, seed=0)
    for name in ("auc", "hr@5", "ndcg@5", "mrr@5"):
        assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"]


def test_a_summary_has_every_mean_with_its_interval_then_ties_and_sequences_to_six_decimals():
    ranks = rank(*random_questions(2)[:3], *([1.0, 0.0],) * 4)  # shares of 7 have no end
    summary = summarize(ranks, ks=[5], samples=50, confidence=0.9, seed=3)
    expected = {}
    for name, values in measure(ranks, [5]).items():
        (low,), (high,) = bootstrap_interval(values[:, None], 50, 0.9, seed=3)
        expected |= {name: values.mean(), f"{name}_low": low, f"{name}_high": high}
    expected |= {"ties": np.mean(ranks.tied > 0), "sequences": 7}
    assert 0 < expected["ties"] < 1
    assert list(summary) == list(expected)
    assert summary == pytest.approx({n: round(v, 6) for n, v in expected.items()}, abs=1e-9)


def test_the_interval_of_mirrored_values_is_mirrored_however_few_the_resamples():
    values = np.random.default_rng(8).exponential(size=(12, 6))
    for seed, samples in enumerate([1, 2, 3, 4, 5, 6] * 3):
        low, high = bootstrap_interval(values, samples, 0.9, seed)
        mirrored_low, mirrored_high = bootstrap_interval(-values, samples, 0.9, seed)
        assert [-mirrored_high, -mirrored_low] == pytest.approx(np.array([low, high]), abs=1e-12)


def test_the_interval_of_a_share_is_about_two_standard_errors():
    values = (np.arange(1000) < 300).astype(float)[:, None]  # .3 +- 1.96 * sqrt(.21 / 1000)
    low, high = bootstrap_interval(values, samples=2000, confidence=0.95, seed=1)
    assert [low[0], high[0]] == pytest.approx([0.2716, 0.3284], abs=0.003)


def test_intervals_are_covered_as_often_as_they_claim():
    generator = np.random.default_rng(5)
    covered = 0
    for seed in range(200):
        values = generator.exponential(size=(200, 1))  # true mean 1
        low, high = bootstrap_interval(values, samples=200, confidence=0.9, seed=seed)
        covered += bool(low[0] <= 1 <= high[0])
    assert 0.82 < covered / 200 < 0.96


@pytest.mark.parametrize("count", [5, 20, 150])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_is_scipys_bca_on_the_same_resamples(count, confidence):
    values = np.random.default_rng(count).beta(0.3, 3, size=(count, 1))  # no two alike
    found = bootstrap_interval(values, samples=999, confidence=confidence, seed=7)
    expected = stats.bootstrap(
        (values[:, 0],),
        np.mean,
        n_resamples=999,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(7),
    ).confidence_interval
    assert np.ravel(found) == pytest.approx([expected.low, expected.high], abs=1e-9)


few_values = st.lists(
    st.sampled_from([-1.0, 0.0, 1 / 3, 0.1, 1.0, 1e-12, 1e6]), min_size=1, max_size=30
)


@given(few_values, st.sampled_from([1, 2, 50, 500]), st.sampled_from([0.5, 0.95, 0.9999]))
@settings(max_examples=150, deadline=None)
def test_bounds_are_ordered_and_within_the_values_whatever_these_are(column, samples, confidence):
    values = np.array(column)[:, None]
    low, high = bootstrap_interval(values, samples=samples, confidence=confidence, seed=0)
    slack = 1e-9 * np.abs(values).max()
    assert values.min() - slack <= low[0] <= high[0] <= values.max() + slack


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1e-200])
@pytest.mark.parametrize("count", [1, 2, 150])
def test_equal_values_have_an_interval_without_width(value, count):
    low, high = bootstrap_interval(np.full((count, 1), value), 100, 0.95, seed=0)
    assert (low[0], high[0]) == pytest.approx((value, value), rel=1e-12, abs=0)


def test_columns_share_their_resamples():
    values = np.random.default_rng(3).random((40, 3))
    together = bootstrap_interval(values, 200, 0.95, seed=5)
    alone = [bootstrap_interval(column[:, None], 200, 0.95, seed=5) for column in values.T]
    assert np.array(together) == pytest.approx(np.array(alone)[:, :, 0].T, abs=1e-12)


def areas(generator: np.random.Generator, shape: tuple[int, int], missed: float) -> ranking.Floats:
    """Draw AUCs: a target is first of 21, or with the chance ``missed`` at any rank alike."""
    below = np.where(generator.random(shape) < missed, generator.integers(21, size=shape), 20)
    return below / 20


def percentile_interval(values: ranking.Floats, samples: int, seed: int) -> ranking.Floats:
    """Bound means at 95 % by the percentile bootstrap."""
    generator, count = np.random.default_rng(seed), len(values)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=samples)
    bounds: ranking.Floats = np.quantile(drawn @ values / count, [0.025, 0.975], axis=0)
    return bounds


@pytest.mark.slow
@pytest.mark.parametrize("missed", [0.05, 0.1, 0.2])
def test_skewed_means_are_covered_as_often_as_claimed_and_oftener_than_by_percentiles(missed):
    generator, truth = np.random.default_rng(11), 1 - missed / 2
    covered = {"bca": [], "percentile": []}
    for seed in range(40):
        values = areas(generator, (150, 100), missed)  # a hundred evaluations side by side
        bounds = {
            "bca": bootstrap_interval(values, samples=1000, confidence=0.95, seed=seed),
            "percentile": percentile_interval(values, samples=1000, seed=seed),
        }
        for name, (low, high) in bounds.items():
            covered[name].append(np.mean((low <= truth) & (truth <= high)))
    share = {name: np.mean(shares) for name, shares in covered.items()}  # of 4,000 evaluations
    assert 0.94 <= share["bca"] <= 0.96
    assert share["bca"] > share["percentile"] + 0.005


def test_the_seed_alone_decides_the_interval():
    values = np.random.default_rng(0).random((50, 2))
    first, again, other = (bootstrap_interval(values, 100, 0.95, seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_interval_of_many_sequences_needs_little_memory():
    values = np.ones((100_000, 10))
    tracemalloc.start()
    bootstrap_interval(values, samples=20, confidence=0.95, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 100_000 * 10  # bytes; a matrix of all resamples would be 20 times as much


def same(first: TargetRanks, second: TargetRanks) -> bool:
    """Return whether two ranks agree in every count."""
    return all(np.array_equal(getattr(first, n), getattr(second, n)) for n in vars(first))


def test_the_list_of_metrics_decides_the_keys_their_order_and_titles():
    keys = ["auc", "hr@1", "ndcg@1", "mrr@1", "hr@5", "ndcg@5", "mrr@5"]
    assert list(measure(rank([0.5, 0.9]), [1, 5])) == keys
    assert metrics.metric_keys(5) == ["auc", "hr@5", "ndcg@5", "mrr@5"]
    assert list(map(metrics.metric_title, metrics.metric_keys(5))) == [
        "AUC",
        "HR@5",
        "NDCG@5",
        "MRR@5",
    ]


@pytest.mark.parametrize(("ks", "shown"), [([3, 5, 10], 5), ([3, 10], 3), ([1], 1)])
def test_tables_show_the_papers_cutoff_or_the_smallest(ks, shown):
    keys = [f"{name}@{k}{end}" for name in ("hr", "ndcg") for k in ks for end in ("", "_low")]
    assert metrics.find_cutoffs(["auc", *keys, "ties"]) == ks
    assert metrics.choose_cutoff(ks) == shown
