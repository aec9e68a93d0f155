"""The k-core, splits, histories, targets, and leakage of held-out interactions."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import duckdb
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from questions import (
    DEFAULTS,
    LOGS,
    Log,
    ask,
    core_of,
    fetch,
    histories,
    in_order,
    open_log,
    popularity,
    quick,
)

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import BudgetParams
from mllm_msr.core.tables import write_query
from mllm_msr.data.sequences import (
    TABLES,
    compute_statistics,
    filter_k_core,
    make_sequences,
    refuse_unknown_items,
)

# Ten users with interactions with a, b, c, d and last an item of their own, a minute apart.
TEN: Log = [
    (f"u{user}", item if item != "own" else f"own{user}", 100 * user + minute)
    for user in range(10)
    for minute, item in enumerate(["a", "b", "c", "d", "own"])
]

# Interactions per item: a 3, b 3, c 2, d 2, e 1, f 1, g 1.
TASTES: Log = [
    *[("ann", item, time) for time, item in enumerate("eabfcdg")],
    *[("bob", item, time) for time, item in enumerate("abc")],
    *[("cat", item, time) for time, item in enumerate("bad")],
]


# The k-core


def test_the_k_core_is_filtered_until_nothing_changes() -> None:
    # d is rare; without it cat has too few items, then c is rare, then bob has too few items.
    log: Log = [
        *[("ann", item, 0) for item in "abe"],
        *[("ned", item, 0) for item in "abe"],
        *[("bob", item, 0) for item in "abc"],
        *[("cat", item, 0) for item in "acd"],
    ]
    connection = open_log(log)
    dropped = filter_k_core(connection, min_user_interactions=3, min_item_interactions=2)
    assert fetch(connection, "SELECT user FROM users ORDER BY user") == [("ann",), ("ned",)]
    assert fetch(connection, "FROM items ORDER BY item_id") == [
        (1, "a", 2),
        (2, "b", 2),
        (5, "e", 2),
    ]
    # Dropped: d (1), then cat (2), c (1) and bob (2).
    assert dropped == {"interactions_of_rare_users": 4, "interactions_of_rare_items": 2}


@quick
@given(LOGS, st.integers(1, 4), st.integers(1, 3))
def test_the_k_core_equals_that_of_plain_python(log: Log, users: int, items: int) -> None:
    expected = core_of(log, users, items)
    assume(expected)
    connection = open_log(log)
    dropped = filter_k_core(connection, min_user_interactions=users, min_item_interactions=items)
    kept = fetch(
        connection,
        "SELECT user, item, timestamp FROM core_interactions"
        " JOIN users USING (user_id) JOIN items USING (item_id) ORDER BY ALL",
    )
    assert kept == sorted(expected)
    assert sum(dropped.values()) == len(log) - len(expected)


@pytest.mark.parametrize(
    ("users", "items", "setting"),
    [
        (8, 1, "filter_sequences.min_user_interactions:"),
        (1, 4, "filter_sequences.min_item_interactions:"),
        (4, 2, "filter_sequences.min_user_interactions and min_item_interactions:"),
    ],
)
def test_an_empty_k_core_names_the_threshold_and_the_counts(
    users: int, items: int, setting: str
) -> None:
    log = [row for row in TASTES if row[0] != "cat" or row[1] != "d"]
    with pytest.raises(DataError) as error:
        filter_k_core(open_log(log), min_user_interactions=users, min_item_interactions=items)
    message = str(error.value)
    assert message.startswith(setting)
    assert f"at least {users} interactions with items that have at least {items}" in message
    assert "of 3 users the most active has 7" in message
    assert "of 7 items the most popular has 3" in message


def test_an_empty_log_has_no_k_core() -> None:
    with pytest.raises(DataError, match="of 0 users the most active has 0"):
        filter_k_core(open_log([]), min_user_interactions=1, min_item_interactions=1)


def test_an_item_outside_the_catalogue_is_refused() -> None:
    connection = ask(TASTES, valid_share=0.0, test_share=0.0)
    connection.execute("CREATE VIEW catalogue AS SELECT unnest(['a', 'b', 'c', 'e', 'g']) AS item")
    with pytest.raises(DataError, match="2 items without, first 'd'"):
        refuse_unknown_items(connection)


# Order, histories, targets


def test_ties_in_time_are_broken_by_position_then_name() -> None:
    connection = open_log([("ann", "z", 5), ("ann", "y", 5), ("ann", "x", 4)])
    connection.execute("INSERT INTO interactions VALUES ('ann', 'b', 9, 9), ('ann', 'a', 9, 9)")
    filter_k_core(connection, min_user_interactions=1, min_item_interactions=1)
    order = fetch(
        connection, "SELECT item FROM core_interactions JOIN items USING (item_id) ORDER BY ordinal"
    )
    assert order == [("x",), ("z",), ("y",), ("a",), ("b",)]


def test_without_timestamps_the_publishers_order_is_used() -> None:
    log = [(user, item, None) for user, item, _ in TEN]
    assert histories(ask(log)) == histories(ask(TEN))


def test_interactions_without_a_timestamp_come_before_those_with_one() -> None:
    log: Log = [("ann", "a", 5), ("ann", "b", None), ("ann", "c", 6)]
    found = histories(ask(log, valid_share=0.0, test_share=0.0))
    assert found == {("ann", "train"): ["b", "a", "c"]}


def test_a_recent_history_is_the_items_just_before_the_target() -> None:
    connection = ask(TASTES, max_history=3, valid_share=0.0, test_share=0.0)
    assert histories(connection) == {
        ("ann", "train"): ["f", "c", "d", "g"],
        ("bob", "train"): ["a", "b", "c"],
        ("cat", "train"): ["b", "a", "d"],
    }
    assert fetch(connection, "SELECT sequence, user, history_length FROM sequences ORDER BY 1") == [
        (0, "ann", 3),
        (1, "bob", 2),
        (2, "cat", 2),
    ]


def test_a_popular_history_is_chosen_by_popularity_and_ordered_by_time() -> None:
    connection = ask(TASTES, history="popular", max_history=3, valid_share=0.0, test_share=0.0)
    # c and d are equally popular; the name decides.
    assert histories(connection)["ann", "train"] == ["a", "b", "c", "g"]


def test_a_popular_target_is_the_last_of_the_most_popular() -> None:
    options = {"history": "popular", "target": "popular", "valid_share": 0.0, "test_share": 0.0}
    connection = ask(TASTES, max_history=3, **options)
    # Of a, b, c, d, the four most popular of ann's seven, d comes last; the later g is no target.
    assert histories(connection)["ann", "train"] == ["a", "b", "c", "d"]


def test_a_popular_history_does_not_count_held_out_targets() -> None:
    # x is the held-out target of everyone else, so it must not count as popular.
    log: Log = [("ann", item, time) for time, item in enumerate("xyz")]
    log += [(f"u{n}", item, time) for n in range(4) for time, item in enumerate("wx")]
    log += [("bob", item, time) for time, item in enumerate("wyz")]
    for seed in range(40):
        connection = ask(
            log, history="popular", max_history=1, valid_share=0.4, test_share=0.4, seed=seed
        )
        split = dict(fetch(connection, "SELECT user, split FROM sequences"))
        if "train" not in {split[f"u{n}"] for n in range(4)}:
            break
    assert popularity(connection)["x"] == 1  # ann's own
    assert histories(connection)["ann", split["ann"]] == ["y", "z"]


def test_short_histories_are_dropped_and_counted() -> None:
    connection = open_log(TASTES)
    filter_k_core(connection, min_user_interactions=1, min_item_interactions=1)
    options = DEFAULTS | {"min_history": 3, "valid_share": 0.0, "test_share": 0.0}
    assert make_sequences(connection, **options) == {"sequences_with_short_history": 2}
    assert fetch(connection, "SELECT user FROM sequences") == [("ann",)]


def test_a_min_history_that_nobody_reaches_is_refused() -> None:
    with pytest.raises(DataError, match=r"filter_sequences.min_history.*the longest has 6"):
        ask(TASTES, min_history=7, max_history=7)


@quick
@given(
    LOGS,
    st.sampled_from([("recent", "last"), ("popular", "last"), ("popular", "popular")]),
)
def test_a_history_holds_only_items_before_the_target(log: Log, choice: tuple[str, str]) -> None:
    history, target = choice
    log = log + [("x", item, time) for time, item in enumerate("ab")]  # one history at least
    options = {"history": history, "target": target, "valid_share": 0.0, "test_share": 0.0}
    ordered = in_order(log)
    for (user, _), items in histories(ask(log, **options)).items():
        places = [ordered[user].index(item) for item in items]
        assert all(earlier < later for earlier, later in pairwise(places))
        assert len(items) == min(places[-1], 3) + 1
        assert target == "popular" or places[-1] == len(ordered[user]) - 1
        assert history == "popular" or places[0] == max(0, places[-1] - 3)


# Splits


def splits(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    return dict(fetch(connection, "SELECT split, count(*) FROM sequences GROUP BY split"))


def test_users_are_split_by_the_shares_and_the_seed() -> None:
    first = ask(TEN, valid_share=0.1, test_share=0.3)
    again = ask(TEN[::-1], valid_share=0.1, test_share=0.3)
    other = ask(TEN, valid_share=0.1, test_share=0.3, seed=8)
    assert splits(first) == splits(other) == {"train": 6, "valid": 1, "test": 3}
    query = "SELECT user, split FROM sequences ORDER BY user"
    assert fetch(first, query) == fetch(again, query) != fetch(other, query)


@quick
@given(LOGS, st.integers(0, 9))
def test_user_splits_do_not_overlap(log: Log, seed: int) -> None:
    # Three splits need at least three users.
    log = log + [(user, item, time) for user in "xyz" for time, item in enumerate("ab")]
    long_enough = {user for user, items in in_order(log).items() if len(items) > 1}
    connection = ask(log, seed=seed, valid_share=0.1, test_share=0.1)
    users = Counter(user for (user,) in fetch(connection, "SELECT user FROM sequences"))
    assert users == Counter(long_enough)
    assert set(splits(connection)) == {"train", "valid", "test"}
    numbers = fetch(connection, "SELECT sequence FROM sequences ORDER BY user, ordinal")
    assert numbers == [(number,) for number in range(len(long_enough))]


@pytest.mark.slow
@quick
@given(st.integers(3, 30), st.integers(2, 5))
def test_folds_test_each_user_once(users: int, count: int) -> None:
    log: Log = [(f"u{user}", item, time) for user in range(users) for time, item in enumerate("ab")]
    tested: Counter[str] = Counter()
    for fold in range(count):
        try:
            connection = ask(log, valid_share=0.3, test_share=1 / count, fold=fold)
        except DataError:
            return  # too few users for a fold
        found = fetch(connection, "SELECT user FROM sequences WHERE split = 'test'")
        tested.update(user for (user,) in found)
        assert abs(splits(connection)["valid"] - 0.3 * users) <= 1
    assert tested == Counter(f"u{user}" for user in range(users))


def test_the_last_fold_is_the_split_without_folds() -> None:
    query = "SELECT user, split FROM sequences ORDER BY user"
    assert fetch(ask(TEN, fold=4), query) == fetch(ask(TEN), query)
    assert fetch(ask(TEN, fold=0), query) != fetch(ask(TEN), query)


def test_leave_one_out_uses_the_last_three_items_as_targets() -> None:
    log: Log = [("ann", item, time) for time, item in enumerate("abcdef")]
    log += [("bob", item, time) for time, item in enumerate("abc")]
    connection = ask(log, split="leave_one_out", max_history=2)
    assert histories(connection) == {
        ("ann", "train"): ["b", "c", "d"],
        ("ann", "valid"): ["c", "d", "e"],
        ("ann", "test"): ["d", "e", "f"],
        ("bob", "valid"): ["a", "b"],
        ("bob", "test"): ["a", "b", "c"],
    }
    # Known at training time: ann's a to d, bob's a.
    assert popularity(connection) == {"a": 2, "b": 1, "c": 1, "d": 1, "e": 0, "f": 0}


def test_a_time_split_trains_on_the_earliest_targets_and_tests_on_the_latest() -> None:
    connection = ask(TEN, split="time", valid_share=0.2, test_share=0.1)
    split = dict(fetch(connection, "SELECT user, split FROM sequences"))
    assert [split[f"u{user}"] for user in range(10)] == ["train"] * 7 + ["valid"] * 2 + ["test"]
    # The first valid target is at 704: u7's a to d are earlier, all of u8 and u9 is later.
    counts = popularity(connection)
    assert [counts[item] for item in "abcd"] == [8, 8, 8, 8]
    assert [counts[f"own{user}"] for user in range(10)] == [1] * 7 + [0] * 3


def test_a_time_split_keeps_equal_times_together() -> None:
    log: Log = [(f"u{user}", item, 0) for user in range(10) for item in ("a", "b")]
    log += [(f"u{user}", f"own{user}", 1 + (user > 2) + (user > 8)) for user in range(10)]
    connection = ask(log, split="time", valid_share=0.2, test_share=0.1)
    assert splits(connection) == {"train": 3, "valid": 6, "test": 1}


@quick
@given(LOGS)
def test_a_time_split_trains_only_on_earlier_interactions(log: Log) -> None:
    try:
        connection = ask(log, split="time")
    except DataError as error:
        assert "split time" in str(error)  # noqa: PT017
        return
    ends = {
        split: (first, last)
        for split, first, last in fetch(
            connection, "SELECT split, min(timestamp), max(timestamp) FROM sequences GROUP BY split"
        )
    }
    assert ends["train"][1] < ends["valid"][0]
    assert ends["valid"][1] < ends["test"][0]
    known = Counter(item for _, item, time in log if time < ends["valid"][0])
    assert {item: n for item, n in popularity(connection).items() if n} == known


def test_a_time_split_without_timestamps_is_refused() -> None:
    log = [(user, item, None if user == "u3" else time) for user, item, time in TEN]
    with pytest.raises(DataError, match=r"filter_sequences.split: .*5 of 50 without"):
        ask(log, split="time")


def test_a_time_split_of_a_single_time_is_refused() -> None:
    log = [(user, item, 0) for user, item, _ in TEN]
    with pytest.raises(DataError, match="0 train, 0 valid, 10 test"):
        ask(log, split="time")


def test_a_time_split_whose_last_targets_share_a_time_advises_larger_shares() -> None:
    log: Log = [(f"u{user}", item, 0) for user in range(10) for item in ("a", "b")]
    log += [(f"u{user}", f"own{user}", 1 + min(user, 6)) for user in range(10)]
    with pytest.raises(DataError) as error:
        ask(log, split="time", valid_share=0.1, test_share=0.1)
    assert str(error.value) == (
        "filter_sequences.split time: expected sequences to train, to validate and to test; got"
        " 6 train, 0 valid, 4 test: 4 of 10 targets share the last time, and equal times stay"
        " together; raise test_share and valid_share, or choose another split"
    )
    assert splits(ask(log, split="time", valid_share=0.2, test_share=0.4)) == {
        "train": 4,
        "valid": 2,
        "test": 4,
    }


def test_a_split_without_a_share_may_be_empty() -> None:
    assert splits(ask(TEN, valid_share=0.0, test_share=0.5)) == {"train": 5, "test": 5}


# Withheld items and strata


# Forty users take five of ten items each; the last is withheld or not, as the seed has it.
COLD: Log = [
    (f"u{user:02}", f"i{(user * 3 + step * (1 + user % 3)) % 10}", step)
    for user in range(40)
    for step in range(5)
]


def withheld(connection: duckdb.DuckDBPyConnection) -> set[str]:
    return {item for (item,) in fetch(connection, "SELECT item FROM items WHERE withheld")}


@quick
@given(LOGS, st.integers(0, 9), st.sampled_from(["recent", "popular"]), st.integers(1, 9))
def test_a_withheld_item_is_in_no_training_sequence_and_no_history(
    log: Log, seed: int, history: str, tenths: int
) -> None:
    try:
        connection = ask(
            log, split="cold_items", cold_share=tenths / 10, seed=seed, history=history
        )
    except DataError:
        return
    cold = withheld(connection)
    items = {item for _, item, _ in log}
    assert len(cold) == max(1, round(tenths / 10 * len(items)))
    ordered = in_order(log)
    for (user, split), sequence in histories(connection).items():
        *taken, target = sequence
        warm = [item for item in ordered[user][:-1] if item not in cold]
        assert target == ordered[user][-1]
        assert taken
        assert not set(taken) & cold
        assert len(taken) == min(3, len(warm))
        assert history == "popular" or taken == warm[-3:]
        assert split != "train" or target not in cold
    counts = popularity(connection)
    assert all(counts[item] == 0 for item in cold)


def test_users_with_a_withheld_target_are_divided_between_valid_and_test() -> None:
    connection = ask(COLD, split="cold_items", cold_share=0.3, valid_share=0.1, test_share=0.3)
    rows = fetch(connection, "SELECT withheld, split, count(*) FROM sequences GROUP BY ALL")
    counts = {(cold, split): number for cold, split, number in rows}
    cold, warm = (sum(n for (c, _), n in counts.items() if c is each) for each in (True, False))
    assert cold > 5
    assert counts[True, "valid"] == round(cold / 4)
    assert counts[True, "test"] == cold - round(cold / 4)
    assert (True, "train") not in counts
    assert counts[False, "valid"] == round(0.1 * warm)
    assert counts[False, "test"] == round(0.3 * warm)


def test_popularity_counts_known_interactions_with_items_that_are_not_withheld() -> None:
    connection = ask(COLD, split="cold_items", cold_share=0.3)
    cold, ordered = withheld(connection), in_order(COLD)
    held_out = {
        user for (user,) in fetch(connection, "SELECT user FROM sequences WHERE split <> 'train'")
    }
    known = Counter(
        item
        for user, items in ordered.items()
        for item in (items[:-1] if user in held_out else items)
        if item not in cold
    )
    assert popularity(connection) == {item: known[item] for _, item, _ in COLD}


def test_a_larger_cold_share_withholds_more_of_the_same_items() -> None:
    few, many = (withheld(ask(COLD, split="cold_items", cold_share=share)) for share in (0.2, 0.4))
    assert few < many


@quick
@given(LOGS, st.sampled_from(["users", "leave_one_out", "cold_items"]))
def test_strata_follow_the_known_interactions(log: Log, split: str) -> None:
    try:
        connection = ask(log, split=split)
    except DataError:
        return
    rows = fetch(
        connection,
        "SELECT sequences.stratum, interactions, popularity.withheld FROM sequences"
        " JOIN popularity ON item = target",
    )
    for stratum, interactions, cold in rows:
        if split != "cold_items":
            assert not cold
            cold = interactions == 0  # noqa: PLW2901
        assert stratum == ("cold" if cold else "warm" if interactions > 5 else "rare")


def test_strata_do_not_depend_on_a_budget() -> None:
    query = "SELECT sequence, stratum FROM sequences ORDER BY 1"
    limited = ask(COLD, budget=budget("used", train=1))
    assert fetch(limited, query) == fetch(ask(COLD), query)
    assert popularity(limited) != popularity(ask(COLD))


# Budgets


def budget(interactions: str = "all", **limits: int | None) -> BudgetParams:
    """Return the settings of a budget, null where nothing is said."""
    every = {"train": None, "valid": None, "test": None, "interactions": interactions}
    return BudgetParams.model_validate(every | limits)


def used(connection: duckdb.DuckDBPyConnection) -> set[tuple[str, str]]:
    return set(fetch(connection, "SELECT user, split FROM sequences WHERE used"))


@pytest.mark.slow
@quick
@given(LOGS, st.sampled_from(["users", "leave_one_out"]), st.integers(1, 6), st.integers(0, 3))
def test_a_larger_budget_contains_the_smaller(log: Log, split: str, number: int, more: int) -> None:
    log = log + [(user, item, time) for user in "xyz" for time, item in enumerate("abcd")]
    small = ask(log, split=split, budget=budget(train=number, valid=number, test=number))
    large = number + more
    assert used(small) <= used(
        ask(log, split=split, budget=budget(train=large, valid=large, test=large))
    )
    every = splits(small)
    chosen = Counter(split for _, split in used(small))
    assert chosen == {name: min(number, total) for name, total in every.items()}


@quick
@given(
    LOGS,
    st.sampled_from(["users", "leave_one_out", "time"]),
    st.sampled_from(["recent", "popular"]),
    st.integers(1, 3),
)
def test_a_budget_changes_no_split_and_no_used_history(
    log: Log, split: str, history: str, number: int
) -> None:
    for interactions in ("all", "used"):
        limits = budget(interactions, train=number, test=number)
        try:
            whole = ask(log, split=split, history=history)
        except DataError:
            return
        limited = ask(log, split=split, history=history, budget=limits)
        columns = "SELECT sequence, user, split, target, history_length FROM sequences ORDER BY 1"
        assert fetch(limited, columns) == fetch(whole, columns)
        rows = "SELECT sequence, position, item FROM histories JOIN chosen USING (sequence)"
        chosen = "SELECT sequence FROM sequences WHERE used"
        numbers = [number for (number,) in fetch(limited, chosen)]
        assert {number for (number,) in fetch(limited, "SELECT sequence FROM histories")} == set(
            numbers
        )
        whole.execute("CREATE OR REPLACE TABLE chosen AS SELECT unnest(?) AS sequence", [numbers])
        limited.execute("CREATE VIEW chosen AS SELECT DISTINCT sequence FROM histories")
        assert sorted(fetch(limited, rows)) == sorted(fetch(whole, rows))
        if interactions == "all":
            assert popularity(limited) == popularity(whole)


def test_the_choice_of_used_users_is_independent_of_the_split() -> None:
    # A tenth of the users is tested. If both choices had one order, the used training users would
    # be the first of the shuffle, and the test users its last.
    log: Log = [(f"u{user}", item, time) for user in range(200) for time, item in enumerate("abc")]
    limited = ask(log, budget=budget(train=60))
    larger_test = ask(log, valid_share=0.2, test_share=0.5)
    test = {user for user, split in used(larger_test) if split == "test"}
    chosen = {user for user, split in used(limited) if split == "train"}
    assert 5 < len(chosen & test) < 55


def test_popularity_of_used_users_counts_only_these() -> None:
    connection = ask(TEN, budget=budget("used", train=2))
    users = {user for user, split in used(connection) if split == "train"}
    assert len(users) == 2
    counts = popularity(connection)
    assert [counts[item] for item in "abcd"] == [2, 2, 2, 2]
    own = {item for item, number in counts.items() if item.startswith("own") and number}
    assert own == {f"own{user[1:]}" for user in users}


def test_a_budget_above_the_number_of_sequences_uses_all() -> None:
    assert used(ask(TEN, budget=budget(train=100, valid=100, test=100))) == used(ask(TEN))


def test_a_budget_of_no_training_sequence_leaves_none() -> None:
    statistics = compute_statistics(ask(TEN, budget=budget(train=0, test=1)))
    assert statistics["used_sequences"] == {"train": 0, "valid": 2, "test": 1}
    assert statistics["sequences"] == {"train": 6, "valid": 2, "test": 2}


# Popularity


def test_popularity_does_not_count_held_out_targets() -> None:
    connection = ask(TEN)
    rows = fetch(
        connection, "SELECT split, interactions FROM sequences JOIN popularity ON item = target"
    )
    assert Counter(rows) == {("train", 1): 6, ("valid", 0): 2, ("test", 0): 2}


def test_popularity_does_not_count_interactions_after_a_held_out_target() -> None:
    # All users have a and b, then, after the popular target b, an item of their own.
    log: Log = [
        (f"u{user}", item, time)
        for user in range(10)
        for time, item in enumerate(["a", "b", f"own{user}"])
    ]
    connection = ask(log, history="popular", target="popular", max_history=1)
    assert {target for (target,) in fetch(connection, "SELECT target FROM sequences")} == {"b"}
    counts = popularity(connection)
    assert (counts["a"], counts["b"]) == (10, 6)
    train = fetch(connection, "SELECT user FROM sequences WHERE split = 'train'")
    assert {item for item, n in counts.items() if n == 1} == {f"own{user[1:]}" for (user,) in train}


@quick
@given(LOGS, st.sampled_from(["users", "leave_one_out"]))
def test_popularity_equals_that_of_plain_python(log: Log, split: str) -> None:
    try:
        connection = ask(log, split=split)
    except DataError:
        return
    ordered = in_order(log)
    held_out = fetch(connection, "SELECT user, target FROM sequences WHERE split <> 'train'")
    ends = {
        user: min([ordered[user].index(item) for who, item in held_out if who == user], default=99)
        for user in ordered
    }
    known = Counter(item for user in ordered for item in ordered[user][: ends[user]])
    assert popularity(connection) == {item: known[item] for _, item, _ in log}


# Statistics, determinism


def test_statistics_describe_the_k_core() -> None:
    assert compute_statistics(ask(TASTES, core=(3, 2), valid_share=0.0, test_share=0.0)) == {
        "users": 3,
        "items": 4,
        "interactions": 10,
        "average_length": 3.3333,
        "sparsity": 0.166667,
        "sequences": {"train": 3, "valid": 0, "test": 0},
        "used_sequences": {"train": 3, "valid": 0, "test": 0},
        "test_strata": {"cold": 0, "rare": 0, "warm": 0},
        "withheld_items": 0,
        "targets_tied_in_time": 0,
    }


def test_statistics_count_targets_at_the_time_of_another_interaction_of_their_user() -> None:
    log: Log = [("ann", "a", 1), ("ann", "b", 2), ("ann", "c", 2)]
    log += [("bob", "a", 1), ("bob", "b", 1), ("bob", "c", 2)]  # tied, but not with the target
    connection = ask(log, valid_share=0.0, test_share=0.0)
    assert compute_statistics(connection)["targets_tied_in_time"] == 1


@pytest.mark.parametrize("split", ["users", "leave_one_out", "time"])
def test_threads_and_row_order_change_no_byte_of_the_sequences(tmp_path: Path, split: str) -> None:
    # More rows than one row group of Parquet.
    source = """
        SELECT 'u' || range % 16000 AS user, 'i' || range * 7919 % 1009 AS item,
               range * 31 % 977 AS timestamp, range AS position
        FROM range(160000)"""
    for threads, order in ((1, "position"), (2, "item, position DESC")):
        with duckdb.connect(config={"threads": threads}) as connection:
            connection.execute(f"CREATE TABLE interactions AS FROM ({source}) ORDER BY {order}")
            filter_k_core(connection, min_user_interactions=3, min_item_interactions=3)
            make_sequences(connection, **DEFAULTS | {"split": split, "max_history": 9})
            for name, (model, query) in TABLES.items():
                write_query(model, connection, query, tmp_path / f"{name}-{threads}")
    for name in TABLES:
        assert (tmp_path / f"{name}-1").read_bytes() == (tmp_path / f"{name}-2").read_bytes()
