"""Candidates of each sequence: its target, and negatives that its user never interacted with.

Negative sampling. The column ``sampling`` of the table Candidates has five values:

    * ``uniform``: every item of the k-core with equal probability (the paper's);
    * ``popularity``: in proportion to ``popularity`` + 1, where all users count, whatever the
      budget;
    * ``targets``: in proportion to how often an item is the target of another sequence of the same
      split, used or not. Targets are recent interactions, while uniform negatives are mostly older
      items. A scorer that counts training targets can therefore tell a target from uniform
      negatives without knowing the user, but not from the targets of other users;
    * ``contemporary``: every item whose first interaction is at or before the target's time, with
      equal probability;
    * ``stratum``: as ``targets``, but only items of the target's stratum: cold, rare or warm
      (:mod:`mllm_msr.data.sequences`). Popularity then tells little within a stratum, and nothing
      within the stratum cold.

Training and evaluation have separate settings. The recommender is trained on ``train_candidates``.
``selection_candidates`` holds the validation sequences under the same sampling, for the choice of
the epoch. ``valid_candidates`` and ``test_candidates`` hold every sampling that is evaluated, so
that one more of them means more scores but no other training. If ``targets``, ``contemporary`` or
``stratum`` finds too few items for a sequence, the sequence is skipped for that sampling and
counted; ``uniform`` and ``popularity`` raise an error.

Items that the split ``cold_items`` withholds are in neither training table: as a negative, such an
item would teach that cold items are not taken. Sequences with a withheld target are left out of
``selection_candidates``.

Stable draws. Negatives are drawn in SQL, without a table of users x items and without a loop over
users. Each sequence has an infinite list of draws, two from each MD5 of seed, split, number and
user. The first n distinct untouched items on that list are its negatives. Therefore:

    * a larger number of negatives extends the smaller one;
    * the candidates of a sequence do not depend on ``filter_sequences.budget``;
    * the splits are independent: more test negatives do not change the training candidates;
    * the result does not depend on DuckDB's version, the order of rows or the number of threads;
    * if the catalogue grows by 1 %, about 1 % of the negatives change, and the responses about all
      others are still in the response store.

The last property needs a position for each item that does not depend on the number of items. A
draw is a point on a line, and each item owns an interval of that line, as long as its weight. The
interval starts at the MD5 of the item's name or, where intervals would overlap, after the previous
one (linear probing with intervals as slots). A draw that hits no interval is discarded. Items are
thus drawn exactly in proportion to their weights, and a new item moves only a few neighbours. The
line is at least twice as long as all intervals; only when it has to double do all draws change.

Rounds. Draws are made in rounds, for the sequences that still lack negatives. A few may lack some
even after many draws per item: those of users who touched nearly everything, or where one item
takes nearly all draws. Only for these, the remaining untouched items are listed and shuffled, with
the same distribution as further draws.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import duckdb

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import Sampling
from mllm_msr.core.schemas import PARTIAL_SAMPLINGS, AnyTable, Candidates
from mllm_msr.data.sequences import (
    fetch_one,
    hex_to_integer,
    refuse_missing_timestamps,
    stable_hash,
)

WEIGHTS = {  # SQL for an item's weight; items of weight 0 are not drawn
    "uniform": "1",
    # Plus one, because an item that is never drawn as a negative could only be a target.
    "popularity": "before_budget + 1",
    "targets": "coalesce(targets, 0)",
    "contemporary": "1",
    "stratum": "coalesce(targets, 0)",
}
ELIGIBLE = {  # SQL condition under which an item of the pool can be a sequence's negative, if any
    "contemporary": "pool.first_time <= timestamp",
    "stratum": "pool.stratum = target_stratum",
}
TRAINING_TABLES = ("train_candidates", "selection_candidates")  # without withheld items
# The model and query of each output table; sorted, so that equal inputs give equal bytes.
TABLES: dict[str, tuple[AnyTable, str]] = {
    f"{name}_candidates": (
        Candidates,
        f"FROM {name}_candidates ORDER BY sampling, sequence, position",
    )
    for name in ("train", "selection", "valid", "test")
}
DRAWS_PER_ITEM = 4  # after so many hits per item, listing the remaining items is cheaper
MIN_LINE_RATIO = 2  # length of the line over that of all intervals, before rounding up to 2^n


class Request(NamedTuple):
    """A sampling of negatives for the used sequences of a split, and the table that gets them."""

    table: str
    split: str
    sampling: Sampling

    @property
    def training(self) -> bool:
        """Whether withheld items are left out."""
        return self.table in TRAINING_TABLES


class Pool(NamedTuple):
    """The size of the table ``pool``.

    Attributes:
        items: The number of items.
        total: The total length of their intervals.
        line: The length of the line.
    """

    items: int
    total: int
    line: int


def make_candidates(
    connection: duckdb.DuckDBPyConnection,
    *,
    train_sampling: Sampling,
    evaluation_sampling: Sequence[Sampling],
    negatives: Mapping[str, int],
    seed: int,
) -> dict[str, int]:
    """Create the tables of :data:`TABLES`.

    Args:
        connection: The database after :func:`mllm_msr.data.sequences.make_sequences`.
        train_sampling: Sampling of ``train_candidates`` and ``selection_candidates``.
        evaluation_sampling: Samplings of ``valid_candidates`` and ``test_candidates``.
        negatives: Negatives per sequence, by split.
        seed: Seed of the draws and of the targets' positions.

    Returns:
        Skipped sequences by table and sampling; only counts above 0.

    Raises:
        DataError: A user has too few untouched items, or a sampling finds too few items for every
            sequence of a split.
    """
    requests = [
        Request("train_candidates", "train", train_sampling),
        Request("selection_candidates", "valid", train_sampling),
        *(
            Request(f"{split}_candidates", split, sampling)
            for split in ("valid", "test")
            for sampling in evaluation_sampling
        ),
    ]
    for name in TABLES:
        connection.execute(
            f"CREATE TABLE {name}"
            " (sampling VARCHAR, sequence BIGINT, position BIGINT, item VARCHAR, label BOOLEAN)"
        )
    skipped = sample_candidates(connection, requests, negatives=negatives, seed=seed)
    return {
        f"{each.table.removesuffix('_candidates')}_sequences_without_enough_{each.sampling}"
        "_negatives": skipped[each]
        for each in requests
        if skipped[each]
    }


def sample_candidates(
    connection: duckdb.DuckDBPyConnection,
    requests: Sequence[Request],
    *,
    negatives: Mapping[str, int],
    seed: int,
) -> dict[Request, int]:
    """Insert the target and the negatives of each used sequence, in random order.

    Requests with the same weights of items share one pool, which is laid out once.

    An item is untouched if the user has no interaction with it. Filtering to the k-core does not
    change that: it removes no interaction between a user and an item that are both in the core.

    Args:
        connection: The database after :func:`mllm_msr.data.sequences.make_sequences`. Each
            request's table has the columns ``(sampling, sequence, position, item, label)``.
        requests: What is sampled; for the samplings see the module's docstring.
        negatives: Negatives per sequence, by split.
        seed: Seed of the draws and of the targets' positions.

    Returns:
        The number of sequences of each request that are skipped because a partial sampling finds
        too few items.

    Raises:
        DataError: ``uniform`` or ``popularity`` meets a user with too few untouched items;
            ``contemporary`` meets an interaction without a timestamp; or every sequence would be
            skipped, in any table but ``valid_candidates``.
    """
    if any(each.sampling == "contemporary" for each in requests):
        refuse_missing_timestamps(
            connection,
            "find the items that had appeared by a target's time",
            "filter_sequences, sampling contemporary",
            "choose another sampling",
        )
    sharing: defaultdict[str, list[Request]] = defaultdict(list)
    for each in requests:
        sharing[_select_weights(connection, each)].append(each)
    skipped = {}
    for weights, group in sharing.items():
        timed = any(each.sampling == "contemporary" for each in group)
        pool = _create_pool(connection, weights, seed, timed=timed)
        for each in group:
            skipped[each] = _sample(connection, each, pool, negatives[each.split], seed)
    return skipped


def _sample(
    connection: duckdb.DuckDBPyConnection, request: Request, pool: Pool, negatives: int, seed: int
) -> int:
    """Insert the candidates of one request; return how many sequences are skipped."""
    table, split, sampling = request
    _choose_asked(connection, split, training=request.training)
    if sampling not in PARTIAL_SAMPLINGS:
        _refuse_too_few(connection, split, negatives, pool.items, training=request.training)
    _create_drawing_tables(connection)
    draws_per_hit = pool.line / max(pool.total, 1)  # expected
    limit = _round_up_to_even(DRAWS_PER_ITEM * pool.items * draws_per_hit)
    start, stop = 0, _round_up_to_even((negatives + negatives // 4 + 1) * draws_per_hit)
    while _drop_completed(connection, negatives) and start < limit:
        _draw(connection, f"{seed}:{split}", sampling, pool.line, range(start, min(stop, limit)))
        start, stop = stop, 2 * stop
    _draw_from_rest(connection, f"{seed}:{split}", sampling, limit)
    skipped = _drop_completed(connection, negatives)
    if table != "valid_candidates":  # validation metrics are only for information
        _refuse_all_skipped(connection, split, sampling, negatives, skipped)
    _insert_candidates(connection, table, split, sampling, negatives, seed)
    return skipped


def _choose_asked(connection: duckdb.DuckDBPyConnection, split: str, *, training: bool) -> None:
    """Create ``asked``, the sequences that get candidates.

    Args:
        connection: The database.
        split: ``train``, ``valid`` or ``test``.
        training: Whether sequences with a withheld target are left out.
    """
    connection.execute(
        f"""
        CREATE OR REPLACE VIEW asked AS
        FROM sequences WHERE split = '{split}' AND used {"AND NOT withheld" if training else ""}
        """
    )


def _refuse_too_few(
    connection: duckdb.DuckDBPyConnection,
    split: str,
    negatives: int,
    items: int,
    *,
    training: bool,
) -> None:
    """Refuse a split in which a user has fewer untouched items than negatives are needed."""
    # The number of a user's interactions is that of the last; withheld items are in no training.
    touched, number = ("readable", "place") if training else ("core_interactions", "ordinal")
    row = connection.execute(
        f"""
        SELECT user, max({touched}.{number}) AS touched
        FROM {touched} JOIN asked USING (user_id)
        WHERE {touched}.{number} > $most
        GROUP BY user ORDER BY touched DESC, user LIMIT 1
        """,
        {"most": items - negatives},
    ).fetchone()
    if row:
        user, touched = row
        raise DataError(
            expected=f"{negatives:,} items without an interaction for each user of {split}",
            got=f"{items - touched:,} for user {user!r}, who has interactions with {touched:,} of"
            f" {items:,} items",
            where=f"filter_sequences.{split}_negatives",
            fix="lower it or add items",
        )


def _refuse_all_skipped(
    connection: duckdb.DuckDBPyConnection,
    split: str,
    sampling: Sampling,
    negatives: int,
    skipped: int,
) -> None:
    """Refuse a sampling that finds too few items for every sequence of a split."""
    (asked,) = fetch_one(connection, "SELECT count(*) FROM asked")
    if skipped and skipped == asked:
        (items,) = fetch_one(connection, "SELECT count(*) FROM pool")
        raise DataError(
            expected=f"{negatives:,} items for some sequence of {split} by the sampling {sampling}",
            got=f"too few for all {asked:,}: it chooses among {items:,} items",
            where=f"filter_sequences.{split}_negatives",
            fix=f"lower it, add users, or remove {sampling} from train_sampling and"
            " evaluation_sampling",
        )


def _select_weights(connection: duckdb.DuckDBPyConnection, request: Request) -> str:
    """Return the SQL for the weight of each item that can be drawn.

    It names the split or withheld items only where they matter, so that requests with the same
    weights have the same SQL.
    """
    weight = WEIGHTS[request.sampling]
    split = f"split = '{request.split}'" if "targets" in weight else "false"
    (withheld,) = fetch_one(connection, "SELECT coalesce(bool_or(withheld), false) FROM popularity")
    return f"""
        WITH counts AS (
            SELECT target AS item, count(*) AS targets FROM sequences WHERE {split} GROUP BY target
        )
        SELECT item_id, item, stratum, {weight} AS weight
        FROM popularity LEFT JOIN counts USING (item)
        WHERE weight > 0 {"AND NOT withheld" if withheld and request.training else ""}
        """


def _create_pool(
    connection: duckdb.DuckDBPyConnection, weights: str, seed: int, *, timed: bool
) -> Pool:
    """Create ``pool``: each item's interval of the line, from ``first``, ``weight`` long.

    Args:
        connection: The database.
        weights: SQL for the items and their weights.
        seed: Seed of the intervals' positions.
        timed: Whether ``pool`` has the column ``first_time``.
    """
    connection.execute(f"CREATE OR REPLACE TABLE weights AS {weights}")
    items, total = fetch_one(
        connection, "SELECT count(*), coalesce(sum(weight), 0)::BIGINT FROM weights"
    )
    length = 2 ** math.ceil(math.log2(MIN_LINE_RATIO * max(total, 1)))
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE pool AS
        WITH homes AS (
            SELECT item_id, item, stratum, weight,
                   {stable_hash(f"'{seed}:pool:' || item")} % {length} AS home
            FROM weights
        ),
        -- dense: where an interval would start if all before it were packed from 0 on.
        intervals AS (
            SELECT *, CAST(sum(weight) OVER (ORDER BY home, item) - weight AS BIGINT) AS dense
            FROM homes
        )
        SELECT item_id, item, stratum, weight,
               dense + max(home - dense) OVER (ORDER BY home, item) AS first
        FROM intervals
        """
    )
    if timed:
        _add_first_times(connection)
    # Intervals that were shifted at the end lie beyond the line. With more than a handful of items
    # they never need an eighth of its length; adding that always keeps the length constant.
    (end,) = fetch_one(connection, "SELECT coalesce(max(first + weight), 0) FROM pool")
    return Pool(items, total, max(length + length // 8, end))


def _add_first_times(connection: duckdb.DuckDBPyConnection) -> None:
    """Add the time of each item's first interaction, in the k-core or not, to ``pool``."""
    connection.execute(
        """
        CREATE OR REPLACE TABLE pool AS
        SELECT pool.*, first_time
        FROM pool JOIN (
            SELECT item, min(timestamp) AS first_time FROM interactions GROUP BY item
        ) USING (item)
        """
    )


def _create_drawing_tables(connection: duckdb.DuckDBPyConnection) -> None:
    """Create ``lacking``, the sequences that need draws, and ``drawn``, their negatives."""
    connection.execute(
        "CREATE OR REPLACE TABLE lacking AS"
        " SELECT sequence, user_id, user, timestamp, stratum AS target_stratum FROM asked"
    )
    connection.execute(
        "CREATE OR REPLACE TABLE drawn (sequence BIGINT, item_id INTEGER, draw BIGINT)"
    )


def _drop_completed(connection: duckdb.DuckDBPyConnection, negatives: int) -> int:
    """Remove sequences with enough negatives from ``lacking``; return how many remain."""
    connection.execute(
        """
        DELETE FROM lacking WHERE sequence IN (
            SELECT sequence FROM drawn GROUP BY sequence HAVING count(*) >= $negatives
        )
        """,
        {"negatives": negatives},
    )
    return int(fetch_one(connection, "SELECT count(*) FROM lacking")[0])


def _draw(
    connection: duckdb.DuckDBPyConnection, key: str, sampling: Sampling, line: int, numbers: range
) -> None:
    """Make the draws ``numbers`` for the lacking sequences; keep untouched, new items."""
    hit = "ASOF JOIN pool ON point >= first WHERE point < first + weight AND"
    if WEIGHTS[sampling] == "1":  # all intervals have length 1: an equality join needs no sorting
        hit = "JOIN pool ON point = first WHERE"
    connection.execute(
        f"""
        INSERT INTO drawn
        WITH numbers AS (
            SELECT sequence, user_id, user, timestamp, target_stratum,
                   unnest(range({numbers.start // 2}, {numbers.stop // 2})) AS number
            FROM lacking
        ),
        digests AS (
            SELECT sequence, user_id, timestamp, target_stratum, number,
                   md5(concat_ws(':', '{key}', number, user)) AS digest
            FROM numbers
        ),
        points AS (
            SELECT sequence, user_id, timestamp, target_stratum, 2 * number + half AS draw,
                   {hex_to_integer("digest[16 * half + 1 : 16 * half + 15]")} % {line} AS point
            FROM digests CROSS JOIN (VALUES (0), (1)) AS halves (half)
        ),
        found AS (
            SELECT sequence, user_id, item_id, draw
            FROM points {hit} {ELIGIBLE.get(sampling, "true")}
        )
        SELECT sequence, item_id, min(draw)
        FROM found
        ANTI JOIN core_interactions USING (user_id, item_id)
        ANTI JOIN drawn USING (sequence, item_id)
        GROUP BY sequence, item_id
        """
    )


def _draw_from_rest(
    connection: duckdb.DuckDBPyConnection, key: str, sampling: Sampling, limit: int
) -> None:
    """Append all remaining items of lacking sequences in random order, as draws from ``limit`` on.

    Ordering by exponential keys, -ln(uniform) / weight, is weighted sampling without replacement
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
            WHERE {ELIGIBLE.get(sampling, "true")}
        )
        SELECT sequence, item_id,
               {limit} + row_number() OVER (PARTITION BY sequence ORDER BY key, item_id)
        FROM untouched
        """
    )


def _insert_candidates(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    split: str,
    sampling: Sampling,
    negatives: int,
    seed: int,
) -> None:
    """Insert each target at a random position among its negatives, which keep their order.

    Sequences that are still lacking are skipped.
    """
    position = stable_hash(f"concat_ws(':', '{seed}:{split}:target', user)")
    connection.execute(
        f"""
        INSERT INTO {table} BY NAME
        WITH targets AS (
            SELECT sequence, target AS item, {position} % {negatives + 1} AS position
            FROM asked ANTI JOIN lacking USING (sequence)
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


def _round_up_to_even(number: float) -> int:
    """Round up to an even number, because one MD5 gives two draws."""
    return 2 * math.ceil(number / 2)
