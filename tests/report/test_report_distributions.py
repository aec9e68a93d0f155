"""Score distributions and metrics of groups of sequences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_world import make_settings

from mllm_msr.evaluation.metrics import metric_keys
from mllm_msr.evaluation.results import read_metrics
from mllm_msr.report.distributions import describe_distributions, describe_scores, split_evenly
from mllm_msr.report.inputs import open_tables

values = st.lists(st.integers(0, 30), min_size=1, max_size=60).map(np.array)


@given(values, st.integers(1, 6))
def test_groups_are_numbered_without_gaps_and_equal_values_share_one(numbers, groups):
    found = split_evenly(numbers, groups)
    assert set(found) == set(range(found.max() + 1))
    assert len(set(found)) <= groups
    order = np.argsort(numbers, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    for value in set(numbers):
        assert len(set(found[numbers == value])) == 1


def test_distinct_values_make_groups_of_equal_size():
    assert np.bincount(split_evenly(np.arange(12), 4)).tolist() == [3, 3, 3, 3]


def test_few_values_are_a_group_each():
    assert split_evenly(np.array([9, 6, 9, 7]), 4).tolist() == [2, 0, 2, 1]


def test_quantiles_and_the_share_of_yes_match_hand_computed_values():
    found = describe_scores("Targets", np.array([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert found.quantiles == pytest.approx([0.05, 0.25, 0.5, 0.75, 0.95])
    assert (found.candidates, found.above_half) == (5, 0.4)


def test_means_over_groups_are_the_means_over_all_sequences(finished):
    with open_tables(finished, "uniform") as connection:
        found = describe_distributions(connection, make_settings())
    test = read_metrics(finished.evaluated / "metrics.json")["uniform"]["test"]
    for grouping in found.groupings:
        sizes = [group.sequences for group in grouping.groups]
        assert sum(sizes) == test["sequences"]
        for column, name in enumerate(metric_keys(5)):
            means = [group.cells[column].value for group in grouping.groups]
            assert np.average(means, weights=sizes) == pytest.approx(test[name], abs=1e-6)


def test_groups_by_popularity_have_each_candidate_once(finished):
    with open_tables(finished, "uniform") as connection:
        found = describe_distributions(connection, make_settings(report={"groups": 3}))
        known = dict(connection.execute("SELECT item, interactions FROM popularity").fetchall())
        scored = connection.execute(
            "SELECT item, label, log_odds FROM candidates JOIN scores USING (sequence, item)"
        ).fetchall()
    ranges = [[int(end) for end in group.name.split(" to ")] for group in found.items]
    assert len(ranges) > 1
    for ends, group in zip(ranges, found.items, strict=True):
        inside = [row for row in scored if ends[0] <= known.get(row[0], 0) <= ends[-1]]
        for label, found in ((True, group.targets), (False, group.negatives)):
            chosen = [log_odds for _, target, log_odds in inside if target == label]
            assert (found.candidates if found else 0) == len(chosen)
            if found:
                assert found.above_half == np.mean(np.array(chosen) > 0)
                median = np.median(1 / (1 + np.exp(-np.array(chosen))))
                assert found.quantiles[2] == pytest.approx(median)


def test_groups_are_named_by_their_range_of_values(finished):
    with open_tables(finished, "uniform") as connection:
        wide = describe_distributions(connection, make_settings(report={"groups": 1}))
        own = describe_distributions(connection, make_settings(report={"groups": 4}))
    assert [[group.name for group in grouping.groups] for grouping in wide.groupings] == [
        ["2 to 4"],
        ["2 to 8"],
    ]
    assert [group.name for group in own.groupings[0].groups] == ["2", "3", "4"]
    # Sequence 3, whose history has four items: target below both negatives, sigmoid(-1) = .269.
    last = own.groupings[0].groups[-1]
    assert last.cells[0].value == 0
    assert last.target_median == pytest.approx(0.2689, abs=1e-4)
