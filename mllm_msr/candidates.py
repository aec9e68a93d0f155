"""What each sequence is asked about: its target among items that its user never touched.

Negatives are drawn in SQL, without a table of users x items and without a loop over users. Each
sequence has an endless list of draws, two from each MD5 of seed, split, number and user; the first
n different items of that list that the user did not touch are its negatives. So:

    * more negatives are the fewer and then some: nothing that was drawn changes;
    * the splits know nothing of each other: more test negatives leave the training file alone;
    * neither DuckDB's version nor the order of rows nor the number of threads matters;
    * a catalogue that grows by a hundredth changes about as many of the draws, and no more: what
      a model said of the others is in the answer store.

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
from typing import Literal

import duckdb

from mllm_msr.errors import DataError
from mllm_msr.sequences import number_of, one_row, stable_hash
from mllm_msr.tables import SPLITS, AnyTable, Candidates

Sampling = Literal["uniform", "popularity"]

# What to write once the tables are made; sorted, so that equal inputs give equal bytes.
TABLES: dict[str, tuple[AnyTable, str]] = {
    f"{split}_candidates": (Candidates, f"FROM {split}_candidates ORDER BY sequence, position")
    for split in SPLITS
}
DRAWS_PER_ITEM = 4  # after so many that hit one, writing out what is left is cheaper
ROOM = 2  # the line's length over that of all stretches, at least; the next power of two has it


def sample_candidates(
    connection: duckdb.DuckDBPyConnection,
    *,
    split: str,
    negatives: int,
    sampling: Sampling,
    seed: int,
) -> None:
    """Ask each sequence of a split about its target and ``negatives`` items, in random order.

    An item of the core is untouched when the user has no interaction with it before the core was
    filtered either: both are in the core, so that no interaction of theirs was filtered out.

    Args:
        connection: Comes from :func:`mllm_msr.sequences.make_sequences`; gets
            ``<split>_candidates (sequence, position, item, label)``.
        split: ``train``, ``valid`` or ``test``.
        negatives: Items per sequence besides the target.
        sampling: ``uniform`` over the core's items, or in proportion to ``popularity`` + 1. The
            one is added because an item that is never a negative gives itself away as a target.
        seed: Of the draws and of the target's position.

    Raises:
        DataError: A user has too few untouched items; names the user and the numbers.
    """
    items, total, line = _make_pool(connection, sampling, seed)
    _refuse_too_few(connection, split, negatives, items)
    _start_drawing(connection, split)
    draws_per_hit = line / total  # on average
    limit = _even(DRAWS_PER_ITEM * items * draws_per_hit)
    start, stop = 0, _even((negatives + negatives // 4 + 1) * draws_per_hit)
    while _lacking(connection, negatives) and start < limit:
        _draw(connection, f"{seed}:{split}", sampling, line, range(start, min(stop, limit)))
        start, stop = stop, 2 * stop
    _write_out_untouched(connection, f"{seed}:{split}", limit)
    _place_targets(connection, split, negatives, seed)


def _refuse_too_few(
    connection: duckdb.DuckDBPyConnection, split: str, negatives: int, items: int
) -> None:
    """Find the user with the fewest untouched items, and stop if they are too few."""
    row = connection.execute(
        """
        SELECT user, max(interactions_kept.place) AS touched
        FROM interactions_kept JOIN sequences USING (user_id)
        WHERE interactions_kept.place > $most AND split = $split
        GROUP BY user ORDER BY touched DESC, user LIMIT 1
        """,
        {"split": split, "most": items - negatives},
    ).fetchone()
    if row:
        user, touched = row
        raise DataError(
            f"{negatives:,} items that each user of {split} never touched",
            f"{items - touched:,} for user {user!r}, who touched {touched:,} of {items:,}",
            f"filter_sequences.{split}_negatives",
            "lower it or bring more items",
        )


def _make_pool(
    connection: duckdb.DuckDBPyConnection, sampling: Sampling, seed: int
) -> tuple[int, int, int]:
    """Give each item its stretch of the line, ``weight`` long, from ``first`` on.

    Returns:
        How many items there are, the length of their stretches together, and that of the line.
    """
    weight = "1" if sampling == "uniform" else "interactions + 1"
    items, total = one_row(connection, f"SELECT count(*), sum({weight})::BIGINT FROM popularity")
    length = 2 ** math.ceil(math.log2(ROOM * total))
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE pool AS
        WITH homes AS (
            SELECT item_id, item, {weight} AS weight,
                   {stable_hash(f"'{seed}:pool:' || item")} % {length} AS home
            FROM popularity
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
    # Stretches that gave way at the line's end stand beyond it. An eighth more room for them is
    # more than they ever take, but for a handful of items: so its length is a constant too.
    (end,) = one_row(connection, "SELECT max(first + weight) FROM pool")
    return items, total, max(length + length // 8, end)


def _start_drawing(connection: duckdb.DuckDBPyConnection, split: str) -> None:
    """Make ``lacking``, the sequences that need draws, and ``drawn``, what they have."""
    connection.execute(
        "CREATE OR REPLACE TABLE lacking AS SELECT sequence, user_id, user FROM sequences"
        " WHERE split = $split",
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
    if sampling == "uniform":  # every stretch is one point long, and no sorting is needed
        hit = "JOIN pool ON point = first"
    connection.execute(
        f"""
        INSERT INTO drawn
        WITH numbers AS (
            SELECT sequence, user_id, user,
                   unnest(range({numbers.start // 2}, {numbers.stop // 2})) AS number
            FROM lacking
        ),
        digests AS (
            SELECT sequence, user_id, number, md5(concat_ws(':', '{key}', number, user)) AS digest
            FROM numbers
        ),
        points AS (
            SELECT sequence, user_id, 2 * number + half AS draw,
                   {number_of("digest[16 * half + 1 : 16 * half + 15]")} % {line} AS point
            FROM digests CROSS JOIN (VALUES (0), (1)) AS halves (half)
        ),
        found AS (
            SELECT sequence, user_id, item_id, draw FROM points {hit}
        )
        SELECT sequence, item_id, min(draw)
        FROM found
        ANTI JOIN interactions_kept USING (user_id, item_id)
        ANTI JOIN drawn USING (sequence, item_id)
        GROUP BY sequence, item_id
        """
    )


def _write_out_untouched(connection: duckdb.DuckDBPyConnection, key: str, limit: int) -> None:
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
            ANTI JOIN interactions_kept USING (user_id, item_id)
            ANTI JOIN drawn USING (sequence, item_id)
        )
        SELECT sequence, item_id,
               {limit} + row_number() OVER (PARTITION BY sequence ORDER BY key, item_id)
        FROM untouched
        """
    )


def _place_targets(
    connection: duckdb.DuckDBPyConnection, split: str, negatives: int, seed: int
) -> None:
    """Put each target at a random position among its negatives, which keep their order."""
    place = stable_hash(f"concat_ws(':', '{seed}:{split}:target', user)")
    connection.execute(
        f"""
        CREATE TABLE {split}_candidates AS
        WITH targets AS (
            SELECT sequence, target AS item, {place} % {negatives + 1} AS position
            FROM sequences WHERE split = '{split}'
        ),
        chosen AS (
            SELECT sequence, item_id,
                   row_number() OVER (PARTITION BY sequence ORDER BY draw) - 1 AS rank
            FROM drawn
            QUALIFY rank < {negatives}
        )
        SELECT sequence, position, item, true AS label FROM targets
        UNION ALL
        SELECT sequence, rank + CAST(rank >= position AS BIGINT), pool.item, false
        FROM chosen JOIN targets USING (sequence) JOIN pool USING (item_id)
        """
    )


def _even(number: float) -> int:
    """Round up to pairs, as an MD5 gives two draws."""
    return 2 * math.ceil(number / 2)
