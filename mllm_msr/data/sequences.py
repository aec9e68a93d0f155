"""The k-core, and the sequences made from it: a user's history, target and split.

Everything is SQL on tables of one DuckDB connection, so that a hundred million interactions need no
more memory than DuckDB's limit. Each function reads the tables of the one before:

    interactions (view) -> users, items, core_interactions     filter_k_core
                        -> sequences, popularity, histories    make_sequences

Splits:
    * ``users`` (the authors'): one sequence per user; users are shuffled and cut by the shares, the
      last for testing, those before them for validation. With ``fold``, another part of the shuffle
      is tested, so that 1 / test_share folds test each user once.
    * ``leave_one_out``: up to three sequences per user; the last item is the test target, the one
      before the validation target, the one before that the training target.
    * ``time``: one sequence per user, ordered by the target's time; the earliest are for training,
      the latest for testing. Targets with the same time stay in one split: if a cut falls among
      them, all go to the later split. Every training target, and so every training history, is
      therefore strictly earlier than every validation target, and those than every test target.
      The price is that training users are those who stopped early.
    * ``cold_items``: a seeded ``cold_share`` of the k-core's items is withheld from training. One
      sequence per user; the target is the last item, withheld or not. Users whose target is not
      withheld are shuffled and cut by the shares, as by ``users``. Users whose target is withheld
      cannot train: they are shuffled too, and divided between valid and test in proportion to
      ``valid_share`` and ``test_share``, in addition to the former. A withheld item is in no
      history (the history is the items before the target that are not withheld, and these count
      for ``min_history``), in no known interaction, and no negative of a training sequence. Its
      interactions still count as touched, so that it is never a negative of a user who took it,
      and they count for the k-core.

Strata. The ``stratum`` of an item, and of a sequence by its target:
    * ``cold``: withheld, with the split ``cold_items``; no known interaction, with other splits;
    * ``rare``: at most 5 known interactions, and not cold;
    * ``warm``: more.
    Known interactions are those of all users, whatever the budget.

Budget:
    * A budget bounds the number of sequences of a split that are ``used``: only these have a
      history and candidates. Others stay in the table of sequences.
    * The choice is seeded, independent of the split's, and nested: a larger budget contains the
      smaller one.
    * Nothing else depends on it: not the splits, not the candidates of a used sequence, and with
      ``interactions: all`` not what popularity and baselines know. With ``interactions: used``
      these learn only from users with a used training sequence.

Leakage:
    * A history holds only interactions before its target.
    * ``popularity`` counts what is known at training time. For a user with a validation or test
      target, these are the interactions before the first such target; with ``time``, for every
      user, those before the first validation target; with ``cold_items``, none with a withheld
      item.
    * The k-core, the pool of negatives and, with ``target: popular``, the choice of items use all
      interactions, as the authors and the literature do. They decide which sequences and candidates
      exist, not how a candidate is scored.

Interactions are ordered by (timestamp, position, item): ties are broken by the publisher's order,
then by the item's name. Random choices use the MD5 of the seed and the user's name, so that neither
DuckDB's version nor the order of rows nor the number of threads changes a result.
"""

from itertools import cycle
from typing import Any, Literal

import duckdb

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import BudgetParams
from mllm_msr.core.schemas import (
    SPLITS,
    STRATA,
    AnyTable,
    Histories,
    ImageSources,
    Items,
    Popularity,
    Sequences,
)

History = Literal["recent", "popular"]
Target = Literal["last", "popular"]
Split = Literal["users", "leave_one_out", "time", "cold_items"]
RARE = 5  # most known interactions of an item of the stratum rare
NO_BUDGET = BudgetParams(train=None, valid=None, test=None, interactions="all")

# The model and query of each output table; sorted, so that equal inputs give equal bytes.
TABLES: dict[str, tuple[AnyTable, str]] = {
    "sequences": (
        Sequences,
        "SELECT sequence, user, split, target, history_length, used, stratum"
        " FROM sequences ORDER BY sequence",
    ),
    "histories": (
        Histories,
        "SELECT sequence, position, item FROM histories ORDER BY sequence, position",
    ),
    "popularity": (
        Popularity,
        "SELECT item, interactions, withheld FROM popularity ORDER BY item",
    ),
}
# The catalogue of the k-core: later stages describe only items that can be candidates.
CATALOGUE_TABLES: dict[str, tuple[AnyTable, str]] = {
    "items": (Items, "FROM catalogue SEMI JOIN items USING (item) ORDER BY item"),
    "image_sources": (
        ImageSources,
        "FROM image_sources SEMI JOIN items USING (item) ORDER BY item",
    ),
}


def stable_hash(text: str) -> str:
    """Return the SQL for an integer in [0, 2^60): the first 15 hexadecimal digits of a text's MD5.

    Args:
        text: An SQL expression of type VARCHAR.
    """
    return hex_to_integer(f"left(md5({text}), 15)")


def hex_to_integer(digits: str) -> str:
    """Return the SQL for the integer that an SQL expression of hexadecimal digits represents."""
    return f"CAST('0x' || {digits} AS BIGINT)"


def filter_k_core(
    connection: duckdb.DuckDBPyConnection, *, min_user_interactions: int, min_item_interactions: int
) -> dict[str, int]:
    """Filter interactions to the k-core: every user and every item has a minimum of interactions.

    Users and items with too few interactions are removed in turn until nothing changes; the result
    does not depend on the order. Users and items get integer ids in the order of their names.

    Args:
        connection: Has the view ``interactions`` (:class:`mllm_msr.core.schemas.Interactions`);
            gets the tables ``users (user_id, user)``, ``items (item_id, item, interactions)`` and
            ``core_interactions (user_id, item_id, timestamp, ordinal)``, where ordinal counts a
            user's interactions from 1, oldest first.
        min_user_interactions: Minimum interactions of a user.
        min_item_interactions: Minimum interactions of an item.

    Returns:
        Dropped interactions by reason.

    Raises:
        DataError: No interaction is left.
    """
    _assign_ids(connection)
    dropped = {"interactions_of_rare_users": 0, "interactions_of_rare_items": 0}
    rare = cycle((("user", min_user_interactions), ("item", min_item_interactions)))
    for turn, (name, minimum) in enumerate(rare):
        removed = _drop_rare(connection, f"{name}_id", minimum)
        dropped[f"interactions_of_rare_{name}s"] += removed
        if turn and not removed:  # nothing changed since the other side was filtered
            break
    _refuse_empty_core(connection, min_user_interactions, min_item_interactions)
    _create_core_tables(connection)
    return dropped


def refuse_unknown_items(connection: duckdb.DuckDBPyConnection) -> None:
    """Refuse items of the k-core that have no row in the view ``catalogue``.

    Raises:
        DataError: There are such items; names the first and counts them.
    """
    unknown, first = fetch_one(
        connection, "SELECT count(*), min(item) FROM items ANTI JOIN catalogue USING (item)"
    )
    if unknown:
        raise DataError(
            expected="a row in the table of items for every item of the k-core",
            got=f"{unknown:,} items without, first {first!r}",
            where="items and interactions",
            fix="use two tables of the same run of preprocess",
        )


def refuse_missing_timestamps(
    connection: duckdb.DuckDBPyConnection, purpose: str, setting: str, fix: str
) -> None:
    """Refuse a setting that needs timestamps if some interactions have none.

    Args:
        connection: The database after :func:`filter_k_core`.
        purpose: What the timestamps are needed for.
        setting: The setting to name.
        fix: What to do about it.

    Raises:
        DataError: An interaction of the k-core has no timestamp.
    """
    missing, total = fetch_one(
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
    cold_share: float,
    valid_share: float,
    test_share: float,
    seed: int,
    fold: int | None = None,
    budget: BudgetParams = NO_BUDGET,
) -> dict[str, int]:
    """Choose targets, splits and histories by the rules in the module's docstring.

    Args:
        connection: The database after :func:`filter_k_core`; gets ``sequences (sequence, user_id,
            user, split, ordinal, timestamp, target, earlier, history_length, used, withheld,
            stratum)``, ``popularity (item_id, item, interactions, before_budget, withheld,
            stratum)`` with a row per item of the k-core, and ``histories (sequence, position,
            item)``. ``sequence`` counts from 0, by the user's name and then by time; ``earlier`` is
            the number of items that its history can be taken from. ``before_budget`` counts known
            interactions of all users, ``interactions`` those that may be learned from.
        min_history: Minimum items before the target; shorter sequences are dropped and counted.
        max_history: Maximum items before the target.
        history: ``recent``: the items just before the target; ``popular``: the most popular items
            before it, in order of time. Popularity is that of ``popularity`` or, with
            ``target: popular``, of the whole k-core, as the authors do.
        target: ``last``: the user's last item; ``popular`` (the authors'): the last of the user's
            max_history + 1 items that are most popular in the k-core.
        split: See the module's docstring.
        cold_share: Share of the items that ``cold_items`` withholds; unused by other splits.
        valid_share: Share of sequences for validation; unused by leave_one_out.
        test_share: Share of sequences for testing; unused by leave_one_out.
        seed: Seed of the shuffle of users and of the choice of used sequences.
        fold: Which share of the shuffled users is tested, from 0; None: the last. Only for users.
        budget: How many sequences are used.

    Returns:
        Dropped sequences by reason.

    Raises:
        DataError: A requested split has no sequence, or ``time`` meets missing timestamps.
    """
    if split == "time":
        refuse_missing_timestamps(
            connection, "split by time", "filter_sequences.split", "use users or leave_one_out"
        )
    _withhold_items(connection, cold_share if split == "cold_items" else 0.0, seed)
    found = _choose_targets(connection, target, max_history, 3 if split == "leave_one_out" else 1)
    remaining = _drop_short(connection, min_history)
    shares = (valid_share, test_share)
    _split_sequences(connection, split, max_history, seed, shares, fold)
    _refuse_empty_split(connection, split, shares, min_history)
    _mark_used(connection, budget, seed)
    _count_popularity(connection, split, of_used=budget.interactions == "used")
    _add_strata(connection)
    if history == "recent":
        _create_recent_histories(connection)
    else:
        _create_popular_histories(
            connection,
            "SELECT item_id, item, interactions FROM items"
            if target == "popular"
            else "SELECT item_id, item, before_budget AS interactions FROM popularity",
        )
    return {"sequences_with_short_history": found - remaining}


def compute_statistics(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Return the statistics of the dataset.

    Args:
        connection: The database after :func:`make_sequences`.

    Returns:
        Users, items and interactions of the k-core; interactions per user (average_length); the
        share of (user, item) pairs without an interaction (sparsity); sequences per split, all and
        used; test sequences by the stratum of their target; withheld items; and the targets with
        the same time as another interaction of their user, so that the publisher's order
        decided which one is the target (targets_tied_in_time).
    """
    users, items, interactions = fetch_one(
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
        "used_sequences": _count_sequences(connection, "used"),
        "test_strata": _count_test_strata(connection),
        "withheld_items": fetch_one(connection, "SELECT count(*) FROM items WHERE withheld")[0],
        "targets_tied_in_time": _count_ties(connection),
    }


def _count_ties(connection: duckdb.DuckDBPyConnection) -> int:
    """Return the number of targets whose user has another interaction at the same time."""
    (tied,) = fetch_one(
        connection,
        """
        SELECT count(*) FROM sequences SEMI JOIN core_interactions AS other
        ON other.user_id = sequences.user_id AND other.timestamp = sequences.timestamp
            AND other.ordinal <> sequences.ordinal
        """,
    )
    return int(tied)


def _count_test_strata(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Return the number of test sequences by the stratum of their target."""
    query = "SELECT stratum, count(*) FROM sequences WHERE split = 'test' GROUP BY stratum"
    counts = dict(connection.execute(query).fetchall())
    return {stratum: counts.get(stratum, 0) for stratum in STRATA}


def _assign_ids(connection: duckdb.DuckDBPyConnection) -> None:
    """Replace names by integer ids, which are faster to join, count and sort."""
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
    """Delete the interactions of users or items that have too few; return how many."""
    (deleted,) = fetch_one(
        connection,
        f"""
        DELETE FROM core WHERE {column} IN (
            SELECT {column} FROM core GROUP BY {column} HAVING count(*) < $minimum
        )
        """,
        minimum=minimum,
    )
    return int(deleted)


def _create_core_tables(connection: duckdb.DuckDBPyConnection) -> None:
    """Create ``core_interactions``, and restrict ``users`` and ``items`` to the k-core."""
    connection.execute(
        """
        CREATE TABLE core_interactions AS
        SELECT user_id, item_id, timestamp,
               CAST(row_number() OVER (
                   PARTITION BY user_id ORDER BY timestamp NULLS FIRST, position, item_id
               ) AS INTEGER) AS ordinal
        FROM core
        """
    )
    connection.execute(
        "CREATE OR REPLACE TABLE users AS FROM users"
        " SEMI JOIN (SELECT user_id FROM core_interactions WHERE ordinal = 1) USING (user_id)"
    )
    connection.execute(
        """
        CREATE OR REPLACE TABLE items AS
        WITH counts AS (SELECT item_id, count(*) AS interactions FROM core GROUP BY item_id)
        SELECT item_id, item, interactions FROM items JOIN counts USING (item_id)
        """
    )
    connection.execute("DROP TABLE core")


def _withhold_items(connection: duckdb.DuckDBPyConnection, share: float, seed: int) -> None:
    """Add the column ``withheld`` to ``items``, and create ``readable`` without such items.

    ``readable`` has the interactions that a history can be taken from, numbered by ``place`` from 1
    for each user. With a share above 0 at least one item is withheld.
    """
    (items,) = fetch_one(connection, "SELECT count(*) FROM items")
    number = max(1, round(share * items)) if share else 0
    shuffled = stable_hash(f"'{seed}:cold:' || item")
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE items AS
        SELECT *, row_number() OVER (ORDER BY {shuffled}, item) <= {number} AS withheld FROM items
        """
    )
    if not number:
        connection.execute(
            "CREATE VIEW readable AS SELECT *, ordinal AS place FROM core_interactions"
        )
        return
    connection.execute(
        """
        CREATE TABLE readable AS
        SELECT core_interactions.*,
               row_number() OVER (PARTITION BY user_id ORDER BY ordinal) AS place
        FROM core_interactions ANTI JOIN (FROM items WHERE withheld) USING (item_id)
        """
    )


def _choose_targets(
    connection: duckdb.DuckDBPyConnection, target: Target, max_history: int, per_user: int
) -> int:
    """Create ``targets``, a user's latest ``per_user``, the last with age 1; return how many.

    ``earlier`` counts the interactions before a target that a history can be taken from.
    """
    eligible = "core_interactions"
    if target == "popular":
        eligible = f"""(
            SELECT core_interactions.*
            FROM core_interactions JOIN items USING (item_id)
            QUALIFY row_number() OVER (
                PARTITION BY user_id ORDER BY interactions DESC, item_id
            ) <= {max_history + 1}
        )"""
    (targets,) = fetch_one(
        connection,
        f"""
        CREATE TABLE targets AS
        SELECT user_id, item_id, timestamp, ordinal, ordinal - 1 AS earlier,
               row_number() OVER (PARTITION BY user_id ORDER BY ordinal DESC) AS age
        FROM {eligible}
        QUALIFY age <= {per_user}
        """,
    )
    if fetch_one(connection, "SELECT bool_or(withheld) FROM items")[0]:
        connection.execute(
            """
            UPDATE targets SET earlier = (
                SELECT count(*) FROM readable
                WHERE readable.user_id = targets.user_id AND readable.ordinal < targets.ordinal
            )
            """
        )
    return int(targets)


def _drop_short(connection: duckdb.DuckDBPyConnection, min_history: int) -> int:
    """Delete targets with too few interactions before them; return how many are left."""
    connection.execute("DELETE FROM targets WHERE earlier < $shortest", {"shortest": min_history})
    (remaining,) = fetch_one(connection, "SELECT count(*) FROM targets")
    return int(remaining)


def _find_cuts(
    connection: duckdb.DuckDBPyConnection, split: Split, shares: tuple[float, float]
) -> dict[str, str]:
    """Return the rank, in the order of the split, at which valid and test start, as SQL.

    A share above 0 gets at least one sequence, however few there are.
    """
    if split == "leave_one_out":
        return {"valid": "-1", "test": "0"}  # ranks are -2, -1 and 0, the latest
    withheld, others = fetch_one(
        connection,
        "SELECT count(*) FILTER (withheld), count(*) FILTER (NOT withheld)"
        " FROM targets JOIN items USING (item_id)",
    )
    valid, test = (max(1, round(share * others)) if share else 0 for share in shares)
    cuts = {"valid": others - test - valid, "test": others - test}
    if split != "cold_items":
        return {name: str(rank) for name, rank in cuts.items()}
    cold_cuts = {"valid": 0, "test": round(withheld * shares[0] / sum(shares))}
    return {name: f"if(withheld, {cold_cuts[name]}, {cuts[name]})" for name in cuts}


def _cut_fold(
    connection: duckdb.DuckDBPyConnection, rank: str, shares: tuple[float, float], fold: int
) -> tuple[str, dict[str, str]]:
    """Return the rank as SQL, rotated so that a fold comes last, and the cuts for it.

    Folds divide the order evenly: with a test share of 1 / k, each target is in one of k folds. The
    validation targets are those before the fold; before the first fold they are the last ones.
    """
    valid, test = shares
    (targets,) = fetch_one(connection, "SELECT count(*) FROM targets")
    start, end = (round(number * test * targets) for number in (fold, fold + 1))
    first_test = targets - (end - start)
    cuts = {"valid": first_test - round(valid * targets), "test": first_test}
    rotated = f"({rank} + {targets - end}) % {targets}"
    return rotated, {name: str(cut) for name, cut in cuts.items()}


def _split_sequences(
    connection: duckdb.DuckDBPyConnection,
    split: Split,
    max_history: int,
    seed: int,
    shares: tuple[float, float],
    fold: int | None,
) -> None:
    """Create ``sequences``: number the targets and assign their splits."""
    cuts = _find_cuts(connection, split, shares)
    shuffled = stable_hash(f"'{seed}:split:' || user")
    rank = {
        "users": f"row_number() OVER (ORDER BY {shuffled}, user) - 1",
        "leave_one_out": "1 - age",
        "cold_items": f"row_number() OVER (PARTITION BY withheld ORDER BY {shuffled}, user) - 1",
        "time": "count(*) OVER (ORDER BY timestamp) - 1",  # equal times share the last one's rank
    }[split]
    if fold is not None:
        rank, cuts = _cut_fold(connection, rank, shares, fold)
    connection.execute(
        f"""
        CREATE TABLE sequences AS
        WITH ranked AS (
            SELECT *, {rank} AS rank
            FROM targets JOIN users USING (user_id) JOIN items USING (item_id)
        )
        SELECT row_number() OVER (ORDER BY user_id, ordinal) - 1 AS sequence,
               user_id, user, ordinal, timestamp, item AS target, earlier, withheld,
               CAST(least(earlier, {max_history}) AS BIGINT) AS history_length,
               CASE WHEN rank >= {cuts["test"]} THEN 'test'
                    WHEN rank >= {cuts["valid"]} THEN 'valid'
                    ELSE 'train' END AS split
        FROM ranked
        """
    )
    connection.execute("DROP TABLE targets")


def _mark_used(connection: duckdb.DuckDBPyConnection, budget: BudgetParams, seed: int) -> None:
    """Add the column ``used`` to ``sequences``."""
    limits = " ".join(
        f"WHEN '{split}' THEN rank <= {limit}"
        for split in SPLITS
        if (limit := getattr(budget, split)) is not None
    )
    used = f"CASE split {limits} ELSE true END" if limits else "true"
    shuffled = stable_hash(f"'{seed}:budget:' || user")
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE sequences AS
        WITH ranked AS (
            SELECT *, row_number() OVER (PARTITION BY split ORDER BY {shuffled}, user) AS rank
            FROM sequences
        )
        SELECT * EXCLUDE (rank), {used} AS used
        FROM ranked
        """
    )


def _count_popularity(
    connection: duckdb.DuckDBPyConnection, split: Split, *, of_used: bool
) -> None:
    """Create ``popularity`` from the interactions that are known at training time.

    Args:
        connection: Has ``sequences``.
        split: See the module's docstring.
        of_used: Whether only users with a used training sequence count.
    """
    learned = "FILTER (user_id IN (SELECT user_id FROM sequences WHERE split = 'train' AND used))"
    cold = "withheld" if split == "cold_items" else "known.before_budget IS NULL"
    earlier = """
        AND timestamp < coalesce(
            (SELECT min(timestamp) FROM sequences WHERE split <> 'train'), 9223372036854775807
        )"""
    connection.execute(
        f"""
        CREATE TABLE popularity AS
        WITH held_out AS (
            SELECT user_id, min(ordinal) AS first_ordinal
            FROM sequences WHERE split <> 'train' GROUP BY user_id
        ),
        known AS (
            SELECT item_id, count(*) AS before_budget,
                   count(*) {learned if of_used else ""} AS interactions
            FROM readable LEFT JOIN held_out USING (user_id)
            WHERE (first_ordinal IS NULL OR ordinal < first_ordinal)
                {earlier if split == "time" else ""}
            GROUP BY item_id
        )
        SELECT item_id, item, coalesce(known.interactions, 0) AS interactions,
               coalesce(known.before_budget, 0) AS before_budget, withheld,
               CASE WHEN {cold} THEN 'cold' WHEN known.before_budget > {RARE} THEN 'warm'
                    ELSE 'rare' END AS stratum
        FROM items LEFT JOIN known USING (item_id)
        """
    )


def _add_strata(connection: duckdb.DuckDBPyConnection) -> None:
    """Add the stratum of the target to ``sequences``."""
    connection.execute(
        """
        CREATE OR REPLACE TABLE sequences AS
        SELECT sequences.*, stratum FROM sequences JOIN popularity ON item = target
        """
    )


def _create_recent_histories(connection: duckdb.DuckDBPyConnection) -> None:
    """Create ``histories`` from the interactions just before each target."""
    connection.execute(
        """
        CREATE VIEW histories AS
        SELECT sequence, item,
               CAST(place - (earlier - history_length) AS BIGINT) AS position
        FROM sequences
        JOIN readable
          ON readable.user_id = sequences.user_id
         AND place BETWEEN earlier - history_length + 1 AND earlier
        JOIN items USING (item_id)
        WHERE used
        """
    )


def _create_popular_histories(connection: duckdb.DuckDBPyConnection, counts: str) -> None:
    """Create ``histories`` from the most popular items before each target.

    Args:
        connection: Has ``sequences``.
        counts: A query of ``item_id, item, interactions``, the popularity.
    """
    connection.execute(
        f"""
        CREATE VIEW histories AS
        WITH chosen AS (
            SELECT sequence, readable.ordinal, item
            FROM sequences
            JOIN readable
              ON readable.user_id = sequences.user_id AND readable.ordinal < sequences.ordinal
            JOIN ({counts}) AS counts ON counts.item_id = readable.item_id
            WHERE used
            QUALIFY row_number() OVER (
                PARTITION BY sequence ORDER BY counts.interactions DESC, readable.item_id
            ) <= history_length
        )
        SELECT sequence, item,
               row_number() OVER (PARTITION BY sequence ORDER BY ordinal) AS position
        FROM chosen
        """
    )


def _count_sequences(
    connection: duckdb.DuckDBPyConnection, condition: str = "true"
) -> dict[str, int]:
    """Return the number of sequences per split for which an SQL condition holds."""
    query = f"SELECT split, count(*) FROM sequences WHERE {condition} GROUP BY split"
    counts = dict(connection.execute(query).fetchall())
    return {split: counts.get(split, 0) for split in SPLITS}


def _refuse_empty_core(
    connection: duckdb.DuckDBPyConnection, min_user_interactions: int, min_item_interactions: int
) -> None:
    """Refuse an empty k-core; name the threshold that is too high for the data."""
    if fetch_one(connection, "SELECT count(*) FROM core") != (0,):
        return
    users, most_active = _count_largest(connection, "user")
    items, most_popular = _count_largest(connection, "item")
    raise DataError(
        expected=f"users with at least {min_user_interactions} interactions with items that have "
        f"at least {min_item_interactions}",
        got=f"none: of {users:,} users the most active has {most_active:,} interactions, "
        f"of {items:,} items the most popular has {most_popular:,}",
        where=_name_failed_threshold(
            most_active < min_user_interactions, most_popular < min_item_interactions
        ),
        fix="lower it or add interactions",
    )


def _count_largest(connection: duckdb.DuckDBPyConnection, name: str) -> tuple[int, int]:
    """Return the number of users, or items, and the most interactions that one of them has."""
    number, largest = fetch_one(
        connection,
        f"""
        WITH counts AS (SELECT {name}, count(*) AS n FROM interactions GROUP BY {name})
        SELECT count(*), coalesce(max(n), 0) FROM counts
        """,
    )
    return int(number), int(largest)


def _name_failed_threshold(user_fails: bool, item_fails: bool) -> str:
    """Return the setting that nobody reaches, or both if only their combination is too high."""
    user, item = "min_user_interactions", "min_item_interactions"
    if user_fails != item_fails:
        return f"filter_sequences.{user if user_fails else item}"
    return f"filter_sequences.{user} and {item}"


def _refuse_empty_split(
    connection: duckdb.DuckDBPyConnection,
    split: Split,
    shares: tuple[float, float],
    min_history: int,
) -> None:
    """Refuse a split without sequences, unless its share is 0."""
    counts = _count_sequences(connection)
    requested = {"train": 1.0, "valid": shares[0], "test": shares[1]}
    if all(counts[name] for name in requested if requested[name] or split == "leave_one_out"):
        return
    if split == "time":
        _refuse_shared_time(connection, counts)
    (longest,) = fetch_one(connection, "SELECT max(ordinal) - 1 FROM core_interactions")
    raise DataError(
        expected="sequences to train, to validate and to test",
        got=", ".join(f"{count:,} {name}" for name, count in counts.items())
        + f" with at least {min_history} items before the target (the longest has {longest:,})",
        where=f"filter_sequences.min_history and split {split}",
        fix="lower min_history, choose another split or add users",
    )


def _refuse_shared_time(connection: duckdb.DuckDBPyConnection, counts: dict[str, int]) -> None:
    """Refuse an empty split where several targets share the last time, and so stay together."""
    shared, targets = fetch_one(
        connection,
        "SELECT count(*) FILTER (timestamp = (SELECT max(timestamp) FROM sequences)), count(*)"
        " FROM sequences",
    )
    if shared > 1:
        raise DataError(
            expected="sequences to train, to validate and to test",
            got=", ".join(f"{count:,} {name}" for name, count in counts.items())
            + f": {shared:,} of {targets:,} targets share the last time, and equal times stay"
            " together",
            where="filter_sequences.split time",
            fix="raise test_share and valid_share, or choose another split",
        )


def fetch_one(connection: duckdb.DuckDBPyConnection, query: str, **values: int) -> tuple[Any, ...]:
    """Return the only row of a query."""
    row = connection.execute(query, values or None).fetchone()
    assert row is not None, query
    return row
