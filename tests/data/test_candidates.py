"""Negative sampling: untouched items, stable draws, and the position of the target."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from questions import (
    LOGS,
    Log,
    ask,
    fetch,
    fewest_untouched,
    in_order,
    make_candidates_table,
    quick,
    sample,
)

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import BudgetParams
from mllm_msr.core.tables import write_query
from mllm_msr.data import candidates

TRAIN_ONLY = {"valid_share": 0.0, "test_share": 0.0}

# A thousand users with four of forty items each.
MANY: Log = [
    (f"u{user}", f"i{(user * 7 + step * step * 3) % 40:02}", step)
    for user in range(1000)
    for step in range(4)
]


def make_all(
    connection: duckdb.DuckDBPyConnection,
    train_sampling: candidates.Sampling = "uniform",
    evaluation_sampling: Sequence[candidates.Sampling] = ("uniform", "targets"),
    seed: int = 7,
) -> dict[str, int]:
    return candidates.make_candidates(
        connection,
        train_sampling=train_sampling,
        evaluation_sampling=evaluation_sampling,
        negatives={"train": 2, "valid": 2, "test": 2},
        seed=seed,
    )


def negatives(asked: dict[str, list[tuple[str, bool]]]) -> dict[str, list[str]]:
    return {user: [item for item, label in rows if not label] for user, rows in asked.items()}


@quick
@given(LOGS, st.sampled_from(["uniform", "popularity"]), st.integers(0, 99), st.data())
def test_candidates_are_one_target_and_distinct_untouched_items(
    log: Log, sampling: str, seed: int, data: st.DataObject
) -> None:
    assume(fewest_untouched(log))
    number = data.draw(st.integers(1, fewest_untouched(log)))
    touched = in_order(log)
    connection = ask(log, **TRAIN_ONLY)
    targets = dict(fetch(connection, "SELECT user, target FROM sequences"))
    asked = sample(connection, "train", number, sampling=sampling, seed=seed)
    assert asked.keys() == targets.keys()
    for user, rows in asked.items():
        assert [item for item, label in rows if label] == [targets[user]]
        untouched = [item for item, label in rows if not label]
        assert len(untouched) == len(set(untouched)) == number
        assert set(untouched).isdisjoint(touched[user])
        assert set(untouched) <= {item for _, item, _ in log}


@pytest.mark.slow
@quick
@given(LOGS, st.sampled_from(["uniform", "popularity"]))
def test_a_larger_number_of_negatives_extends_the_smaller(log: Log, sampling: str) -> None:
    most = fewest_untouched(log)
    assume(most)
    connection = ask(log, **TRAIN_ONLY)
    drawn = [
        negatives(sample(connection, "train", n, sampling=sampling)) for n in range(1, most + 1)
    ]
    for number, few in enumerate(drawn, start=1):
        assert few == {user: items[:number] for user, items in drawn[-1].items()}


def test_items_outside_the_core_are_no_negatives() -> None:
    # ann's z is rare and not in the k-core, so it is nobody's candidate.
    log: Log = [(user, item, time) for user in ("ann", "bob") for time, item in enumerate("abc")]
    log += [
        ("ann", "z", 9),
        *[(f"u{n}", item, time) for n in range(2) for time, item in enumerate("def")],
    ]
    connection = ask(log, core=(3, 2), **TRAIN_ONLY)
    assert set(negatives(sample(connection, "train", 3))["ann"]) == set("def")
    with pytest.raises(DataError):
        sample(connection, "train", 4)


@pytest.mark.slow
@pytest.mark.parametrize(("sampling", "line"), [("uniform", 1152), ("popularity", 36_864 / 30)])
def test_a_user_who_touched_nearly_everything_gets_all_other_items(
    sampling: str, line: float
) -> None:
    # For some users, finding all 10 of 300 items takes more draws than are made.
    log: Log = [
        (f"u{user}", f"i{n:03}", n) for user in range(30) for n in range(300) if n % 30 != user
    ]
    connection = ask(log, **TRAIN_ONLY)
    asked = negatives(sample(connection, "train", 10, sampling=sampling))
    for user in range(30):
        assert sorted(asked[f"u{user}"]) == [f"i{n:03}" for n in range(user, 300, 30)]
    written_out = f"SELECT count(DISTINCT sequence) FROM drawn WHERE draw >= {4 * line}"
    ((users,),) = fetch(connection, written_out)
    assert 0 < users < 30


def md5_of(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def test_draws_are_md5_of_seed_split_number_and_user() -> None:
    # A second implementation without DuckDB makes the same draws.
    connection = ask(MANY, **TRAIN_ONLY)
    homes = {item: int(md5_of(f"7:pool:{item}")[:15], 16) % 128 for _, item, _ in MANY}
    places: dict[int, str] = {}
    for item in sorted(homes, key=lambda item: (homes[item], item)):
        places[max(homes[item], max(places, default=-1) + 1)] = item
    digests = [md5_of(f"7:train:{number}:u5") for number in range(40)]
    points = [int(text[at : at + 15], 16) % 144 for text in digests for at in (0, 16)]
    drawn = [places[point] for point in points if point in places]
    touched = in_order(MANY)["u5"]
    expected = [item for item in dict.fromkeys(drawn) if item not in touched]
    assert negatives(sample(connection, "train", 5))["u5"] == expected[:5]


@quick
@given(LOGS, st.sampled_from(["uniform", "popularity"]), st.integers(0, 99))
def test_intervals_are_as_long_as_the_weights_and_do_not_overlap(
    log: Log, sampling: str, seed: int
) -> None:
    assume(fewest_untouched(log))
    connection = ask(log, **TRAIN_ONLY)
    sample(connection, "train", 1, sampling=sampling, seed=seed)
    counts = dict(fetch(connection, "SELECT item, interactions FROM popularity"))
    end = 0
    for item, weight, first in fetch(connection, "SELECT item, weight, first FROM pool ORDER BY 3"):
        assert first >= end
        assert weight == (1 if sampling == "uniform" else counts.pop(item) + 1)
        end = first + weight
    assert sampling == "uniform" or not counts


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_a_growing_catalogue_changes_few_negatives(
    sampling: str,
) -> None:
    log: Log = [
        (f"u{n}", f"i{(n * 11 + step * 7) % 300}", step) for n in range(900) for step in (0, 1)
    ]
    new: Log = [(f"fan{n}", f"new{item}", 0) for item in range(3) for n in range(6)]
    before = negatives(sample(ask(log, **TRAIN_ONLY), "train", 20, sampling=sampling))
    after = negatives(sample(ask(log + new, **TRAIN_ONLY), "train", 20, sampling=sampling))
    kept = sum(len(set(items) & set(after[user])) for user, items in before.items())
    assert 1 - kept / (20 * len(before)) < 0.03


def test_drawing_from_the_rest_is_weighted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "DRAWS_PER_ITEM", 0)
    assert share_of_popular_negatives("popularity") == pytest.approx(51 / 69, abs=0.05)
    assert share_of_popular_negatives("uniform") == pytest.approx(1 / 10, abs=0.05)


def test_popularity_sampling_follows_the_interaction_counts() -> None:
    assert share_of_popular_negatives("popularity") == pytest.approx(51 / 69, abs=0.05)


def test_uniform_sampling_ignores_popularity() -> None:
    assert share_of_popular_negatives("uniform") == pytest.approx(1 / 10, abs=0.05)


def share_of_popular_negatives(sampling: str) -> float:
    """Return how often ``hit`` is the negative of 500 users with interactions with a and b.

    Fifty other users have an interaction with hit, and one user with each of nine other items. An
    item's weight is its count plus one, so that hit has a share of 51 in 51 + 9 * 2.
    """
    log: Log = [(f"u{user}", item, time) for user in range(500) for time, item in enumerate("ab")]
    log += [(f"fan{user}", "hit", 0) for user in range(50)]
    log += [("odd", f"x{n}", n) for n in range(9)]
    connection = ask(log, **TRAIN_ONLY)
    connection.execute("DELETE FROM sequences WHERE user = 'odd'")
    asked = negatives(sample(connection, "train", 1, sampling=sampling))
    assert len(asked) == 500
    return Counter(items[0] for items in asked.values())["hit"] / 500


def test_the_targets_position_is_uniform() -> None:
    asked = sample(ask(MANY, **TRAIN_ONLY), "train", 4)
    places = Counter([label for _, label in rows].index(True) for rows in asked.values())
    # 200 expected at each of five positions; chi-squared with 4 degrees, 18.5 is exceeded once in
    # a thousand seeds.
    assert sum((places[place] - 200) ** 2 / 200 for place in range(5)) < 18.5


def test_uniform_sampling_draws_every_item_equally_often() -> None:
    asked = negatives(sample(ask(MANY, **TRAIN_ONLY), "train", 9))
    counts = Counter(item for items in asked.values() for item in items)
    assert len(counts) == 40
    assert max(counts.values()) < 1.3 * 9000 / 40
    assert min(counts.values()) > 0.7 * 9000 / 40


def test_candidates_are_written_in_order_of_sequence_and_position() -> None:
    connection = ask(MANY[:400], **TRAIN_ONLY)  # a hundred users
    sample(connection, "train", 4)
    rows = fetch(connection, candidates.TABLES["train_candidates"][1])
    places = [(sequence, position) for _, sequence, position, _, _ in rows]
    assert len(places) == 500
    assert places == sorted(places)


def test_another_seed_draws_other_negatives() -> None:
    connection = ask(MANY, **TRAIN_ONLY)
    assert sample(connection, "train", 4) == sample(connection, "train", 4)
    assert sample(connection, "train", 4) != sample(connection, "train", 4, seed=8)


def test_the_seed_is_that_of_every_table() -> None:
    drawn = []
    for seed in (7, 7, 8):
        connection = ask(MANY, valid_share=0.2, test_share=0.2)
        make_all(connection, seed=seed)
        drawn.append(
            {name: fetch(connection, f"FROM {name} ORDER BY ALL") for name in candidates.TABLES}
        )
    assert drawn[0] == drawn[1]
    assert all(drawn[0][name] != drawn[2][name] for name in candidates.TABLES)


def test_skipped_sequences_are_counted_by_table_and_sampling() -> None:
    log: Log = [(f"u{user}", f"i{(user + i) % 6}", i) for user in range(20) for i in range(3)]
    log += [(f"v{user}", f"i{i}", (user + i) % 5) for user in range(20) for i in range(5)]
    connection = ask(log, valid_share=0.3, test_share=0.3)
    skipped = make_all(connection, "targets", ["targets", "contemporary"])
    count = "SELECT sampling, count(DISTINCT sequence) FROM {}_candidates GROUP BY ALL ORDER BY 1"
    with_candidates = {
        (table, sampling): number
        for table in ("train", "selection", "valid", "test")
        for sampling, number in fetch(connection, count.format(table))
    }
    sizes = dict(fetch(connection, "SELECT split, count(*) FROM sequences GROUP BY ALL"))
    sizes["selection"] = sizes["valid"]
    assert skipped == {
        f"{table}_sequences_without_enough_{sampling}_negatives": sizes[table] - number
        for (table, sampling), number in with_candidates.items()
    }
    assert len(skipped) == 6
    assert min(skipped.values()) > 0


def test_the_splits_of_a_user_draw_independently() -> None:
    connection = ask(MANY, split="leave_one_out")
    drawn = [negatives(sample(connection, split, 4)) for split in ("train", "valid", "test")]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


@pytest.mark.slow
def test_more_test_negatives_change_no_other_table(tmp_path: Path) -> None:
    for test_negatives in (5, 30):
        connection = ask(MANY)
        for split, number in {"train": 1, "valid": 5, "test": test_negatives}.items():
            sample(connection, split, number)
            model, query = candidates.TABLES[f"{split}_candidates"]
            write_query(model, connection, query, tmp_path / f"{split}-{test_negatives}")
    for split, same in {"train": True, "valid": True, "test": False}.items():
        few, many = ((tmp_path / f"{split}-{number}").read_bytes() for number in (5, 30))
        assert (few == many) is same


def test_threads_and_row_order_change_no_byte(tmp_path: Path) -> None:
    for threads in (1, 2):
        connection = ask(MANY)
        connection.execute(f"SET threads = {threads}")
        if threads == 2:
            for table in ("sequences", "popularity", "core_interactions"):
                connection.execute(
                    f"CREATE OR REPLACE TABLE {table} AS FROM {table} ORDER BY hash({table})"
                )
        for sampling in ("uniform", "popularity"):
            sample(connection, "train", 9, sampling=sampling)
            model, query = candidates.TABLES["train_candidates"]
            write_query(model, connection, query, tmp_path / f"{sampling}-{threads}")
    for sampling in ("uniform", "popularity"):
        assert (tmp_path / f"{sampling}-1").read_bytes() == (
            tmp_path / f"{sampling}-2"
        ).read_bytes()


def test_too_few_untouched_items_are_an_error_with_the_user_and_the_counts() -> None:
    log: Log = [("ann", item, time) for time, item in enumerate("abcdefgh")]
    log += [("bob", item, time) for time, item in enumerate("abcij")]
    connection = ask(log, **TRAIN_ONLY)
    with pytest.raises(DataError) as error:
        sample(connection, "train", 3)
    assert str(error.value) == (
        "filter_sequences.train_negatives: expected 3 items without an interaction for each user"
        " of train; "
        "got 2 for user 'ann', who has interactions with 8 of 10 items; lower it or add items"
    )
    assert len(sample(connection, "train", 2)["ann"]) == 3


def test_the_user_with_the_most_interactions_is_named_or_the_first_of_these() -> None:
    touched = {"ann": "abcdefgh", "cat": "abcdefghi", "bob": "abcdefghi", "dan": "aj"}
    log: Log = [(user, item, 0) for user, items in touched.items() for item in items]
    with pytest.raises(DataError, match="got 1 for user 'bob', who has interactions with 9 of 10"):
        sample(ask(log, **TRAIN_ONLY), "train", 3)


# -- withheld items and strata


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_training_counts_no_withheld_item_as_touched(split: str) -> None:
    log: Log = [(f"u{user}", f"i{(user + i) % 12:02}", i) for user in range(12) for i in range(8)]
    connection = ask(log, split="cold_items", cold_share=0.3, test_share=0.5)
    withheld = {item for (item,) in fetch(connection, "SELECT item FROM items WHERE withheld")}
    hidden = withheld if split == "train" else set()
    users = {
        user for (user,) in fetch(connection, f"SELECT user FROM sequences WHERE split = '{split}'")
    }
    touched = {user: set(in_order(log)[user]) - hidden for user in users}
    enough = 12 - len(hidden) - max(map(len, touched.values()))
    assert withheld
    assert sample(connection, split, enough).keys() == users
    with pytest.raises(DataError, match=rf"got {enough} for user .* of {12 - len(hidden)} items"):
        sample(connection, split, enough + 1)


@quick
@given(LOGS, st.integers(0, 9), st.sampled_from(["uniform", "popularity", "targets", "stratum"]))
def test_no_training_table_has_a_withheld_item(log: Log, seed: int, sampling: str) -> None:
    options = {"split": "cold_items", "cold_share": 0.3, "seed": seed}
    try:
        connection = ask(log, **options)
        candidates.make_candidates(
            connection,
            train_sampling=sampling,
            evaluation_sampling=[sampling],
            negatives={"train": 1, "valid": 1, "test": 1},
            seed=seed,
        )
    except DataError:
        return
    cold = {item for (item,) in fetch(connection, "SELECT item FROM items WHERE withheld")}
    for table in ("train", "selection"):
        rows = fetch(connection, f"SELECT DISTINCT item FROM {table}_candidates")
        assert not {item for (item,) in rows} & cold
    touched = in_order(log)
    for table in ("train", "selection", "valid", "test"):
        query = f"SELECT user, item FROM {table}_candidates JOIN sequences USING (sequence)"
        for user, item in fetch(connection, f"{query} WHERE NOT label"):
            assert item not in touched[user]


def test_withheld_items_are_candidates_of_evaluation() -> None:
    connection = ask(MANY, split="cold_items", cold_share=0.2)
    cold = {item for (item,) in fetch(connection, "SELECT item FROM items WHERE withheld")}
    asked = negatives(sample(connection, "test", 20))
    assert {item for items in asked.values() for item in items} >= cold
    targets = fetch(connection, "SELECT count(*) FROM sequences WHERE withheld AND split = 'test'")
    assert targets > [(20,)]


@quick
@given(LOGS, st.sampled_from(["users", "cold_items"]), st.integers(1, 2), st.integers(0, 9))
def test_stratum_sampling_draws_targets_of_the_same_stratum(
    log: Log, split: str, number: int, seed: int
) -> None:
    try:
        connection = ask(log, split=split, cold_share=0.4, test_share=0.5)
        rows = fetch(connection, "SELECT user, target, stratum FROM sequences WHERE split = 'test'")
        asked = negatives(sample(connection, "test", number, sampling="stratum", seed=seed))
    except DataError:
        return
    touched, strata = in_order(log), {target: stratum for _, target, stratum in rows}
    for user, target, stratum in rows:
        allowed = {item for item in strata if strata[item] == stratum} - set(touched[user])
        assert (user in asked) == (len(allowed) >= number)
        assert set(asked.get(user, [])) <= allowed - {target}


def test_stratum_sampling_keeps_warm_and_rare_targets_apart() -> None:
    # Two items are the targets of 50 users each, twenty of five: half of these are known.
    log: Log = []
    for user in range(200):
        target = f"warm{user % 4}" if user % 2 else f"rare{user % 40}"
        log += [(f"u{user}", f"x{user % 7}", 0), (f"u{user}", target, 1)]
    connection = ask(log, valid_share=0.0, test_share=0.5)
    asked = negatives(sample(connection, "test", 1, sampling="stratum"))
    strata = dict(fetch(connection, "SELECT item, stratum FROM popularity"))
    targets = dict(fetch(connection, "SELECT user, target FROM sequences WHERE split = 'test'"))
    assert {"rare", "warm"} <= {strata[targets[user]] for user in asked}
    for user, [item] in asked.items():
        assert strata[item] == strata[targets[user]]


# -- budgets


@pytest.mark.slow
@quick
@given(
    LOGS,
    st.sampled_from(["uniform", "popularity", "targets", "contemporary", "stratum"]),
    st.sampled_from(["all", "used"]),
    st.integers(1, 4),
)
def test_a_budget_keeps_exactly_the_candidates_of_used_sequences(
    log: Log, sampling: str, interactions: str, number: int
) -> None:
    assume(fewest_untouched(log))
    budget = BudgetParams(train=number, valid=None, test=None, interactions=interactions)
    whole, limited = ask(log, **TRAIN_ONLY), ask(log, budget=budget, **TRAIN_ONLY)
    try:
        expected = sample(whole, "train", 1, sampling=sampling)
    except DataError:
        return
    used = {user for (user,) in fetch(limited, "SELECT user FROM sequences WHERE used")}
    assert len(used) == min(number, len(fetch(whole, "FROM sequences")))
    expected = {user: rows for user, rows in expected.items() if user in used}
    if expected:
        assert sample(limited, "train", 1, sampling=sampling) == expected


# -- partial samplings: targets and contemporary ---------------------------------------------------


@pytest.mark.slow
@quick
@given(LOGS, st.sampled_from(["targets", "contemporary"]), st.integers(1, 3), st.integers(0, 9))
def test_a_partial_sampling_skips_sequences_with_too_few_items(
    log: Log, sampling: str, number: int, seed: int
) -> None:
    assume(fewest_untouched(log))
    touched = in_order(log)
    connection = ask(log, **TRAIN_ONLY)
    rows = fetch(connection, "SELECT user, target, timestamp FROM sequences")
    first: dict[str, int] = {}
    for _, item, time in log:
        first[item] = min(time, first.get(item, time))
    allowed = {
        user: (
            {target for _, target, _ in rows}
            if sampling == "targets"
            else {item for item, appeared in first.items() if appeared <= time}
        )
        - set(touched[user])
        for user, _, time in rows
    }
    enough = {user for user, items in allowed.items() if len(items) >= number}
    if not enough:
        with pytest.raises(DataError, match=rf"by the sampling {sampling}; got too few for all"):
            sample(connection, "train", number, sampling=sampling, seed=seed)
        return
    asked = negatives(sample(connection, "train", number, sampling=sampling, seed=seed))
    assert asked.keys() == enough
    for user, items in asked.items():
        assert len(items) == len(set(items)) == number
        assert set(items) <= allowed[user]


def test_targets_sampling_follows_the_target_counts() -> None:
    # The targets are a, b, c and d, with these counts; the users with target d are sampled for.
    counts = {"a": 200, "b": 100, "c": 50, "d": 1000}
    log: Log = []
    for target, users in counts.items():
        for user in range(users):
            log += [(f"{target}{user}", f"x{user % 7}", 0), (f"{target}{user}", target, 1)]
    connection = ask(log, min_history=1, **TRAIN_ONLY)
    asked = negatives(sample(connection, "train", 1, sampling="targets"))
    drawn = Counter(items[0] for user, items in asked.items() if user.startswith("d"))
    assert drawn.keys() == {"a", "b", "c"}
    expected = {item: 1000 * counts[item] / 350 for item in "abc"}
    for item, number in expected.items():
        assert abs(drawn[item] - number) < 5 * (number * (1 - number / 1000)) ** 0.5


def test_every_table_has_its_split_and_samplings() -> None:
    connection = ask(MANY, valid_share=0.2, test_share=0.2)
    skipped = candidates.make_candidates(
        connection,
        train_sampling="popularity",
        evaluation_sampling=["uniform", "targets"],
        negatives={"train": 2, "valid": 3, "test": 4},
        seed=7,
    )
    assert skipped == {}
    for table, split, samplings, number in (
        ("train", "train", ["popularity"], 2),
        ("selection", "valid", ["popularity"], 3),
        ("valid", "valid", ["targets", "uniform"], 3),
        ("test", "test", ["targets", "uniform"], 4),
    ):
        rows = fetch(
            connection,
            "SELECT sampling, split, count(DISTINCT sequence), count(*)"
            f" FROM {table}_candidates JOIN sequences USING (sequence) GROUP BY ALL ORDER BY ALL",
        )
        sequences = 600 if split == "train" else 200
        asked = (sequences, sequences * (number + 1))
        assert rows == [(sampling, split, *asked) for sampling in samplings]


@pytest.mark.parametrize(
    ("options", "layouts"),
    [
        ({"split": "users"}, ["uniform", "targets of valid", "targets of test"]),
        (
            {"split": "cold_items"},
            ["uniform without withheld", "uniform", "targets of valid", "targets of test"],
        ),
    ],
)
def test_equal_pools_are_laid_out_once(options: dict[str, str], layouts: list[str]) -> None:
    connection = ask(MANY, valid_share=0.2, test_share=0.2, **options)
    connection.execute("CALL truncate_duckdb_logs()")
    connection.execute("CALL enable_logging('QueryLog')")
    candidates.make_candidates(
        connection,
        train_sampling="uniform",
        evaluation_sampling=["uniform", "targets", "contemporary"],
        negatives={"train": 1, "valid": 2, "test": 2},
        seed=7,
    )
    created = fetch(
        connection,
        "SELECT message FROM duckdb_logs WHERE type = 'QueryLog'"
        " AND message LIKE '%TABLE weights AS%' ORDER BY timestamp",
    )
    connection.execute("CALL disable_logging()")
    assert len(created) == len(layouts)


def test_candidates_do_not_depend_on_which_requests_share_a_pool() -> None:
    requests = [
        candidates.Request("test_candidates", "test", sampling)
        for sampling in ("uniform", "contemporary")
    ]
    together, alone = (ask(MANY, valid_share=0.2, test_share=0.2) for _ in range(2))
    for connection, groups in ((together, [requests]), (alone, [[each] for each in requests])):
        make_candidates_table(connection, "test")
        for group in groups:
            candidates.sample_candidates(connection, group, negatives={"test": 4}, seed=7)
    query = "FROM test_candidates ORDER BY sampling, sequence, position"
    assert fetch(together, query) == fetch(alone, query)
    assert {row[0] for row in fetch(together, query)} == {each.sampling for each in requests}


def test_contemporary_sampling_draws_what_appears_by_the_targets_time() -> None:
    log: Log = [
        *[("a", "x", 1), ("a", "with b's", 5)],
        *[("b", "y", 0), ("b", "with a's", 5)],
        *[("c", "y", 0), ("c", "later", 6)],
        *[("d", "x", 1), ("d", "with a's", 9)],  # its first interaction counts
    ]
    asked = negatives(sample(ask(log, **TRAIN_ONLY), "train", 2, sampling="contemporary"))
    assert set(asked["a"]) == {"y", "with a's"}
    assert set(asked["b"]) == {"x", "with b's"}


def test_targets_sampling_stays_within_the_split() -> None:
    connection = ask(MANY, valid_share=0.2, test_share=0.2)
    asked = negatives(sample(connection, "test", 4, sampling="targets"))
    targets = fetch(connection, "SELECT DISTINCT target FROM sequences WHERE split = 'test'")
    assert {item for items in asked.values() for item in items} <= {item for (item,) in targets}


def test_contemporary_sampling_needs_timestamps() -> None:
    connection = ask([(user, item, None) for user, item, _ in MANY], **TRAIN_ONLY)
    with pytest.raises(DataError, match="a timestamp for every interaction"):
        sample(connection, "train", 2, sampling="contemporary")
