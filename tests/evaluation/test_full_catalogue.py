"""Figures on the whole catalogue: ranks in lists, reranking, fusion, properties of lists."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from mllm_msr.evaluation.full_catalogue import (
    DEPTH,
    FUSION,
    RERANKED,
    RETRIEVER,
    WEIGHTS,
    Catalogue,
    Lists,
    Reranked,
    choose_weight,
    describe_lists,
    fuse,
    measure_full_catalogue,
    rank_in_lists,
    recall,
    standardize,
)
from mllm_msr.evaluation.metrics import hit_rate, ndcg, reciprocal_rank
from mllm_msr.ranking import expected_rank, rank_targets

ITEMS = 12


def make_lists(scores: np.ndarray, targets: list[int], number: int = ITEMS) -> Lists:
    """Return the first items of each row of scores, [sequences, items], best first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :number]
    count, width = order.shape
    return Lists(
        sequences=np.arange(count) * 3,
        rows=np.repeat(np.arange(count), width),
        items=order.ravel(),
        scores=np.take_along_axis(scores, order, axis=1).ravel(),
        labels=(order == np.array(targets)[:, None]).ravel(),
        places=np.tile(np.arange(width) + 1, count),
    )


@st.composite
def worlds(draw):
    """Draw scores of a retriever and of a model, with ties, and targets."""
    count = draw(st.integers(1, 6))
    small = st.integers(-3, 3).map(float)
    grids = [
        np.array(draw(st.lists(small, min_size=count * ITEMS, max_size=count * ITEMS)))
        for _ in range(2)
    ]
    targets = draw(st.lists(st.integers(0, ITEMS - 1), min_size=count, max_size=count))
    retriever, model = (grid.reshape(count, ITEMS) for grid in grids)
    return retriever, model, targets


def rerankable(world, number: int = ITEMS) -> Reranked:
    retriever, model, targets = world
    lists = make_lists(retriever, targets, number)
    return Reranked(lists, model[lists.rows, lists.items])


def figures(lists: Lists) -> np.ndarray:
    ranks = rank_in_lists(lists)
    return np.array([metric(ranks, 5) for metric in (hit_rate, ndcg, reciprocal_rank)])


@given(worlds())
def test_reranking_the_whole_catalogue_is_ranking_it_by_the_model(world):
    _, model, targets = world
    reranked = rank_in_lists(fuse(rerankable(world), 1))
    labels = np.zeros_like(model, dtype=bool)
    labels[np.arange(len(targets)), targets] = True
    rows = np.repeat(np.arange(len(targets)), ITEMS)
    ranked = rank_targets(rows, model.ravel(), labels.ravel())
    np.testing.assert_array_equal(expected_rank(reranked), expected_rank(ranked))


@given(worlds(), st.integers(2, ITEMS))
def test_weight_0_is_the_retriever_and_weight_1_the_model(world, number):
    both = rerankable(world, number)
    by_retriever, by_model = fuse(both, 0), fuse(both, 1)
    np.testing.assert_array_equal(by_retriever.items, both.lists.items)
    np.testing.assert_array_equal(figures(by_retriever), figures(both.lists))
    model = both.lists.by(both.scores)
    np.testing.assert_array_equal(by_model.items, model.items)
    np.testing.assert_array_equal(figures(by_model), figures(model))


@given(worlds())
def test_recall_grows_with_the_candidates_and_ends_at_1(world):
    lists = rerankable(world).lists
    found = [recall(lists, number) for number in range(1, ITEMS + 1)]
    assert (np.diff(found, axis=0) >= 0).all()
    assert (found[-1] == 1).all()


@given(worlds(), st.integers(2, ITEMS), st.sampled_from(WEIGHTS))
def test_recall_bounds_the_hit_rate_of_any_fusion(world, number, weight):
    both = rerankable(world, number)
    hits = hit_rate(rank_in_lists(fuse(both, weight)), 5)
    assert (hits <= recall(both.lists, number)).all()


@given(worlds(), st.integers(2, ITEMS))
def test_a_target_that_was_not_retrieved_has_no_metric_at_any_k(world, number):
    lists = rerankable(world, number).lists
    missed = recall(lists, number) == 0
    assert not hit_rate(rank_in_lists(lists), 1000)[missed].any()
    assert (hit_rate(rank_in_lists(lists), ITEMS)[~missed] == 1).all()


@given(worlds(), st.sampled_from(WEIGHTS), st.integers(1, 9), st.integers(-5, 5))
def test_a_fusion_does_not_depend_on_the_scale_of_a_score(world, weight, scale, shift):
    both = rerankable(world)
    other = replace(both, scores=both.scores * 2**scale + shift)
    np.testing.assert_array_equal(figures(fuse(both, weight)), figures(fuse(other, weight)))


@given(worlds(), st.sampled_from(WEIGHTS))
def test_a_fusion_keeps_the_items_of_each_list(world, weight):
    both = rerankable(world, 7)
    fused = fuse(both, weight)
    for row in range(len(fused.sequences)):
        before, after = both.lists.rows == row, fused.rows == row
        assert set(both.lists.items[before]) == set(fused.items[after])
        assert fused.places[after].tolist() == list(range(1, 8))


def test_ties_with_the_target_count_half():
    lists = make_lists(np.array([[1.0, 1.0, 1.0, 0.0]]), [1], 4)
    ranks = rank_in_lists(lists)
    assert (ranks.above.tolist(), ranks.tied.tolist()) == ([0], [2])
    assert hit_rate(ranks, 1)[0] == pytest.approx(1 / 3)


def test_equal_scores_are_standardized_to_zeros():
    rows = np.array([0, 0, 0, 1, 1])
    values = standardize(rows, np.array([0.1, 0.1, 0.1, 1.0, 3.0]))
    assert values.tolist() == [0, 0, 0, -1, 1]


def test_the_weight_is_the_one_that_is_best_on_validation_sequences():
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 50, size=80).tolist()
    good, noise = generator.normal(size=(2, 80, 50))
    good[np.arange(80), targets] += 3
    assert choose_weight(rerankable((noise, good, targets), 50)) > 0.8
    assert choose_weight(rerankable((good, noise, targets), 50)) < 0.2


def catalogue() -> Catalogue:
    titles = sparse.csr_array(np.eye(ITEMS))
    return Catalogue(np.arange(ITEMS), titles)


def test_the_properties_of_lists_are_those_of_their_first_ten():
    scores = np.tile(-np.arange(ITEMS, dtype=float), (3, 1))
    found = describe_lists(make_lists(scores, [0, 0, 0]), catalogue())
    assert found == {
        f"coverage@{DEPTH}": pytest.approx(10 / 12, abs=1e-6),
        f"popularity@{DEPTH}": 4.5,
        f"similarity@{DEPTH}": 0.0,
    }


def test_similarity_is_the_mean_cosine_of_the_pairs_of_a_list():
    vectors = np.random.default_rng(0).normal(size=(ITEMS, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = np.random.default_rng(1).normal(size=(4, ITEMS))
    lists = make_lists(scores, [0] * 4)
    cosines = []
    for row in range(4):
        items = lists.items[lists.rows == row][:DEPTH]
        products = vectors[items] @ vectors[items].T
        cosines.append(products[np.triu_indices(DEPTH, 1)].mean())
    titled = replace(catalogue(), titles=sparse.csr_array(vectors))
    found = describe_lists(lists, titled)[f"similarity@{DEPTH}"]
    assert found == pytest.approx(np.mean(cosines), abs=1e-6)


@pytest.fixture(scope="module")
def section():
    generator = np.random.default_rng(0)
    targets = generator.integers(0, ITEMS, size=60).tolist()
    retriever, model, other = generator.normal(size=(3, 60, ITEMS))
    model[np.arange(60), targets] += 2
    both = rerankable((retriever, model, targets), 8)
    others = {"sasrec": make_lists(other, targets, 8)}
    options = {"samples": 50, "confidence": 0.95, "seed": 1}
    return measure_full_catalogue("item_knn", both, both, others, catalogue(), **options)


def test_the_section_has_a_row_for_each_list_with_intervals(section):
    assert list(section["rows"]) == [RETRIEVER, RERANKED, FUSION, "sasrec"]
    row = section["rows"][RERANKED]
    assert row["hr@10_low"] <= row["hr@10"] <= row["hr@10_high"]
    assert (section["items"], section["candidates"], section["sequences"]) == (12, 8, 60)
    assert section["weight"] in WEIGHTS


def test_the_last_number_of_candidates_has_the_figures_of_the_reranking(section):
    assert list(section["recall"]) == list(section["by_candidates"]) == ["5", "8"]
    last = section["by_candidates"]["8"]
    assert last["ndcg@10"] == section["rows"][RERANKED]["ndcg@10"]
    assert last["hr@10"] == section["recall"]["8"]["recall"]  # ten places hold all eight


def test_both_rows_of_the_model_are_tested_against_all_others(section):
    compared = section["comparisons"]
    assert list(compared[RERANKED]) == [RETRIEVER, "sasrec"]
    assert list(compared[FUSION]) == [RETRIEVER, "sasrec", RERANKED]
    assert compared[RERANKED][RETRIEVER]["difference"] > 0
    assert compared[RERANKED][RETRIEVER]["p"] < 0.05


def test_without_a_model_there_are_rows_of_the_retriever_and_baselines_alone():
    lists = make_lists(np.random.default_rng(0).normal(size=(5, ITEMS)), [0] * 5)
    alone = Reranked(lists, None)
    options = {"samples": 50, "confidence": 0.95, "seed": 1}
    found = measure_full_catalogue("item_knn", alone, alone, {}, catalogue(), **options)
    assert list(found["rows"]) == [RETRIEVER]
    assert not {"weight", "by_candidates"} & found.keys()
    assert found["comparisons"] == {}
