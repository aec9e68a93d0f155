"""Counting baselines against figures worked by hand, and against plain Python."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_task import DAY, make_task, score_by

from mllm_msr.core.errors import DataError

# Items by user: a b c, a b, b c, d.
TASTES = [["a", "b", "c"], ["a", "b"], ["b", "c"], ["d"]]
ITEMS = "abcde"

# Users and what they took, from few items, so that pairs recur.
LOGS = st.lists(
    st.lists(st.sampled_from(ITEMS), min_size=1, max_size=5, unique=True), min_size=2, max_size=8
)


def test_similar_items_of_the_history_add_up():
    task = make_task(TASTES, [(0, "ab"), (3, "d")])
    scores = score_by("item_knn", task, neighbours=9, shrinkage=0.0).reshape(2, 5)
    ab, bc, ac = 2 / math.sqrt(2 * 3), 2 / math.sqrt(3 * 2), 1 / 2
    assert scores[0] == pytest.approx([ab, ab, ac + bc, 0, 0])  # an item is no neighbour of its own
    assert scores[1].tolist() == [0, 0, 0, 0, 0]


def test_shrinkage_weakens_what_few_users_have_in_common():
    task = make_task(TASTES, [(0, "a")])
    scores = score_by("item_knn", task, neighbours=9, shrinkage=2.0)
    assert scores == pytest.approx([0, 2 / (math.sqrt(6) + 2), 1 / (2 + 2), 0, 0])


def test_only_the_nearest_neighbours_speak():
    task = make_task(TASTES, [(0, "a")])
    scores = score_by("item_knn", task, neighbours=1, shrinkage=0.0)
    assert scores == pytest.approx([0, 2 / math.sqrt(6), 0, 0, 0])


@settings(max_examples=30)
@given(LOGS, st.integers(1, 4), st.floats(0, 5))
def test_item_knn_is_what_plain_python_sums(log, neighbours, shrinkage):
    takers = {item: {u for u, items in enumerate(log) if item in items} for item in ITEMS}

    def similarity(one, other):
        common = len(takers[one] & takers[other])
        return common / (math.sqrt(len(takers[one]) * len(takers[other])) + shrinkage or 1)

    expected = np.zeros(len(ITEMS))
    for one in log[0]:
        others = sorted(set(ITEMS) - {one}, key=lambda other: (-similarity(one, other), other))
        for other in others[:neighbours]:
            expected[ITEMS.index(other)] += similarity(one, other)
    task = make_task(log, [(0, "".join(log[0]))])
    found = score_by("item_knn", task, neighbours=neighbours, shrinkage=shrinkage)
    assert found == pytest.approx(expected)


def test_a_step_is_likelier_the_more_users_took_it():
    task = make_task([["a", "b"], ["a", "b"], ["a", "c"], ["d"]], [(0, "da")])
    popularity = np.array([4, 3, 2, 2, 1]) / (7 + 5)
    expected = (np.array([0, 2, 1, 0, 0]) + 3 * popularity) / (3 + 3)
    assert score_by("markov", task, smoothing=3.0) == pytest.approx(np.log(expected))


def test_after_an_unseen_item_a_markov_chain_is_popularity():
    task = make_task(TASTES, [(3, "d")])
    counts = [2, 3, 2, 1, 0]
    scores = score_by("markov", task, smoothing=1.0)
    assert np.argsort(-scores, kind="stable").tolist() == [1, 0, 2, 3, 4]
    assert scores == pytest.approx(np.log((np.array(counts) + 1) / (8 + 5)))


@settings(max_examples=30)
@given(LOGS, st.sampled_from(ITEMS), st.floats(0.1, 100))
def test_the_probabilities_of_all_items_sum_to_one(log, last, smoothing):
    scores = score_by("markov", make_task(log, [(0, last)]), smoothing=smoothing)
    assert np.exp(scores).sum() == pytest.approx(1)
    steps = Counter(step for items in log for step in pairwise(items))
    popularity = Counter(item for items in log for item in items)
    for (one, item), (other, lower) in pairwise([(last, item) for item in ITEMS]):
        better = (steps[one, item], popularity[item]), (steps[other, lower], popularity[lower])
        if better[0] >= better[1] and better[0][1] >= better[1][1]:
            assert scores[ITEMS.index(item)] >= scores[ITEMS.index(lower)] - 1e-12


def test_no_step_leads_from_one_user_to_the_next():
    task = make_task([["a"], ["b"]], [(0, "a")])
    assert score_by("markov", task, smoothing=1.0)[0] == score_by("markov", task, smoothing=1.0)[1]


def test_recent_popularity_counts_a_window_that_ends_before_the_target():
    # c is taken on days 0, 5, 9 and 10; the questions are asked on days 10 and 4.
    log = [["c"], ["c"], ["c"], ["c"], ["d"]]
    times = [[0], [5 * DAY], [9 * DAY], [10 * DAY], [DAY]]
    task = make_task(log, [(0, "c"), (1, "c")], times=times, asked=[10 * DAY, 4 * DAY])
    counts = score_by("recent_popularity", task, days=5).reshape(2, 5)
    assert counts[:, 2].tolist() == [2, 1]  # that of day 10 is not earlier than day 10
    assert counts[:, 3].tolist() == [0, 1]
    assert score_by("recent_popularity", task, days=4).reshape(2, 5)[0, 2] == 1


def test_where_all_that_is_known_is_long_past_its_last_days_count():
    log, times = [["c"], ["c"], ["d"]], [[0], [9 * DAY], [10 * DAY]]
    task = make_task(log, [(0, "c")], times=times, asked=[60 * DAY])
    assert score_by("recent_popularity", task, days=5).tolist() == [0, 0, 1, 1, 0]


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from(ITEMS), st.integers(0, 9)), min_size=1, max_size=20),
    st.integers(0, 12),
    st.integers(1, 12),
)
def test_recent_popularity_is_what_plain_python_counts(rows, now, days):
    log = [[item] for item, _ in rows]
    times = [[day * DAY] for _, day in rows]
    task = make_task(log, [(0, "a")], times=times, asked=[now * DAY])
    end = min(now * DAY, max(day for _, day in rows) * DAY + 1)
    expected = [
        sum(item == other and end - days * DAY <= day * DAY < end for other, day in rows)
        for item in ITEMS
    ]
    assert score_by("recent_popularity", task, days=days).tolist() == expected


def test_recent_popularity_without_timestamps_says_so():
    with pytest.raises(DataError, match="recent_popularity: expected a timestamp") as error:
        score_by("recent_popularity", make_task(TASTES, [(0, "a")]), days=3)
    assert "\n" not in str(error.value)
