"""The input of every baseline: known interactions, questions, and integer ids of users and items.

A baseline may know what ``popularity`` counts (the rules are in the docstring of
:mod:`mllm_msr.data.sequences`) and nothing else; that both agree, item by item, is checked whenever
a task is read. Beyond that a question holds only its history. So no target and nothing later is in
any feature. Only used sequences are questions. With ``budget.interactions: used`` only the known
interactions of users with a used training sequence are learned from, as in a few-shot comparison.
Nothing is known of items that the split ``cold_items`` withholds.

All known interactions are learned from, each in its place, whatever ``filter_sequences.history``
and ``target`` are. Where these are ``popular``, as in the paper's code, a question's history has
gaps and its target need not come last: baselines are then asked something other than what they
learned, and the recommender is not.

Users of valid and test have known interactions too, those before their first held-out target, so
that no user who is asked about is new to a baseline. There are two exceptions: under the split by
time nothing is known of users who began after the first held-out target, and with
``budget.interactions: used`` nothing is known of users without a used training sequence. A baseline
that learns something of each user then has to score cold-start users without it
(:func:`find_cold_users`).
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as arrow

from mllm_msr.baselines.discovery import Inputs, find_baseline
from mllm_msr.baselines.learning.trained import score_candidates
from mllm_msr.core import schemas, tables
from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.core.errors import DataError, ModelError
from mllm_msr.core.files import state_dir
from mllm_msr.core.params import FilterSequencesParams, Section

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """The interactions to learn from, by user and then in order of time; [interactions] each.

    Attributes:
        users: Numbers of users, ascending.
        items: Numbers of items.
        timestamps: Milliseconds since 1970; None where any is missing.
    """

    users: Integers
    items: Integers
    timestamps: Integers | None


@dataclass(frozen=True)
class Questions:
    """The used sequences of valid, then those of test; [questions] each.

    Attributes:
        sequences: Their identifiers in the tables.
        splits: ``valid`` or ``test``.
        users: Numbers of users.
        histories: Numbers of the items before the target, the oldest first; at least one.
        taken: Numbers of all items that the user took before the target, ascending. They are left
            out of lists and not learned from.
        timestamps: Of the targets, in milliseconds since 1970; None where any is missing.
    """

    sequences: Integers
    splits: npt.NDArray[np.str_]
    users: Integers
    histories: list[Integers]
    taken: list[Integers]
    timestamps: Integers | None


@dataclass(frozen=True)
class Candidates:
    """Pairs of question and item, in the order of the questions; [candidates] each.

    Attributes:
        questions: Indices of the questions, ascending.
        items: Numbers of items.
        labels: True for the target.
    """

    questions: Integers
    items: Integers
    labels: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Training:
    """What a baseline learns from: no question of test, and no candidate to score.

    Attributes:
        items: Names of items.
        users: Names of users.
        known: Interactions.
        longest: Items of the longest history that is asked about.
        histories: Numbers of items of each validation question by which an epoch may be chosen.
        selection: The candidates of these questions, the only ones whose labels may be read.
    """

    items: list[str]
    users: list[str]
    known: Known
    longest: int
    histories: list[Integers]
    selection: Candidates


@dataclass(frozen=True)
class Task:
    """All of it; the number of a user or an item is the index of its name.

    Attributes:
        items: Names of items.
        users: Names of users.
        known: What to learn from.
        questions: The sequences asked about.
        candidates: What is to be scored: each pair once, however many samplings have it.
        selection: The candidates of valid to choose a model by: the only labels that may be read.
    """

    items: list[str]
    users: list[str]
    known: Known
    questions: Questions
    candidates: Candidates
    selection: Candidates

    @property
    def training(self) -> Training:
        """What to learn from; no label of test gets beyond this property."""
        histories, asked = self.questions.histories, self.selection
        valid, questions = np.unique(asked.questions, return_inverse=True)
        return Training(
            self.items,
            self.users,
            self.known,
            longest=max(map(len, histories)),
            histories=[histories[question] for question in valid],
            selection=Candidates(questions, asked.items, asked.labels),
        )


def read_task(
    interactions: Path,
    filtered: Path,
    *,
    min_user_interactions: int,
    by_time: bool,
    only_used: bool = False,
) -> Task:
    """Read the interactions that baselines may use, and the questions.

    Args:
        interactions: The table of preprocess.
        filtered: Folder of filter_sequences.
        min_user_interactions: The least interactions with k-core items of a user of the k-core.
        by_time: Whether the split is ``time``, so that nothing is known from the first valid
            target's time on.
        only_used: Whether only users with a used training sequence are learned from.

    Raises:
        DataError: A table is missing or breaks its model, or they are not of one run.
    """
    inputs: dict[str, tuple[schemas.AnyTable, Path]] = {
        "interactions": (schemas.Interactions, interactions),
        "popularity": (schemas.Popularity, filtered / "popularity.parquet"),
        "sequences": (schemas.Sequences, filtered / "sequences.parquet"),
        "histories": (schemas.Histories, filtered / "histories.parquet"),
        "selection_candidates": (schemas.Candidates, filtered / "selection_candidates.parquet"),
        "valid_candidates": (schemas.Candidates, filtered / "valid_candidates.parquet"),
        "test_candidates": (schemas.Candidates, filtered / "test_candidates.parquet"),
    }
    with duckdb.connect() as connection:
        for name, (model, path) in inputs.items():
            tables.read_table(model, connection, path, name)
        _number_core(connection, min_user_interactions)
        _number_questions(connection)
        _choose_known(connection, by_time=by_time, only_used=only_used)
        _refuse_other_runs(connection, filtered)
        return Task(
            items=_fetch(connection, "FROM items ORDER BY item_id")["item"].tolist(),
            users=_fetch(connection, "FROM users ORDER BY user_id")["user"].tolist(),
            known=_read_known(connection),
            questions=_read_questions(connection),
            candidates=_read_candidates(connection, "candidates"),
            selection=_read_candidates(connection, "selection"),
        )


def run_baseline(
    name: str,
    settings: Section,
    filters: FilterSequencesParams,
    interactions: Path,
    filtered: Path,
    inputs: Inputs,
    out: Path,
) -> tuple[Path, int]:
    """Read the task, score its candidates by one baseline and write the scores.

    A baseline that learns is kept in the state directory: where it was trained on the same before,
    it is loaded.

    Args:
        name: Of the baseline.
        settings: The baseline's own.
        filters: Those of ``filter_sequences``.
        interactions: The table of preprocess.
        filtered: Folder of ``filter_sequences``.
        inputs: Further tables of the stage.
        out: Folder of the scores.

    Returns:
        The table Scores, and the number of its rows.

    Raises:
        DataError: A table is missing, of another run, or lacks what the baseline needs.
        ModelError: The baseline needs a package that is not installed, or its training diverges.
        ParamsError: There is no such baseline.
    """
    task = read_task(
        interactions,
        filtered,
        min_user_interactions=filters.min_user_interactions,
        by_time=filters.split == "time",
        only_used=filters.budget.interactions == "used",
    )
    baseline, path = find_baseline(name), out / f"{name}.parquet"
    scores = score_candidates(baseline, task, settings, inputs, state_dir() / "baselines")
    return path, write_scores(task, scores, path)


def find_cold_users(training: Training, least: int) -> npt.NDArray[np.bool_]:
    """Return which users have few known interactions, [users].

    Args:
        training: What is known.
        least: Known interactions from which on a model learns something of a user.
    """
    return np.bincount(training.known.users, minlength=len(training.users)) < least


def find_cold_items(training: Training) -> npt.NDArray[np.bool_]:
    """Return which items have no known interaction, [items].

    None of them is a training negative: that would teach that cold items are not taken.
    """
    cold = np.ones(len(training.items), dtype=np.bool_)
    cold[training.known.items] = False
    return cold


def log_cold_users(task: Task, least: int) -> None:
    """Log how many of the users asked about are cold-start users (:func:`find_cold_users`)."""
    asked = np.unique(task.questions.users)
    if count := np.count_nonzero(find_cold_users(task.training, least)[asked]):
        log.warning(
            "%s of %s users asked about have fewer than %d known interactions: "
            "they are scored without what is learned of a user",
            f"{count:,}",
            f"{len(asked):,}",
            least,
        )


def write_scores(task: Task, scores: Floats, path: Path) -> int:
    """Write a score per candidate as the table Scores, by sequence and item; return its rows.

    Raises:
        ModelError: A score is no finite number.
        DataError: The disk is full.
    """
    if not np.isfinite(scores).all():
        fix = "its training diverged: lower its learning rate"
        raise ModelError(expected="finite scores", got="inf or nan", where=str(path), fix=fix)
    questions, asked = task.questions, task.candidates
    rows = arrow.table(
        {
            "sequence": questions.sequences[asked.questions],
            "item": arrow.array(task.items).take(arrow.array(asked.items)),
            "split": questions.splits[asked.questions].tolist(),
            "log_odds": scores,
        }
    )
    with duckdb.connect() as connection:
        connection.register("scores", rows)
        return tables.write_query(
            schemas.Scores, connection, "FROM scores ORDER BY sequence, item", path
        )


def _number_core(connection: duckdb.DuckDBPyConnection, min_user_interactions: int) -> None:
    """Make ``items``, ``users`` and ``core``, the interactions between them with their ordinals.

    The core is the largest set of its kind, so whoever has enough interactions with its items is
    in it.
    """
    connection.execute(
        f"""
        CREATE TABLE items AS
        SELECT item, row_number() OVER (ORDER BY item) - 1 AS item_id, withheld FROM popularity;
        CREATE TABLE core AS
        SELECT user, item_id, timestamp, row_number() OVER (
            PARTITION BY user ORDER BY timestamp NULLS FIRST, position, item_id
        ) AS ordinal
        FROM interactions JOIN items USING (item)
        QUALIFY count(*) OVER (PARTITION BY user) >= {min_user_interactions};
        CREATE TABLE users AS
        SELECT user, row_number() OVER (ORDER BY user) - 1 AS user_id
        FROM (SELECT DISTINCT user FROM core);
        """
    )


def _number_questions(connection: duckdb.DuckDBPyConnection) -> None:
    """Make ``held_out`` with each target's ordinal and time, ``questions``, and candidates."""
    connection.execute(
        """
        CREATE TABLE held_out AS
        SELECT sequence, split, used, user_id, ordinal, timestamp
        FROM sequences JOIN items ON item = target JOIN core USING (user, item_id)
             JOIN users USING (user)
        WHERE split <> 'train';
        CREATE TABLE questions AS
        SELECT row_number() OVER (ORDER BY split DESC, sequence) - 1 AS question,
               sequence, split, user_id, ordinal, timestamp
        FROM held_out WHERE used;
        CREATE TABLE asked AS
        SELECT DISTINCT sequence, item, label
        FROM (FROM valid_candidates UNION ALL BY NAME FROM test_candidates);
        CREATE TABLE candidates AS
        SELECT question, item_id, label
        FROM asked JOIN questions USING (sequence) JOIN items USING (item);
        CREATE TABLE selection AS
        SELECT question, item_id, label
        FROM selection_candidates JOIN questions USING (sequence) JOIN items USING (item);
        """
    )


def _choose_known(connection: duckdb.DuckDBPyConnection, *, by_time: bool, only_used: bool) -> None:
    """Make ``known``: what comes before a user's first held-out target, or before all of them.

    Interactions with withheld items are not known.
    """
    earlier = "AND timestamp < (SELECT min(timestamp) FROM held_out)" if by_time else ""
    used = (
        "AND user IN (SELECT user FROM sequences WHERE split = 'train' AND used)"
        if only_used
        else ""
    )
    connection.execute(
        f"""
        CREATE TABLE known AS
        WITH ends AS (
            SELECT user_id, min(ordinal) AS first_ordinal FROM held_out GROUP BY user_id
        )
        SELECT user_id, ordinal, item_id, timestamp
        FROM core JOIN users USING (user) JOIN items USING (item_id)
             LEFT JOIN ends USING (user_id)
        WHERE NOT withheld AND (first_ordinal IS NULL OR ordinal < first_ordinal) {earlier} {used}
        """
    )


def _refuse_other_runs(connection: duckdb.DuckDBPyConnection, filtered: Path) -> None:
    """Refuse tables of different runs: unmatched rows, or other counts of popularity."""
    checks = {
        "sequences of valid and test whose target is an interaction": (
            "SELECT (SELECT count(*) FROM sequences WHERE split <> 'train')"
            " - (SELECT count(*) FROM held_out)"
        ),
        "candidates that are items of the k-core": (
            "SELECT (SELECT count(*) FROM asked) + (SELECT count(*) FROM selection_candidates)"
            " - (SELECT count(*) FROM candidates) - (SELECT count(*) FROM selection)"
        ),
        "histories of items of the k-core": (
            "SELECT count(*) FROM histories SEMI JOIN questions USING (sequence)"
            " ANTI JOIN items USING (item)"
        ),
        "known interactions with an item as often as popularity counts them": """
            WITH counts AS (SELECT item_id, count(*) AS number FROM known GROUP BY item_id)
            SELECT count(*) FROM popularity JOIN items USING (item) LEFT JOIN counts USING (item_id)
            WHERE interactions <> coalesce(number, 0)
            """,
    }
    for expected, query in checks.items():
        (others,) = connection.execute(query).fetchall()[0]
        if others:
            fix = "run the stages preprocess and filter_sequences again, with these settings"
            raise DataError(
                expected=expected, got=f"{others:,} others", where=str(filtered), fix=fix
            )


def _read_known(connection: duckdb.DuckDBPyConnection) -> Known:
    columns = _fetch(connection, "FROM known ORDER BY user_id, ordinal")
    return Known(columns["user_id"], columns["item_id"], _complete(columns["timestamp"]))


def _read_questions(connection: duckdb.DuckDBPyConnection) -> Questions:
    columns = _fetch(connection, "FROM questions ORDER BY question")
    items = _fetch(
        connection,
        "SELECT question, item_id FROM histories JOIN questions USING (sequence)"
        " JOIN items USING (item) ORDER BY question, histories.position",
    )
    taken = _fetch(
        connection,
        "SELECT question, item_id FROM questions JOIN users USING (user_id) JOIN core USING (user)"
        " WHERE core.ordinal < questions.ordinal ORDER BY question, item_id",
    )
    histories, before = (
        np.split(rows["item_id"], np.searchsorted(rows["question"], columns["question"])[1:])
        for rows in (items, taken)
    )
    return Questions(
        columns["sequence"],
        columns["split"].astype(np.str_),
        columns["user_id"],
        histories,
        before,
        _complete(columns["timestamp"]),
    )


def _read_candidates(connection: duckdb.DuckDBPyConnection, table: str) -> Candidates:
    columns = _fetch(connection, f"FROM {table} ORDER BY question, item_id")
    return Candidates(columns["question"], columns["item_id"], columns["label"])


def _fetch(connection: duckdb.DuckDBPyConnection, query: str) -> dict[str, npt.NDArray[Any]]:
    return connection.execute(query).fetchnumpy()


def _complete(timestamps: npt.NDArray[Any]) -> Integers | None:
    """Return timestamps if none is missing."""
    return None if np.ma.is_masked(timestamps) else np.asarray(timestamps, dtype=np.int64)
