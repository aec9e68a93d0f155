"""What a baseline may know, and that it is no target and nothing later."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from questions import (
    LOGS,
    Log,
    ask,
    fetch,
    in_order,
    popularity,
    write_questions,
)

from mllm_msr.baselines.task import Task, find_cold_users, log_cold_users, read_task, write_scores
from mllm_msr.core.errors import DataError, ModelError
from mllm_msr.core.params import BudgetParams
from mllm_msr.core.schemas import Candidates, Popularity, Scores
from mllm_msr.core.tables import read_rows, write_rows

# Eight users take a, b and c a minute apart, then an item of their own, and then one more.
EIGHT: Log = [
    (f"u{user}", item, 100 * user + minute)
    for user in range(8)
    for minute, item in enumerate(["a", "b", "c", f"target{user}", f"later{user}"])
]
few = settings(max_examples=12)
POPULAR = {"history": "popular", "target": "popular"}


def read(log: Log, folder: Path, least: int = 1, **options: Any) -> Task:
    """Ask about a log and read the task, the core's users having at least so many interactions."""
    connection = ask(log, core=(least, 1), **options)
    paths = write_questions(connection, folder)
    by_time = options.get("split") == "time"
    return read_task(*paths, min_user_interactions=least, by_time=by_time)


def try_to_read(log: Log, least: int = 1, **options: Any) -> tuple[duckdb.DuckDBPyConnection, Task]:
    """Read the task of a random log, which must have one."""
    with TemporaryDirectory() as folder:
        try:
            connection = ask(log, core=(least, 1), **options)
            paths = write_questions(connection, Path(folder))
        except DataError:
            reject()  # too few users for three splits, or too few items
        by_time = options["split"] == "time"
        return connection, read_task(*paths, min_user_interactions=least, by_time=by_time)


@pytest.mark.slow
@few
@given(LOGS, st.sampled_from(["users", "leave_one_out", "time"]), st.integers(1, 3))
def test_what_is_known_of_used_users_is_what_popularity_counts(
    log: Log, split: str, number: int
) -> None:
    budget = BudgetParams(train=number, valid=None, test=1, interactions="used")
    with TemporaryDirectory() as folder:
        try:
            connection = ask(log, split=split, budget=budget)
            paths = write_questions(connection, Path(folder))
        except DataError:
            reject()
        by_time = split == "time"
        task = read_task(*paths, min_user_interactions=1, by_time=by_time, only_used=True)
    counts = Counter(task.items[item] for item in task.known.items)
    assert {item: counts[item] for item in task.items} == popularity(connection)
    used = fetch(connection, "SELECT user FROM sequences WHERE split = 'train' AND used")
    assert {user for user, items in known_items(task).items() if items} <= {u for (u,) in used}
    assert Counter(task.questions.splits.tolist())["test"] == 1


def test_a_budget_does_not_change_what_is_known(tmp_path: Path) -> None:
    budget = BudgetParams(train=1, valid=1, test=1, interactions="all")
    limited = read(EIGHT, tmp_path / "limited", valid_share=0.25, test_share=0.25, budget=budget)
    whole = read(EIGHT, tmp_path / "whole", valid_share=0.25, test_share=0.25)
    assert known_items(limited) == known_items(whole)
    assert (len(limited.questions.users), len(whole.questions.users)) == (2, 4)


def test_known_interactions_of_unused_users_are_refused_where_popularity_lacks_them(
    tmp_path: Path,
) -> None:
    budget = BudgetParams(train=1, valid=None, test=None, interactions="used")
    paths = write_questions(ask(EIGHT, budget=budget), tmp_path)
    with pytest.raises(DataError, match="as often as popularity counts them"):
        read_task(*paths, min_user_interactions=1, by_time=False)


def known_items(task: Task) -> dict[str, list[str]]:
    """Return each user's known items, in order."""
    known: dict[str, list[str]] = {user: [] for user in task.users}
    for user, item in zip(task.known.users, task.known.items, strict=True):
        known[task.users[user]].append(task.items[item])
    return known


@pytest.mark.slow
@few
@given(LOGS, st.sampled_from(["users", "leave_one_out", "time"]), st.integers(1, 3))
def test_what_is_known_is_what_popularity_counts_in_order_of_time(
    log: Log, split: str, least: int
) -> None:
    connection, task = try_to_read(log, least, split=split)
    counts = Counter(task.items[item] for item in task.known.items)
    assert {item: counts[item] for item in task.items} == popularity(connection)
    ordered = in_order(log)
    for user, items in known_items(task).items():
        assert items == ordered[user][: len(items)]


@pytest.mark.slow
@few
@given(LOGS, st.integers(1, 5), st.booleans())
def test_no_interaction_with_a_withheld_item_is_known(log: Log, share: int, popular: bool) -> None:
    history = {"history": "popular"} if popular else {}
    connection, task = try_to_read(log, split="cold_items", cold_share=share / 10, **history)
    query = "SELECT item FROM popularity WHERE withheld"
    cold = {item for (item,) in fetch(connection, query)}
    assert cold
    assert not cold & {task.items[item] for item in task.known.items}
    assert not cold & {task.items[item] for taken in task.questions.histories for item in taken}
    asked = {task.items[item] for item in task.selection.items}
    assert not cold & asked
    counts = Counter(task.items[item] for item in task.known.items)
    assert {item: counts[item] for item in task.items} == popularity(connection)


@few
@given(LOGS, st.sampled_from(["users", "leave_one_out", "time"]), st.booleans())
def test_no_held_out_target_and_nothing_later_is_known(log: Log, split: str, popular: bool) -> None:
    connection, task = try_to_read(log, split=split, **(POPULAR if popular else {}))
    ordered, known = in_order(log), known_items(task)
    held_out = fetch(connection, "SELECT user, target FROM sequences WHERE split <> 'train'")
    assert len(held_out) == len(task.questions.users)
    for user, target in held_out:
        assert not set(known[user]) & set(ordered[user][ordered[user].index(target) :])
    if split == "time":
        times = {(user, item): time for user, item, time in log}
        first = min(times[row] for row in held_out)
        assert all(times[user, item] < first for user in known for item in known[user])


def test_a_planted_target_and_what_comes_after_it_are_nowhere(tmp_path: Path) -> None:
    options = POPULAR | {"max_history": 3, "valid_share": 0.25, "test_share": 0.25}
    # Of their four most popular items the last is each user's own target, or else what is later.
    task = read(EIGHT, tmp_path, **options)
    asked = {task.users[user] for user in task.questions.users}
    assert len(asked) == 4
    planted = {f"{kind}{user[1:]}" for user in asked for kind in ("target", "later")}
    targets = task.candidates.items[task.candidates.labels]
    assert {task.items[item] for item in targets} <= planted
    seen = {task.items[item] for history in task.questions.histories for item in history}
    seen |= {task.items[item] for item in task.known.items if task.items[item] in planted}
    assert {item for item in seen if item.startswith("later")} == set()
    for item in targets:
        assert task.items[item] not in seen


@pytest.mark.parametrize("split", ["users", "leave_one_out"])
def test_every_user_that_is_asked_about_is_known_by_earlier_interactions(
    tmp_path: Path, split: str
) -> None:
    task = read(EIGHT, tmp_path, split=split)
    assert set(task.questions.users) <= set(task.known.users)
    # FPMC learns of a user from a step between two, and would have nothing of one without.
    assert not find_cold_users(task.training, least=2)[task.questions.users].any()


def test_under_the_split_by_time_late_users_are_cold_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # One after the other: u5, u6 and u7 begin after the first target that is held out, u4's.
    task = read(EIGHT, tmp_path, split="time", valid_share=0.2, test_share=0.2)
    known = known_items(task)
    asked = {task.users[user] for user in task.questions.users}
    late = {user for user in asked if not known[user]}
    assert late
    assert late < asked
    cold = find_cold_users(task.training, least=1)
    assert {task.users[user] for user in np.flatnonzero(cold)} & asked == late
    log_cold_users(task, least=1)
    assert f"{len(late)} of {len(asked)} users asked about have fewer than 1 known" in caplog.text


def test_where_all_are_known_no_user_is_cold_and_nothing_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = read(EIGHT, tmp_path)
    assert not find_cold_users(task.training, least=1).any()
    log_cold_users(task, least=1)
    assert not caplog.text


def test_users_of_the_core_without_a_question_are_known_too(tmp_path: Path) -> None:
    short: Log = [("bob", "a", 0), ("bob", "b", 1)]
    task = read(EIGHT + short, tmp_path, least=2, min_history=3)
    assert known_items(task)["bob"] == ["a", "b"]


def test_users_outside_the_core_are_not(tmp_path: Path) -> None:
    task = read([*EIGHT, ("bob", "a", 0)], tmp_path, least=2)
    assert "bob" not in task.users


def test_questions_and_candidates_are_those_of_the_tables(tmp_path: Path) -> None:
    task = read(EIGHT, tmp_path, split="leave_one_out", max_history=2)
    asked = task.questions
    assert asked.splits.tolist() == ["valid"] * 8 + ["test"] * 8
    names = [[task.items[item] for item in history] for history in asked.histories]
    assert names == [["b", "c"]] * 8 + [["c", f"target{user}"] for user in range(8)]
    rows = [
        row
        for split in ("valid", "test")
        for row in sorted(
            read_rows_of(tmp_path / f"filtered/{split}_candidates.parquet"),
            key=lambda row: (row["sequence"], row["item"]),
        )
    ]
    found = zip(
        asked.sequences[task.candidates.questions].tolist(),
        (task.items[item] for item in task.candidates.items),
        task.candidates.labels.tolist(),
        strict=True,
    )
    assert list(found) == [(row["sequence"], row["item"], row["label"]) for row in rows]


def test_a_pair_that_two_samplings_have_is_asked_once(tmp_path: Path) -> None:
    task = read(EIGHT, tmp_path, split="leave_one_out", max_history=2)
    path = tmp_path / "filtered/test_candidates.parquet"
    rows = read_rows_of(path)
    again = [row | {"sampling": "targets"} for row in rows]
    write_rows(Candidates, [*rows, *again], path)
    paths = tmp_path / "interactions.parquet", tmp_path / "filtered"
    twice = read_task(*paths, min_user_interactions=1, by_time=False)
    for name in ("questions", "items", "labels"):
        assert np.array_equal(getattr(twice.candidates, name), getattr(task.candidates, name))


def test_the_selection_is_of_valid_only(tmp_path: Path) -> None:
    task = read(EIGHT, tmp_path, split="leave_one_out", max_history=2)
    assert set(task.questions.splits[task.selection.questions]) == {"valid"}
    assert task.selection.labels.sum() == 8


def test_timestamps_are_those_of_the_targets(tmp_path: Path) -> None:
    task = read(EIGHT, tmp_path, valid_share=0.5, test_share=0.25)
    assert task.questions.timestamps is not None
    assert [time % 100 for time in task.questions.timestamps] == [4] * 6
    times = [task.questions.timestamps[index] // 100 for index in range(6)]
    assert [f"u{time}" for time in times] == [task.users[user] for user in task.questions.users]


def test_a_missing_timestamp_leaves_none(tmp_path: Path) -> None:
    log = [(user, item, None if item == "a" else time) for user, item, time in EIGHT]
    task = read(log, tmp_path)
    assert task.known.timestamps is None
    assert known_items(task)["u0"][:3] == ["a", "b", "c"]


def test_tables_of_different_runs_are_refused(tmp_path: Path) -> None:
    interactions, filtered = write_questions(ask(EIGHT), tmp_path)
    counts = list(read_rows(Popularity, filtered / "popularity.parquet", "item"))
    counts[0]["interactions"] += 1
    write_rows(Popularity, counts, filtered / "popularity.parquet")
    with pytest.raises(DataError, match="as often as popularity counts them; got 1 others"):
        read_task(interactions, filtered, min_user_interactions=1, by_time=False)


def test_another_split_than_that_of_the_tables_is_refused(tmp_path: Path) -> None:
    paths = write_questions(ask(EIGHT, split="time"), tmp_path)
    with pytest.raises(DataError, match="as often as popularity counts them"):
        read_task(*paths, min_user_interactions=1, by_time=False)


def test_scores_are_written_as_the_table_of_scores(tmp_path: Path) -> None:
    task = read(EIGHT, tmp_path)
    scores = np.arange(len(task.candidates.items), dtype=np.float64)
    path = tmp_path / "scores.parquet"
    assert write_scores(task, scores, path) == len(scores)
    found = {(r["sequence"], r["item"]): r for r in read_rows(Scores, path, "sequence, item")}
    for index, item in enumerate(task.candidates.items):
        question = task.candidates.questions[index]
        row = found[task.questions.sequences[question], task.items[item]]
        assert (row["log_odds"], row["split"]) == (index, task.questions.splits[question])


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    task = read(EIGHT, tmp_path)
    with pytest.raises(ModelError, match="expected finite scores"):
        write_scores(task, np.full(len(task.candidates.items), np.nan), tmp_path / "scores.parquet")
    assert not (tmp_path / "scores.parquet").exists()


def read_rows_of(path: Path) -> list[dict[str, Any]]:
    return list(read_rows(Candidates, path, "sequence, position"))
