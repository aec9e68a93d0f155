"""From interactions to questions: who is asked, after which history, about which target.

Everything happens in DuckDB, in tables of one connection that each function reads and leaves
behind, so that a hundred million interactions need no more memory than DuckDB is allowed:

    interactions (view) -> users, items, core_interactions     filter_k_core
                        -> sequences, popularity, histories    make_sequences

Splits:
    * ``users`` (the authors'): one sequence per user; users are shuffled by the seed and cut.
    * ``leave_one_out``: up to three sequences per user; the last target is for testing, the one
      before for validation, the one before that for training.
    * ``time``: one sequence per user, ordered by the target's time; the earliest are for training,
      the latest for testing. Targets of one time are never parted: where a cut falls among them,
      all go to the later split. So every training target, and with it every training history, is
      strictly earlier than every valid target, and those than every test target. The price is
      that training users are those who stopped early.

What may be known when:
    * A history holds only interactions that come before its target.
    * ``popularity`` is what is known when the model is trained. Of a user with a valid or test
      target it counts only what came before the first such target; under ``time`` it counts, for
      every user, only what is earlier than the first valid target.
    * The core, the pool of candidates and, under ``target: popular``, the choice of items look at
      all interactions, as the authors and the field do. The questions depend on them, no answer.

Order in time is (timestamp, position, item): ties are broken by the publisher's order, then by
the item's name. Chance comes from MD5 of the seed and the user's name, so that neither DuckDB's
version nor the order of rows nor the number of threads changes a result.
"""

from itertools import cycle
from typing import Any, Literal

import duckdb

from mllm_msr.core.errors import DataError
from mllm_msr.core.tables import (
    SPLITS,
    AnyTable,
    Histories,
    ImageSources,
    Items,
    Popularity,
    Sequences,
)

History = Literal["recent", "popular"]
Target = Literal["last", "popular"]
Split = Literal["users", "leave_one_out", "time"]

# What to write once the tables are made; sorted, so that equal inputs give equal bytes.
TABLES: dict[str, tuple[AnyTable, str]] = {
    "sequences": (
        Sequences,
        "SELECT sequence, user, split, target, history_length FROM sequences ORDER BY sequence",
    ),
    "histories": (Histories, "FROM histories ORDER BY sequence, position"),
    "popularity": (Popularity, "SELECT item, interactions FROM popularity ORDER BY item"),
}
# The rest of the catalogue: no later stage describes an item that nobody asks about.
KEPT: dict[str, tuple[AnyTable, str]] = {
    "items": (Items, "FROM catalogue SEMI JOIN items USING (item) ORDER BY item"),
    "image_sources": (
        ImageSources,
        "FROM image_sources SEMI JOIN items USING (item) ORDER BY item",
    ),
}


def stable_hash(text: str) -> str:
    """Write the SQL for a whole number in [0, 2^60), the first 15 digits of a text's MD5.

    Args:
        text: An SQL expression of type VARCHAR.
    """
    return number_of(f"left(md5({text}), 15)")


def number_of(digits: str) -> str:
    """Write the SQL for the number that hexadecimal digits, an SQL expression, stand for."""
    return f"CAST('0x' || {digits} AS BIGINT)"


def filter_k_core(
    connection: duckdb.DuckDBPyConnection, *, min_user_interactions: int, min_item_interactions: int
) -> dict[str, int]:
    """Keep the largest set of users and items that all have enough interactions with each other.

    Rare users, then rare items, are removed until nothing changes; what is left does not depend
    on that order. Names become numbers, in the order of the names.

    Args:
        connection: Has the view ``interactions`` (:class:`mllm_msr.core.tables.Interactions`); gets
            ``users (user_id, user)``, ``items (item_id, item, interactions)`` and
            ``core_interactions (user_id, item_id, timestamp, place)``; place 1 is a user's first.
        min_user_interactions: Interactions of a user, at least.
        min_item_interactions: Interactions with an item, at least.

    Returns:
        How many interactions were dropped, by reason.

    Raises:
        DataError: Nobody is left.
    """
    _number_names(connection)
    dropped = {"interactions_of_rare_users": 0, "interactions_of_rare_items": 0}
    rare = cycle((("user", min_user_interactions), ("item", min_item_interactions)))
    for turn, (name, minimum) in enumerate(rare):
        removed = _drop_rare(connection, f"{name}_id", minimum)
        dropped[f"interactions_of_rare_{name}s"] += removed
        if turn and not removed:  # then the other, whose turn was before, finds nothing either
            break
    _refuse_empty_core(connection, min_user_interactions, min_item_interactions)
    _order_interactions(connection)
    return dropped


def refuse_unknown_items(connection: duckdb.DuckDBPyConnection) -> None:
    """Stop when an item of the core has no row in the view ``catalogue``.

    Raises:
        DataError: Names the first such item and counts them.
    """
    unknown, first = one_row(
        connection, "SELECT count(*), min(item) FROM items ANTI JOIN catalogue USING (item)"
    )
    if unknown:
        raise DataError(
            expected="a row in the table of items for every item that is kept",
            got=f"{unknown:,} items without, first {first!r}",
            where="items and interactions",
            fix="use the two tables of one run of preprocess",
        )


def refuse_missing_timestamps(
    connection: duckdb.DuckDBPyConnection, purpose: str, setting: str, fix: str
) -> None:
    """Refuse a setting that needs the time of every interaction where some have none.

    Raises:
        DataError: An interaction of the core has no timestamp.
    """
    missing, total = one_row(
        connection,
        "SELECT count(*) FILTER (timestamp IS NULL), count(*) FROM core_interactions",
    )
    if missing:
        got = f"{missing:,} of {total:,} without"
        raise DataError(
            expected=f"a timestamp for every interaction, to {purpose}",
            got=got,
            where=setting,
            fix=fix,
        )


def make_sequences(
    connection: duckdb.DuckDBPyConnection,
    *,
    min_history: int,
    max_history: int,
    history: History,
    target: Target,
    split: Split,
    valid_share: float,
    test_share: float,
    seed: int,
) -> dict[str, int]:
    """Choose targets, splits and histories, by the rules at the head of this file.

    Args:
        connection: Comes from :func:`filter_k_core`; gets ``sequences (sequence, user_id, user, split,
            place, timestamp, target, history_length)``, ``popularity (item_id, item,
            interactions)`` with a row per item of the core, ``histories (sequence, position,
            item)``. ``sequence`` counts from 0, by the user's name and then by time.
        min_history: Items before the target, at least; shorter sequences are dropped and counted.
        max_history: Items before the target, at most.
        history: ``recent``: the items just before the target; ``popular``: the most popular of
            all items before it, in order of time, by ``popularity`` (by the whole core, as the
            authors do, where the target is chosen so too).
        target: ``last``: the last item; ``popular`` (the authors'): of the user's max_history + 1
            items that are most popular in the core, the last.
        split: See the head of this file.
        valid_share: Share of sequences for validation; unused by leave_one_out.
        test_share: Share of sequences for testing; unused by leave_one_out.
        seed: Of the shuffle of users.

    Returns:
        How many sequences were dropped, by reason.

    Raises:
        DataError: A split that is asked for has no sequence, or ``time`` meets no timestamps.
    """
    if split == "time":
        refuse_missing_timestamps(
            connection, "split by time", "filter_sequences.split", "use users or leave_one_out"
        )
    found = _choose_targets(connection, target, max_history, 3 if split == "leave_one_out" else 1)
    kept = _drop_short(connection, min_history)
    shares = (valid_share, test_share)
    _split_sequences(connection, split, max_history, seed, _cuts(split, kept, shares))
    _refuse_empty_split(connection, split, shares, min_history)
    _count_popularity(connection, by_time=split == "time")
    if history == "recent":
        _take_recent_histories(connection)
    else:
        _take_popular_histories(connection, "items" if target == "popular" else "popularity")
    return {"sequences_with_short_history": found - kept}


def describe(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Count what was kept.

    Args:
        connection: Comes from :func:`make_sequences`.

    Returns:
        Users, items and interactions of the core, interactions per user (average_length), the
        share of pairs of user and item without an interaction (sparsity), sequences per split, and
        sequences whose target has the very time of another interaction of its user, so that the
        publisher's order decided which of them is the target (targets_tied_in_time).
    """
    users, items, interactions = one_row(
        connection,
        """
        SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM items),
               (SELECT count(*) FROM core_interactions)
        """,
    )
    return {
        "users": users,
        "items": items,
        "interactions": interactions,
        "average_length": round(interactions / users, 4),
        "sparsity": round(1 - interactions / (users * items), 6),
        "sequences": _count_sequences(connection),
        "targets_tied_in_time": _count_ties(connection),
    }


def _count_ties(connection: duckdb.DuckDBPyConnection) -> int:
    """Count the targets at whose time their user has another interaction."""
    (tied,) = one_row(
        connection,
        """
        SELECT count(*) FROM sequences SEMI JOIN core_interactions AS other
        ON other.user_id = sequences.user_id AND other.timestamp = sequences.timestamp
            AND other.place <> sequences.place
        """,
    )
    return int(tied)


def _number_names(connection: duckdb.DuckDBPyConnection) -> None:
    """Replace names by numbers, which are quicker to join, to count and to sort."""
    for name in ("user", "item"):
        connection.execute(
            f"""
            CREATE TABLE {name}s AS
            SELECT CAST(row_number() OVER (ORDER BY {name}) AS INTEGER) AS {name}_id, {name}
            FROM (SELECT DISTINCT {name} FROM interactions)
            """
        )
    connection.execute(
        """
        CREATE TABLE core AS
        SELECT user_id, item_id, timestamp, position
        FROM interactions JOIN users USING (user) JOIN items USING (item)
        """
    )


def _drop_rare(connection: duckdb.DuckDBPyConnection, column: str, minimum: int) -> int:
    """Delete the interactions of users, or with items, that have too few; returns how many."""
    (deleted,) = one_row(
        connection,
        f"""
        DELETE FROM core WHERE {column} IN (
            SELECT {column} FROM core GROUP BY {column} HAVING count(*) < $minimum
        )
        """,
        minimum=minimum,
    )
    return int(deleted)


def _order_interactions(connection: duckdb.DuckDBPyConnection) -> None:
    """Give each interaction its place among its user's, and forget who and what is left out."""
    connection.execute(
        """
        CREATE TABLE core_interactions AS
        SELECT user_id, item_id, timestamp,
               CAST(row_number() OVER (
                   PARTITION BY user_id ORDER BY timestamp NULLS FIRST, position, item_id
               ) AS INTEGER) AS place
        FROM core
        """
    )
    connection.execute(
        "CREATE OR REPLACE TABLE users AS FROM users"
        " SEMI JOIN (SELECT user_id FROM core_interactions WHERE place = 1) USING (user_id)"
    )
    connection.execute(
        """
        CREATE OR REPLACE TABLE items AS
        WITH counts AS (SELECT item_id, count(*) AS interactions FROM core GROUP BY item_id)
        SELECT item_id, item, interactions FROM items JOIN counts USING (item_id)
        """
    )
    connection.execute("DROP TABLE core")


def _choose_targets(
    connection: duckdb.DuckDBPyConnection, target: Target, max_history: int, per_user: int
) -> int:
    """Make ``targets``, of age 1 for a user's latest, up to ``per_user``; returns how many."""
    eligible = "core_interactions"
    if target == "popular":
        eligible = f"""(
            SELECT core_interactions.*
            FROM core_interactions JOIN items USING (item_id)
            QUALIFY row_number() OVER (
                PARTITION BY user_id ORDER BY interactions DESC, item_id
            ) <= {max_history + 1}
        )"""
    (targets,) = one_row(
        connection,
        f"""
        CREATE TABLE targets AS
        SELECT user_id, item_id, timestamp, place,
               row_number() OVER (PARTITION BY user_id ORDER BY place DESC) AS age
        FROM {eligible}
        QUALIFY age <= {per_user}
        """,
    )
    return int(targets)


def _drop_short(connection: duckdb.DuckDBPyConnection, min_history: int) -> int:
    """Delete targets with too few interactions before them; returns how many are left."""
    connection.execute("DELETE FROM targets WHERE place <= $shortest", {"shortest": min_history})
    (kept,) = one_row(connection, "SELECT count(*) FROM targets")
    return int(kept)


def _cuts(split: Split, sequences: int, shares: tuple[float, float]) -> dict[str, int]:
    """Say at which rank, in the order of the split, valid and test begin.

    A share above 0 has one sequence at least, however few there are.
    """
    if split == "leave_one_out":
        return {"valid": -1, "test": 0}  # ranks are -2, -1 and 0, the latest
    valid, test = (max(1, round(share * sequences)) if share else 0 for share in shares)
    return {"valid": sequences - test - valid, "test": sequences - test}


def _split_sequences(
    connection: duckdb.DuckDBPyConnection,
    split: Split,
    max_history: int,
    seed: int,
    cuts: dict[str, int],
) -> None:
    """Make ``sequences``: number the targets and give each its split."""
    shuffled = stable_hash(f"'{seed}:split:' || user")
    rank = {
        "users": f"row_number() OVER (ORDER BY {shuffled}, user) - 1",
        "leave_one_out": "1 - age",
        "time": "count(*) OVER (ORDER BY timestamp) - 1",  # of the last among equal times
    }[split]
    connection.execute(
        f"""
        CREATE TABLE sequences AS
        WITH ranked AS (SELECT *, {rank} AS rank FROM targets JOIN users USING (user_id))
        SELECT row_number() OVER (ORDER BY user_id, place) - 1 AS sequence,
               user_id, user, place, timestamp, item AS target,
               CAST(least(place - 1, {max_history}) AS BIGINT) AS history_length,
               CASE WHEN rank >= {cuts["test"]} THEN 'test'
                    WHEN rank >= {cuts["valid"]} THEN 'valid'
                    ELSE 'train' END AS split
        FROM ranked JOIN items USING (item_id)
        """
    )
    connection.execute("DROP TABLE targets")


def _count_popularity(connection: duckdb.DuckDBPyConnection, *, by_time: bool) -> None:
    """Make ``popularity`` from what is known when the model is trained, and from nothing later."""
    earlier = """
        AND timestamp < coalesce(
            (SELECT min(timestamp) FROM sequences WHERE split <> 'train'), 9223372036854775807
        )"""
    connection.execute(
        f"""
        CREATE TABLE popularity AS
        WITH held_out AS (
            SELECT user_id, min(place) AS first_place
            FROM sequences WHERE split <> 'train' GROUP BY user_id
        ),
        known AS (
            SELECT item_id, count(*) AS interactions
            FROM core_interactions LEFT JOIN held_out USING (user_id)
            WHERE (first_place IS NULL OR place < first_place) {earlier if by_time else ""}
            GROUP BY item_id
        )
        SELECT item_id, item, coalesce(known.interactions, 0) AS interactions
        FROM items LEFT JOIN known USING (item_id)
        """
    )


def _take_recent_histories(connection: duckdb.DuckDBPyConnection) -> None:
    """Make ``histories`` of the interactions just before each target."""
    connection.execute(
        """
        CREATE VIEW histories AS
        SELECT sequence, earlier.place - (sequences.place - history_length) + 1 AS position, item
        FROM sequences
        JOIN core_interactions AS earlier
          ON earlier.user_id = sequences.user_id
         AND earlier.place BETWEEN sequences.place - history_length AND sequences.place - 1
        JOIN items USING (item_id)
        """
    )


def _take_popular_histories(connection: duckdb.DuckDBPyConnection, counts: str) -> None:
    """Make ``histories`` of the most popular interactions before each target.

    Args:
        connection: Has ``sequences``.
        counts: The table whose column ``interactions`` says what is popular.
    """
    connection.execute(
        f"""
        CREATE VIEW histories AS
        WITH chosen AS (
            SELECT sequence, earlier.place, item
            FROM sequences
            JOIN core_interactions AS earlier
              ON earlier.user_id = sequences.user_id AND earlier.place < sequences.place
            JOIN {counts} AS counts ON counts.item_id = earlier.item_id
            QUALIFY row_number() OVER (
                PARTITION BY sequence ORDER BY counts.interactions DESC, earlier.item_id
            ) <= history_length
        )
        SELECT sequence, row_number() OVER (PARTITION BY sequence ORDER BY place) AS position, item
        FROM chosen
        """
    )


def _count_sequences(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    counts = dict(
        connection.execute("SELECT split, count(*) FROM sequences GROUP BY split").fetchall()
    )
    return {split: counts.get(split, 0) for split in SPLITS}


def _refuse_empty_core(
    connection: duckdb.DuckDBPyConnection, min_user_interactions: int, min_item_interactions: int
) -> None:
    """Say which threshold is too high for the data, when nobody passes."""
    if one_row(connection, "SELECT count(*) FROM core") != (0,):
        return
    users, most = _largest(connection, "user")
    items, most_taken = _largest(connection, "item")
    raise DataError(
        expected=f"users with at least {min_user_interactions} interactions with items that have "
        f"at least {min_item_interactions}",
        got=f"nobody: of {users:,} users the most active has {most:,} interactions, "
        f"of {items:,} items the most popular has {most_taken:,}",
        where=_threshold(most < min_user_interactions, most_taken < min_item_interactions),
        fix="lower it or bring more interactions",
    )


def _largest(connection: duckdb.DuckDBPyConnection, name: str) -> tuple[int, int]:
    """Count the users, or items, and the interactions of the largest."""
    number, largest = one_row(
        connection,
        f"""
        WITH counts AS (SELECT {name}, count(*) AS n FROM interactions GROUP BY {name})
        SELECT count(*), coalesce(max(n), 0) FROM counts
        """,
    )
    return int(number), int(largest)


def _threshold(users_too_rare: bool, items_too_rare: bool) -> str:
    """Name the setting that nobody passes; both, when it is their combination."""
    user, item = "min_user_interactions", "min_item_interactions"
    if users_too_rare != items_too_rare:
        return f"filter_sequences.{user if users_too_rare else item}"
    return f"filter_sequences.{user} and {item}"


def _refuse_empty_split(
    connection: duckdb.DuckDBPyConnection,
    split: Split,
    shares: tuple[float, float],
    min_history: int,
) -> None:
    """Stop when a split that is asked for got nothing."""
    counts = _count_sequences(connection)
    asked = {"train": 1.0, "valid": shares[0], "test": shares[1]}
    if all(counts[name] for name in asked if asked[name] or split == "leave_one_out"):
        return
    (longest,) = one_row(connection, "SELECT max(place) - 1 FROM core_interactions")
    raise DataError(
        expected="sequences to train, to validate and to test",
        got=", ".join(f"{count:,} {name}" for name, count in counts.items())
        + f" with at least {min_history} items before the target (the longest has {longest:,})",
        where=f"filter_sequences.min_history and split {split}",
        fix="lower min_history, choose another split or bring more users",
    )


def one_row(connection: duckdb.DuckDBPyConnection, query: str, **values: int) -> tuple[Any, ...]:
    """Give a query's one row."""
    row = connection.execute(query, values or None).fetchone()
    assert row is not None, query
    return row
