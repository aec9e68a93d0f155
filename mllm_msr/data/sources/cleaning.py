"""Cleaning of a reader's views: checks, whitespace, unknown items, repeated interactions.

The rules that hold for every source are here and only here. All work is SQL that spills to disk, so
that a hundred million interactions need no more memory than DuckDB's limit.
"""

import logging
import re
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from mllm_msr.core.errors import DataError
from mllm_msr.data.sources.parsing import RawFiles, explain_read_errors, fetch_first, locate_row

# Earlier timestamps are seconds mistaken for milliseconds: no recommendation data is that old.
EARLIEST = 100_000_000_000  # milliseconds since 1970, March 1973
LATEST = 4_102_444_800_000  # milliseconds since 1970, the year 2100

log = logging.getLogger(__name__)

# The earliest interaction of each (user, item) pair. Grouping a hundred million pairs takes more
# memory than sorting them, and few repeat: only pairs whose hash occurs twice are grouped, and a
# hash collision only groups a pair for nothing. Time (0 if missing) and position are packed into
# one number, because DuckDB finds its minimum in two thirds of the time of a struct's.
HASH = 'hash("user", item)'
INTERACTIONS = f"""
WITH known AS NOT MATERIALIZED (FROM timed_interactions SEMI JOIN items USING (item))
SELECT "user", item, timestamp, position::BIGINT AS position
FROM known ANTI JOIN repeated ON repeated.hash = {HASH}
UNION ALL
SELECT "user", item, nullif(first >> 48, 0)::BIGINT AS timestamp,
    (first & 281474976710655)::BIGINT AS position
FROM (
    SELECT "user", item,
        min((coalesce(timestamp, 0)::HUGEINT << 48) | position::HUGEINT) AS first
    FROM known SEMI JOIN repeated ON repeated.hash = {HASH}
    GROUP BY "user", item
) ORDER BY "user", timestamp, position
"""
# A time without an offset is UTC; DuckDB would interpret it in the machine's time zone.
WITH_OFFSET = r"""(CASE WHEN regexp_matches(timestamp, '[T ]\d\d.*[Z+-]') THEN timestamp
    WHEN length(timestamp) = 10 THEN timestamp || ' 00:00:00Z' ELSE timestamp || 'Z' END)"""
MILLISECONDS = {
    "milliseconds": "timestamp::BIGINT",
    "seconds": "timestamp::BIGINT * 1000",
    "iso8601": f"epoch_ms({WITH_OFFSET}::TIMESTAMPTZ)",
}
"""SQL for the milliseconds since 1970 of a well-formed timestamp, by unit."""
TIMESTAMPS = {  # regular expressions of well-formed timestamps
    "milliseconds": r"\d{1,18}",
    "seconds": r"\d{1,15}",
    "iso8601": r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d(:?\d\d)?)?)?",
}
FRACTION = r"\d+\.\d*([eE]\+?\d+)?|\d+[eE]\+?\d+"
EXPECTED = {
    "milliseconds": "integer milliseconds since 1970, before 2100",
    "seconds": "integer seconds since 1970, before 2100",
    "iso8601": "a date and time of ISO 8601 from 1973 to 2100, as 2024-05-01T10:00:00Z",
}
ITEMS = "SELECT item, title, description FROM items ORDER BY item"
IMAGES = """
SELECT item, file, member, url FROM raw_images SEMI JOIN items USING (item) ORDER BY item
"""


def clean(
    connection: duckdb.DuckDBPyConnection, files: RawFiles, unknown_items: str
) -> tuple[int, dict[str, int]]:
    """Check a reader's views and create the tables that the module's three queries read.

    Args:
        connection: The database with the reader's views.
        files: The reader's result.
        unknown_items: What to do with interactions whose item is not in the catalogue: ``error``,
            ``drop``, or ``keep``, which adds the item without a title.

    Returns:
        The number of interactions with known items, repeats included, and dropped rows by reason.
        :data:`INTERACTIONS` removes the repeats.

    Raises:
        DataError: A cell is empty, a timestamp malformed, an item repeated, a table empty, or
            interactions have unknown items and ``unknown_items`` is ``error``.
    """
    _clean_items(connection, files.items)
    total, unknown = _check_interactions(connection, files, unknown_items)
    milliseconds = MILLISECONDS[files.unit] if files.timed else "NULL::BIGINT"
    connection.execute(
        f'CREATE VIEW timed_interactions AS SELECT "user", item, {milliseconds} AS timestamp,'
        " position FROM raw_interactions"
    )
    if unknown_items == "keep":
        connection.execute(
            "INSERT INTO items BY NAME"
            " SELECT DISTINCT item FROM raw_interactions ANTI JOIN items USING (item)"
        )
        unknown = 0
    users, items = _count_orphans(connection, files, unknown)
    connection.execute(
        f"CREATE TABLE repeated AS SELECT {HASH} AS hash FROM raw_interactions"
        " GROUP BY hash HAVING count(*) > 1"
    )
    unused, first_unused = fetch_first(
        connection,
        "SELECT count(*), min({'row': row, 'item': coalesce(item, file)})"
        " FROM raw_images ANTI JOIN items USING (item)",
    ) or (0, None)
    if unused:
        log.warning(
            "dropped %s images of unknown items, the first of %r", unused, first_unused["item"]
        )
    return total - unknown, {
        "interactions_with_unknown_items": unknown,
        "users_left_without_interactions": users,
        "items_left_without_interactions": items,
        "images_of_unknown_items": unused,
    }


def fold(column: str) -> str:
    """Return the SQL that removes control characters, folds whitespace and turns '' into null."""
    visible = rf"regexp_replace({column}, '[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]', '', 'g')"
    return rf"nullif(trim(regexp_replace({visible}, '[\s\v\x85\pZ]+', ' ', 'g')), '')"


def _clean_items(connection: duckdb.DuckDBPyConnection, file: Path) -> None:
    """Create the table ``items``, one row per item."""
    with explain_read_errors(file):
        connection.execute(
            f"CREATE TABLE items AS SELECT item, {fold('title')} AS title,"
            f" {fold('description')} AS description, row FROM raw_items"
        )
    nameless = fetch_first(
        connection, "SELECT row FROM items WHERE item IS NULL ORDER BY row LIMIT 1"
    )
    repeated = fetch_first(
        connection,
        "SELECT item, min(row), max(row) FROM items GROUP BY item HAVING count(*) > 1"
        " ORDER BY 2 LIMIT 1",
    )
    if not _count(connection, "FROM items"):
        raise _empty(file)
    if nameless:
        raise _empty_cell(file, nameless[0], "item")
    if repeated:
        item, first, last = repeated
        raise DataError(
            expected="every item once",
            got=f"{item!r} again",
            where=_locate_two_rows(file, first, last),
            fix="remove or rename one",
        )


def _check_interactions(
    connection: duckdb.DuckDBPyConnection, files: RawFiles, unknown_items: str
) -> tuple[int, int]:
    """Return the number of all interactions and of those with unknown items, in one pass."""
    time = f"try({MILLISECONDS[files.unit]})"
    bad_time = f"""coalesce(NOT regexp_full_match(timestamp, '{TIMESTAMPS[files.unit]}')
        OR {time} NOT BETWEEN {EARLIEST} AND {LATEST}, true)"""
    bad = f'"user" IS NULL OR item IS NULL OR {bad_time if files.timed else "false"}'
    cells = "{'row': row, 'user': \"user\", 'item': item, 'timestamp': timestamp}"
    with explain_read_errors(files.interactions):
        result = fetch_first(
            connection,
            f"""SELECT count(*), min(cells) FILTER (bad),
                count(*) FILTER (unknown), min(cells) FILTER (unknown)
            FROM (
                SELECT {cells} AS cells, {bad} AS bad, known IS NULL AS unknown
                FROM raw_interactions LEFT JOIN (SELECT item, true AS known FROM items) USING (item)
            )""",
        )
    total, first_bad, unknown, first_unknown = result or (0, None, 0, None)
    if not total:
        raise _empty(files.interactions)
    if first_bad:
        raise _bad_interaction(files, **first_bad)
    if unknown and (unknown_items == "error" or (unknown_items == "drop" and unknown == total)):
        raise _unknown_items(files, unknown, total, **first_unknown)
    if unknown and unknown_items == "drop":
        log.warning(
            "dropped %s interactions with unknown items, the first with %r in %s",
            *(unknown, first_unknown["item"], locate_row(files.interactions, first_unknown["row"])),
        )
    return total, unknown


def _count_orphans(
    connection: duckdb.DuckDBPyConnection, files: RawFiles, unknown: int
) -> tuple[int, int]:
    """Return the number of users and of items whose interactions were all dropped."""
    dropped = 'SELECT "user", item FROM raw_dropped'
    remaining = "raw_interactions"
    if unknown:
        dropped += (
            ' UNION ALL SELECT "user", item FROM raw_interactions ANTI JOIN items USING (item)'
        )
        remaining = "(FROM raw_interactions SEMI JOIN items USING (item))"
    counts = []
    for name in ('"user"', "item"):
        with explain_read_errors(files.interactions):
            connection.execute(
                f"CREATE OR REPLACE TEMP TABLE affected AS SELECT DISTINCT {name} FROM ({dropped})"
                f" WHERE {name} <> ''"
            )
        # Most runs drop nothing and need no further pass over the file.
        affected = _count(connection, "FROM affected")
        orphans = f"FROM affected ANTI JOIN (SELECT {name} FROM {remaining}) USING ({name})"
        counts.append(_count(connection, orphans) if affected else 0)
    return counts[0], counts[1]


def _bad_interaction(
    files: RawFiles, row: int, user: str | None, item: str | None, timestamp: str | None
) -> DataError:
    """Return the error for the first invalid cell of a row."""
    for column, cell in (("user", user), ("item", item), ("timestamp", timestamp)):
        if cell is None:
            return _empty_cell(files.interactions, row, column)
    text = timestamp or ""
    return DataError(
        expected=EXPECTED[files.unit],
        got=f"{text[:80]!r}",
        where=f"{locate_row(files.interactions, row)}, timestamp",
        fix=_suggest_unit(text, files),
    )


def _suggest_unit(timestamp: str, files: RawFiles) -> str:
    """Guess the intended unit of a timestamp and return the fix."""
    if re.fullmatch(FRACTION, timestamp):
        return "write whole numbers, without a decimal point or exponent"
    unit, example = _guess_unit(timestamp)
    if unit is None or unit == files.unit:
        return "correct it"
    if files.unit_setting and unit in MILLISECONDS:
        return f"these look like {unit}{example}, set {files.unit_setting} to {unit}"
    return f"these look like {unit}{example}, convert the column to {files.unit}"


def _guess_unit(timestamp: str) -> tuple[str | None, str]:
    """Return the unit in which a timestamp is plausible, or None, and its date as an example."""
    if re.fullmatch(TIMESTAMPS["iso8601"], timestamp):
        return "iso8601", ""
    if re.fullmatch(r"[0-9]{1,30}", timestamp):
        factors = {"milliseconds": 1.0, "seconds": 1e3, "microseconds": 1e-3, "nanoseconds": 1e-6}
        for unit, factor in factors.items():
            milliseconds = int(timestamp) * factor
            if EARLIEST <= milliseconds <= LATEST:
                day = datetime.fromtimestamp(milliseconds / 1000, UTC).date()
                return unit, f" ({day})"
    return None, ""


def _unknown_items(
    files: RawFiles, unknown: int, total: int, row: int, item: str, **_: str | None
) -> DataError:
    """Return the error for interactions with unknown items; it names the first."""
    return DataError(
        expected=f"interactions with items of {files.items.name}",
        got=f"{unknown:,} of {total:,} with other items, first {item!r}",
        where=f"{locate_row(files.interactions, row)}, item",
        fix="add the items"
        if unknown == total
        else "add the items, or set preprocess.unknown_items to drop or keep",
    )


def _locate_two_rows(file: Path, first: int, last: int) -> str:
    """Return where two rows are, for errors."""
    if file.is_dir():
        return f"{locate_row(file, first)} and {locate_row(file, last)}"
    return f"{file}, rows {first} and {last}"


def _empty_cell(file: Path, row: int, column: str) -> DataError:
    return DataError(
        expected="a value",
        got="an empty cell",
        where=f"{locate_row(file, row)}, {column}",
        fix="fill it",
    )


def _empty(file: Path) -> DataError:
    return DataError(
        expected="at least one row", got="none", where=str(file), fix="use the complete file"
    )


def _count(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    """Return the number of a query's rows."""
    return int(connection.execute(f"SELECT count(*) FROM ({query})").fetchall()[0][0])
