"""What each sequence is asked about: its target among items that its user never touched.

Four ways of drawing negatives, each a ``sampling`` of the table Candidates:

    * ``uniform``: every item of the core alike (the paper's);
    * ``popularity``: in proportion to ``popularity`` + 1;
    * ``targets``: in proportion to how often an item is the target of another sequence of the same
      split. A target is an item that is taken late, when the catalogue is as it is now, and a
      uniform negative is mostly an old one, so that counting training targets tells them apart
      without knowing the user; among other users' targets it does not;
    * ``contemporary``: every item alike whose first interaction is at or before the target's time.

Training and evaluation choose apart. ``train_candidates`` is what the recommender learns from, and
``selection_candidates`` asks the sequences of valid by the same sampling, to choose an epoch by.
``valid_candidates`` and ``test_candidates`` hold every sampling that evaluation asks for: one more
of them means more scores and no other training. Where the last two samplings find too few items
for a sequence, it is left out of that sampling and counted; the first two stop with an error.

Negatives are drawn in SQL, without a table of users x items and without a loop over users. Each
sequence has an endless list of draws, two from each MD5 of seed, split, number and user; the first
n different items of that list that the user did not touch are its negatives. So:

    * more negatives are the fewer and then some: nothing that was drawn changes;
    * the splits know nothing of each other: more test negatives leave the training file alone;
    * neither DuckDB's version nor the order of rows nor the number of threads matters;
    * a catalogue that grows by a hundredth changes about as many of the draws, and no more: what
      a model said of the others is in the response store.

The last needs a place for each item that does not depend on how many there are. A draw is a point
on a line that is longer than the items need, and each item has a stretch of it, as long as its
weight, at or after a point that its name's MD5 gives; stretches that would overlap give way to the
right (linear probing, with stretches for slots). A draw between stretches is none. Every item is
thus drawn exactly in proportion to its weight, and a new one moves but the few next to it. Only
where the items outgrow the line, and it doubles, is everything drawn anew.

Drawing goes on in rounds, for the few that still lack some. Where even many draws per item of the
core were not enough (a user who touched nearly everything, or one item that takes nearly all the
draws), the rest of the untouched items of just those users is written out and ordered by chance;
that order is the one that more draws would have given, in distribution.
"""

import math
from collections.abc import Mapping, Sequence

import duckdb

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import Sampling
from mllm_msr.core.tables import PARTIAL_SAMPLINGS, AnyTable, Candidates
from mllm_msr.data.sequences import number_of, one_row, refuse_missing_timestamps, stable_hash

WEIGHTS = {  # of an item in the draws; items of weight 0 are not in the pool
    "uniform": "1",
    # The one is added because an item that is never a negative gives itself away as a target.
    "popularity": "interactions + 1",
    "targets": "coalesce(targets, 0)",
    "contemporary": "1",
}
# What to write once the tables are made; sorted, so that equal inputs give equal bytes.
TABLES: dict[str, tuple[AnyTable, str]] = {
    f"{name}_candidates": (
        Candidates,
        f"FROM {name}_candidates ORDER BY sampling, sequence, position",
    )
    for name in ("train", "selection", "valid", "test")
}
DRAWS_PER_ITEM = 4  # after so many that hit one, writing out what is left is cheaper
ROOM = 2  # the line's length over that of all stretches, at least; the next power of two has it


def make_candidates(
    connection: duckdb.DuckDBPyConnection,
    *,
    train_sampling: Sampling,
    evaluation_sampling: Sequence[Sampling],
    negatives: Mapping[str, int],
    seed: int,
) -> dict[str, int]:
    """Make the tables of :data:`TABLES`.

    Args:
        connection: Comes from :func:`mllm_msr.data.sequences.make_sequences`.
        train_sampling: Of ``train_candidates`` and ``selection_candidates``.
        evaluation_sampling: Those of ``valid_candidates`` and ``test_candidates``.
        negatives: Items per sequence of each split besides the target.
        seed: Of the draws and of the targets' positions.

    Returns:
        How many sequences a sampling left out, for want of items, by table and sampling; only
        those that did.

    Raises:
        DataError: A user has too few untouched items, or a sampling too few for any sequence.
    """
    wanted = [("train", "train", train_sampling), ("selection", "valid", train_sampling)]
    wanted += [(split, split, each) for split in ("valid", "test") for each in evaluation_sampling]
    for name in TABLES:
        connection.execute(
            f"CREATE TABLE {name}"
            " (sampling VARCHAR, sequence BIGINT, position BIGINT, item VARCHAR, label BOOLEAN)"
        )
    left_out = {
        f"{name}_sequences_without_enough_{sampling}_negatives": sample_candidates(
            connection,
            f"{name}_candidates",
            split=split,
            negatives=negatives[split],
            sampling=sampling,
            seed=seed,
        )
        for name, split, sampling in wanted
    }
    return {reason: count for reason, count in left_out.items() if count}


def sample_candidates(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    *,
    split: str,
    negatives: int,
    sampling: Sampling,
    seed: int,
) -> int:
    """Ask each sequence of a split about its target and ``negatives`` items, in random order.

    An item of the core is untouched when the user has no interaction with it before the core was
    filtered either: both are in the core, so that no interaction of theirs was filtered out.

    Args:
        connection: Comes from :func:`mllm_msr.data.sequences.make_sequences`.
        table: Gets the rows ``(sampling, sequence, position, item, label)``.
        split: ``train``, ``valid`` or ``test``.
        negatives: Items per sequence besides the target.
        sampling: How they are drawn, see the head of this file.
        seed: Of the draws and of the target's position.

    Returns:
        How many sequences are left out because ``targets`` or ``contemporary`` found too few items.

    Raises:
        DataError: A user has too few untouched items, and the sampling is ``uniform`` or
            ``popularity``; or every sequence is left out, of any table but ``valid_candidates``;
            or ``contemporary`` meets an interaction
            without a timestamp.
    """
    if sampling == "contemporary":
        refuse_missing_timestamps(
            connection,
            "tell which items a target's time is late enough for",
            "filter_sequences, sampling contemporary",
            "choose another sampling",
        )
    items, total, line = _make_pool(connection, split, sampling, seed)
    if sampling not in PARTIAL_SAMPLINGS:
        _refuse_too_few(connection, split, negatives, items)
    _start_drawing(connection, split)
    draws_per_hit = line / max(total, 1)  # on average
    limit = _even(DRAWS_PER_ITEM * items * draws_per_hit)
    start, stop = 0, _even((negatives + negatives // 4 + 1) * draws_per_hit)
    while _lacking(connection, negatives) and start < limit:
        _draw(connection, f"{seed}:{split}", sampling, line, range(start, min(stop, limit)))
        start, stop = stop, 2 * stop
    _write_out_untouched(connection, f"{seed}:{split}", sampling, limit)
    left_out = _lacking(connection, negatives)
    if table != "valid_candidates":  # figures of valid are only for information
        _refuse_all_left_out(connection, split, sampling, negatives, left_out)
    _place_targets(connection, table, split, sampling, negatives, seed)
    return left_out


def _refuse_too_few(
    connection: duckdb.DuckDBPyConnection, split: str, negatives: int, items: int
) -> None:
    """Find the user with the fewest untouched items, and stop if they are too few."""
    row = connection.execute(
        """
        SELECT user, max(core_interactions.place) AS touched
        FROM core_interactions JOIN sequences USING (user_id)
        WHERE core_interactions.place > $most AND split = $split
        GROUP BY user ORDER BY touched DESC, user LIMIT 1
        """,
        {"split": split, "most": items - negatives},
    ).fetchone()
    if row:
        user, touched = row
        raise DataError(
            expected=f"{negatives:,} items that each user of {split} never touched",
            got=f"{items - touched:,} for user {user!r}, who touched {touched:,} of {items:,}",
            where=f"filter_sequences.{split}_negatives",
            fix="lower it or bring more items",
        )


def _refuse_all_left_out(
    connection: duckdb.DuckDBPyConnection,
    split: str,
    sampling: Sampling,
    negatives: int,
    left_out: int,
) -> None:
    """Stop where a sampling finds too few items for every sequence of a split."""
    (asked,) = one_row(connection, f"SELECT count(*) FROM sequences WHERE split = '{split}'")
    if left_out and left_out == asked:
        (items,) = one_row(connection, "SELECT count(*) FROM pool")
        raise DataError(
            expected=f"{negatives:,} items for some sequence of {split} by the sampling {sampling}",
            got=f"too few for all {asked:,}: it chooses among {items:,} items",
            where=f"filter_sequences.{split}_negatives",
            fix=f"lower it, bring more users, or take {sampling} out of train_sampling and"
            " evaluation_sampling",
        )


def _make_pool(
    connection: duckdb.DuckDBPyConnection, split: str, sampling: Sampling, seed: int
) -> tuple[int, int, int]:
    """Give each item its stretch of the line, ``weight`` long, from ``first`` on.

    Returns:
        How many items there are, the length of their stretches together, and that of the line.
    """
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE weights AS
        WITH asked AS (
            SELECT target AS item, count(*) AS targets
            FROM sequences WHERE split = '{split}' GROUP BY target
        )
        SELECT item_id, item, {WEIGHTS[sampling]} AS weight
        FROM popularity LEFT JOIN asked USING (item) WHERE weight > 0
        """
    )
    items, total = one_row(
        connection, "SELECT count(*), coalesce(sum(weight), 0)::BIGINT FROM weights"
    )
    length = 2 ** math.ceil(math.log2(ROOM * max(total, 1)))
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE pool AS
        WITH homes AS (
            SELECT item_id, item, weight,
                   {stable_hash(f"'{seed}:pool:' || item")} % {length} AS home
            FROM weights
        ),
        -- Where a stretch would begin if all before it stood without a gap from 0 on.
        stretches AS (
            SELECT *, CAST(sum(weight) OVER (ORDER BY home, item) - weight AS BIGINT) AS dense
            FROM homes
        )
        SELECT item_id, item, weight,
               dense + max(home - dense) OVER (ORDER BY home, item) AS first
        FROM stretches
        """
    )
    if sampling == "contemporary":
        _add_first_times(connection)
    # Stretches that gave way at the line's end stand beyond it. An eighth more room for them is
    # more than they ever take, but for a handful of items: so its length is a constant too.
    (end,) = one_row(connection, "SELECT coalesce(max(first + weight), 0) FROM pool")
    return items, total, max(length + length // 8, end)


def _add_first_times(connection: duckdb.DuckDBPyConnection) -> None:
    """Give each item of the pool the time of its first interaction, in the core or not."""
    connection.execute(
        """
        CREATE OR REPLACE TABLE pool AS
        SELECT pool.*, first_time
        FROM pool JOIN (
            SELECT item, min(timestamp) AS first_time FROM interactions GROUP BY item
        ) USING (item)
        """
    )


def _start_drawing(connection: duckdb.DuckDBPyConnection, split: str) -> None:
    """Make ``lacking``, the sequences that need draws, and ``drawn``, what they have."""
    connection.execute(
        "CREATE OR REPLACE TABLE lacking AS SELECT sequence, user_id, user, timestamp"
        " FROM sequences WHERE split = $split",
        {"split": split},
    )
    connection.execute(
        "CREATE OR REPLACE TABLE drawn (sequence BIGINT, item_id INTEGER, draw BIGINT)"
    )


def _lacking(connection: duckdb.DuckDBPyConnection, negatives: int) -> int:
    """Keep in ``lacking`` the sequences with too few negatives; returns how many."""
    connection.execute(
        """
        DELETE FROM lacking WHERE sequence IN (
            SELECT sequence FROM drawn GROUP BY sequence HAVING count(*) >= $negatives
        )
        """,
        {"negatives": negatives},
    )
    return int(one_row(connection, "SELECT count(*) FROM lacking")[0])


def _draw(
    connection: duckdb.DuckDBPyConnection, key: str, sampling: Sampling, line: int, numbers: range
) -> None:
    """Draw for the lacking, and keep what is untouched and new."""
    hit = "ASOF JOIN pool ON point >= first WHERE point < first + weight"
    if WEIGHTS[sampling] == "1":  # every stretch is one point long, and no sorting is needed
        hit = f"JOIN pool ON point = first WHERE {_allowed(sampling)}"
    connection.execute(
        f"""
        INSERT INTO drawn
        WITH numbers AS (
            SELECT sequence, user_id, user, timestamp,
                   unnest(range({numbers.start // 2}, {numbers.stop // 2})) AS number
            FROM lacking
        ),
        digests AS (
            SELECT sequence, user_id, timestamp, number,
                   md5(concat_ws(':', '{key}', number, user)) AS digest
            FROM numbers
        ),
        points AS (
            SELECT sequence, user_id, timestamp, 2 * number + half AS draw,
                   {number_of("digest[16 * half + 1 : 16 * half + 15]")} % {line} AS point
            FROM digests CROSS JOIN (VALUES (0), (1)) AS halves (half)
        ),
        found AS (
            SELECT sequence, user_id, item_id, draw FROM points {hit}
        )
        SELECT sequence, item_id, min(draw)
        FROM found
        ANTI JOIN core_interactions USING (user_id, item_id)
        ANTI JOIN drawn USING (sequence, item_id)
        GROUP BY sequence, item_id
        """
    )


def _allowed(sampling: Sampling) -> str:
    """Write the SQL condition under which a sequence may be asked about an item of the pool."""
    return "pool.first_time <= timestamp" if sampling == "contemporary" else "true"


def _write_out_untouched(
    connection: duckdb.DuckDBPyConnection, key: str, sampling: Sampling, limit: int
) -> None:
    """Append what is left to those still lacking, by chance, as draws from ``limit`` on.

    Ordering by exponential keys, -ln(uniform) / weight, is drawing by weight without replacement
    (Efraimidis and Spirakis, 2006).
    """
    chance = stable_hash(f"concat_ws(':', '{key}:rest', item, user)")
    connection.execute(
        f"""
        INSERT INTO drawn
        WITH untouched AS (
            SELECT sequence, item_id, -ln(({chance} + 1) / power(2, 60)) / weight AS key
            FROM lacking CROSS JOIN pool
            ANTI JOIN core_interactions USING (user_id, item_id)
            ANTI JOIN drawn USING (sequence, item_id)
            WHERE {_allowed(sampling)}
        )
        SELECT sequence, item_id,
               {limit} + row_number() OVER (PARTITION BY sequence ORDER BY key, item_id)
        FROM untouched
        """
    )


def _place_targets(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    split: str,
    sampling: Sampling,
    negatives: int,
    seed: int,
) -> None:
    """Put each target at a random position among its negatives, which keep their order.

    Sequences that are still lacking are left out.
    """
    place = stable_hash(f"concat_ws(':', '{seed}:{split}:target', user)")
    connection.execute(
        f"""
        INSERT INTO {table} BY NAME
        WITH targets AS (
            SELECT sequence, target AS item, {place} % {negatives + 1} AS position
            FROM sequences ANTI JOIN lacking USING (sequence) WHERE split = '{split}'
        ),
        chosen AS (
            SELECT sequence, item_id,
                   row_number() OVER (PARTITION BY sequence ORDER BY draw) - 1 AS rank
            FROM drawn
            QUALIFY rank < {negatives}
        )
        SELECT '{sampling}' AS sampling, sequence, position, item, true AS label FROM targets
        UNION ALL BY NAME
        SELECT '{sampling}' AS sampling, sequence,
               rank + CAST(rank >= position AS BIGINT) AS position, pool.item, false AS label
        FROM chosen JOIN targets USING (sequence) JOIN pool USING (item_id)
        """
    )


def _even(number: float) -> int:
    """Round up to pairs, as an MD5 gives two draws."""
    return 2 * math.ceil(number / 2)
