"""Small interaction logs, and the sequences and candidates made from them."""

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import duckdb
from hypothesis import settings, strategies

from mllm_msr.core.params import Sampling
from mllm_msr.core.schemas import SPLITS
from mllm_msr.data import candidates, sequences

Log = list[tuple[str, str, int | None]]  # user, item, timestamp

DEFAULTS: dict[str, Any] = {
    "min_history": 1,
    "max_history": 3,
    "history": "recent",
    "target": "last",
    "split": "users",
    "cold_share": 0.2,
    "valid_share": 0.2,
    "test_share": 0.2,
    "seed": 7,
}

quick = settings(max_examples=25)
NUMBERS = itertools.count()  # of the databases

# Few users, items and times, so that rare users and ties are frequent. A pair occurs once.
LOGS = strategies.lists(
    strategies.tuples(
        strategies.integers(1, 8).map("u{}".format),
        strategies.integers(1, 9).map("i{}".format),
        strategies.integers(0, 5),
    ),
    min_size=1,
    max_size=50,
    unique_by=lambda row: row[:2],
)


@functools.cache
def _start_duckdb() -> duckdb.DuckDBPyConnection:
    """Start DuckDB once: a start takes 15 ms, and tests of many logs would need hundreds."""
    return duckdb.connect(config={"threads": 2})


def open_log(log: Log) -> duckdb.DuckDBPyConnection:
    """Return a new database with the table ``interactions``; positions are the row numbers."""
    connection = _start_duckdb().cursor()
    name = f"log_{next(NUMBERS)}"
    connection.execute(f"ATTACH ':memory:' AS {name}; USE {name}")
    connection.execute(
        "CREATE TABLE interactions (user VARCHAR, item VARCHAR, timestamp BIGINT, position BIGINT)"
    )
    users, items, times = ([row[column] for row in log] for column in range(3))
    connection.execute(  # one statement, because executemany takes a millisecond per row
        "INSERT INTO interactions SELECT unnest($1::VARCHAR[]), unnest($2::VARCHAR[]),"
        " unnest($3::BIGINT[]), unnest(range(len($1)))",
        [users, items, times],
    )
    return connection


def ask(log: Log, core: tuple[int, int] = (1, 1), **options: Any) -> duckdb.DuckDBPyConnection:
    """Make the sequences of a log, with the default settings above unless overridden."""
    connection = open_log(log)
    sequences.filter_k_core(
        connection, min_user_interactions=core[0], min_item_interactions=core[1]
    )
    sequences.make_sequences(connection, **DEFAULTS | options)
    return connection


def fetch(connection: duckdb.DuckDBPyConnection, query: str) -> list[tuple[Any, ...]]:
    return connection.execute(query).fetchall()


def histories(connection: duckdb.DuckDBPyConnection) -> dict[tuple[str, str], list[str]]:
    """Return the history and then the target of each (user, split)."""
    rows = fetch(
        connection,
        "SELECT user, split, list(item ORDER BY position), any_value(target)"
        " FROM sequences JOIN histories USING (sequence) GROUP BY user, split",
    )
    return {(user, split): [*history, target] for user, split, history, target in rows}


def popularity(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    return dict(fetch(connection, "SELECT item, interactions FROM popularity"))


def sample(
    connection: duckdb.DuckDBPyConnection,
    split: str,
    negatives: int,
    sampling: Sampling = "uniform",
    seed: int = 7,
) -> dict[str, list[tuple[str, bool]]]:
    """Return each user's candidates and labels of a split, in order of position."""
    make_candidates_table(connection, split)
    request = candidates.Request(f"{split}_candidates", split, sampling)
    candidates.sample_candidates(connection, [request], negatives={split: negatives}, seed=seed)
    asked = defaultdict(list)
    for user, position, item, label in fetch(
        connection,
        "SELECT user, position, item, label"
        f" FROM {split}_candidates JOIN sequences USING (sequence) ORDER BY user, position",
    ):
        assert position == len(asked[user])
        asked[user].append((item, label))
    return asked


def make_candidates_table(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    connection.execute(
        f"CREATE OR REPLACE TABLE {name}_candidates"
        " (sampling VARCHAR, sequence BIGINT, position BIGINT, item VARCHAR, label BOOLEAN)"
    )


def write_questions(
    connection: duckdb.DuckDBPyConnection, folder: Path, negatives: int = 1
) -> tuple[Path, Path]:
    """Write the outputs of preprocess and filter_sequences; return the table and the folder."""
    for split in SPLITS:
        sample(connection, split, negatives)
    make_candidates_table(connection, "selection")
    request = candidates.Request("selection_candidates", "valid", "uniform")
    candidates.sample_candidates(connection, [request], negatives={"valid": negatives}, seed=7)
    interactions, filtered = folder / "interactions.parquet", folder / "filtered"
    filtered.mkdir(parents=True)
    connection.sql("FROM interactions").write_parquet(str(interactions))
    for name, (_, query) in (sequences.TABLES | candidates.TABLES).items():
        connection.sql(query).write_parquet(str(filtered / f"{name}.parquet"))
    return interactions, filtered


# With these settings a user's five popular items are history and target; a later one is neither.
PLANTING: dict[str, Any] = {
    "history": "popular",
    "target": "popular",
    "min_history": 3,
    "max_history": 4,
}


def plant(planted_for: Iterable[str] = ()) -> Log:
    """Return a log of thirty users with five of twenty popular items, then one of ten rare ones.

    Args:
        planted_for: Users whose target (the fifth popular item) and rare item are replaced.
    """
    log: Log = []
    for user in range(30):
        name, popular = f"u{user:02}", [(user + 4 * step) % 20 for step in range(5)]
        rare = 20 + user % 10
        if name in planted_for:
            popular[4], rare = (user + 1) % 20, 20 + (user + 1) % 10
        taken = [f"i{item:02}" for item in (*popular, rare)]
        log += [(name, item, 100 * step + user) for step, item in enumerate(taken)]
    return log


def planted_users() -> list[str]:
    """Return the users of the planted log whose sequences are in test."""
    rows = fetch(ask(plant(), **PLANTING), "SELECT user FROM sequences WHERE split = 'test'")
    return [user for (user,) in rows]


def fewest_untouched(log: Log) -> int:
    """Return the fewest untouched items that a user with a history has."""
    items = {item for _, item, _ in log}
    return min((len(items) - len(m) for m in in_order(log).values() if len(m) > 1), default=0)


def core_of(log: Iterable[tuple[str, str, Any]], users: int, items: int) -> list[tuple[Any, ...]]:
    """Return the k-core in plain Python, removing rare users and items together."""
    rows = list(log)
    while True:
        per_user, per_item = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if per_user[row[0]] >= users and per_item[row[1]] >= items]
        if len(kept) == len(rows):
            return kept
        rows = kept


def in_order(log: Log) -> dict[str, list[str]]:
    """Return each user's items, ordered by time and then by the log."""
    ordered = defaultdict(list)
    for user, item, _ in sorted(log, key=lambda row: -1 if row[2] is None else row[2]):
        ordered[user].append(item)
    return ordered
