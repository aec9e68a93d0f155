"""The contract of the three tables of ``preprocess``, for teams that write them themselves.

A folder has the tables ``interactions``, ``items`` and, if there are images, ``image_sources``,
each as a Parquet file (``interactions.parquet``) or a folder of part files
(``interactions/*.parquet``), as Spark writes. Their columns are those of
:mod:`mllm_msr.core.schemas`. All checks are SQL that spills to disk.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as arrow
import pyarrow.parquet

from mllm_msr.core.errors import DataError
from mllm_msr.core.files import duckdb_path
from mllm_msr.data.sources.cleaning import EARLIEST, LATEST, fold
from mllm_msr.data.sources.parsing import is_fault_of_file, list_parts, quote_literal

TEXT, INTEGER = "VARCHAR", "BIGINT"
TABLES: Mapping[str, Mapping[str, str]] = {
    "interactions": {"user": TEXT, "item": TEXT, "timestamp": INTEGER, "position": INTEGER},
    "items": {"item": TEXT, "title": TEXT, "description": TEXT},
    "image_sources": {"item": TEXT, "file": TEXT, "member": TEXT, "url": TEXT},
}
NO_IMAGES = "image_sources"  # may be missing


@dataclass(frozen=True)
class Violation:
    """What is wrong with a table.

    Attributes:
        table: The table's name.
        fault: What is wrong.
        count: The number of rows; None where it is not about rows.
        example: One of them, or what there is instead.
    """

    table: str
    fault: str
    count: int | None
    example: str

    def __str__(self) -> str:
        """Return the violation as a line."""
        if self.count is None:
            return f"{self.table}: {self.fault}: {self.example}"
        rows = "1 row" if self.count == 1 else f"{self.count:,} rows"
        return f"{self.table}: {rows} {self.fault}, such as {self.example}"


@dataclass(frozen=True)
class Rule:
    """A rule for the rows of a table.

    Attributes:
        table: The table.
        fault: What a row is that breaks it.
        rows: SQL for the rows that break it.
    """

    table: str
    fault: str
    rows: str


def _repeated(table: str, *columns: str) -> str:
    """Return SQL for the rows whose key occurs before; hashes find the few candidates cheaply."""
    key = ", ".join(columns)
    return f"""
        SELECT {key} FROM {table} SEMI JOIN (
            SELECT hash({key}) AS found FROM {table} GROUP BY found HAVING count(*) > 1
        ) ON hash({key}) = found
        WHERE item IS NOT NULL
        QUALIFY row_number() OVER (PARTITION BY {key}) > 1"""


def _without(table: str, column: str) -> Rule:
    """Return the rule that a column of ids has no empty cell."""
    empty = f"FROM {table} WHERE {column} IS NULL OR {column} = ''"
    return Rule(table, f"without {column.strip(chr(34))}", empty)


RULES = (
    _without("interactions", '"user"'),
    _without("interactions", "item"),
    Rule("interactions", "without position", "FROM interactions WHERE position IS NULL"),
    Rule("interactions", "with a negative position", "FROM interactions WHERE position < 0"),
    Rule(
        "interactions",
        "with a timestamp that is not milliseconds from 1973 to 2100",
        f"FROM interactions WHERE timestamp NOT BETWEEN {EARLIEST} AND {LATEST}",
    ),
    Rule(
        "interactions",
        "without timestamp while others have one",
        "FROM interactions WHERE timestamp IS NULL"
        " AND (SELECT count(timestamp) > 0 FROM interactions)",
    ),
    Rule(
        "interactions",
        "repeating a pair of user and item",
        _repeated("interactions", '"user"', "item"),
    ),
    Rule(
        "interactions",
        "of a user with the same timestamp and position as another, whose order is open",
        """SELECT * FROM interactions SEMI JOIN (
            SELECT hash("user", timestamp, position) AS found FROM interactions
            GROUP BY found HAVING count(*) > 1
        ) ON hash("user", timestamp, position) = found
        QUALIFY row_number() OVER (PARTITION BY "user", timestamp, position) > 1""",
    ),
    Rule(
        "interactions",
        "with an item that items lacks",
        "FROM interactions ANTI JOIN items USING (item) WHERE item <> ''",
    ),
    _without("items", "item"),
    Rule("items", "repeating an item", _repeated("items", "item")),
    Rule(
        "items",
        "whose title or description is empty, or has control characters or unfolded whitespace",
        f"FROM items WHERE title IS DISTINCT FROM {fold('title')}"
        f" OR description IS DISTINCT FROM {fold('description')}",
    ),
    _without("image_sources", "item"),
    Rule("image_sources", "repeating an item", _repeated("image_sources", "item")),
    Rule(
        "image_sources",
        "with an item that items lacks",
        "FROM image_sources ANTI JOIN items USING (item) WHERE item <> ''",
    ),
    Rule(
        "image_sources",
        "with both file and url, or neither",
        "FROM image_sources WHERE (file IS NULL) = (url IS NULL)",
    ),
    Rule(
        "image_sources",
        "with a member and no file",
        "FROM image_sources WHERE member IS NOT NULL AND file IS NULL",
    ),
    Rule(
        "image_sources",
        "with a url that is not http or https",
        "FROM image_sources WHERE NOT regexp_matches(url, '^https?://', 'i')",
    ),
    Rule(
        "image_sources",
        "with a file that is no path below the folder",
        r"FROM image_sources"
        r" WHERE regexp_matches(file, '^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)')",
    ),
)
"""The rules for rows, in the order in which their violations are reported."""


def find_violations(connection: duckdb.DuckDBPyConnection, folder: Path) -> list[Violation]:
    """Create a view of each table, and return all that is wrong with them.

    Rows are checked once all tables have the right columns. Members of archives and the images
    themselves are checked when ``fetch_images`` reads them.
    """
    wrong = [each for table in TABLES for each in _view(connection, folder, table)]
    if wrong:
        return wrong
    for table in ("interactions", "items"):
        if not connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0]:
            wrong.append(Violation(table, "rows are missing", None, "it has none"))
    for rule in RULES:
        try:
            wrong += _check_rule(connection, rule)
        except duckdb.Error as error:
            if not is_fault_of_file(error):
                raise
            return [*wrong, *_find_damage(folder, rule, error)]
    return [*wrong, *_check_files(connection, folder)]


def read_prepared(connection: duckdb.DuckDBPyConnection, folder: Path) -> tuple[str, str, str]:
    """Return SQL for the three tables of a folder that keeps the contract.

    The order of their rows is that of ``preprocess``. Images are named below the folder, so that it
    can move; ``fetch_images`` takes paths as they are.

    Raises:
        DataError: It does not.
    """
    wrong = find_violations(connection, folder)
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise DataError(
            expected="tables that keep the contract of docs/datasets.md",
            got=f"{wrong[0]}{more}",
            where=str(folder),
            fix=f"mllm-msr data check {folder} lists all of it",
        )
    return (
        'SELECT "user", item, timestamp, position FROM interactions'
        ' ORDER BY "user", timestamp, position',
        "SELECT item, title, description FROM items ORDER BY item",
        f"SELECT item, {quote_literal(folder)} || '/' || file AS file, member, url"
        " FROM image_sources ORDER BY item",
    )


def _view(connection: duckdb.DuckDBPyConnection, folder: Path, table: str) -> Iterator[Violation]:
    """Create the view of a table; yield what is wrong with its files and columns."""
    try:
        files = _find_files(folder, table)
    except DataError as error:
        yield Violation(table, f"expected {error.expected}", None, f"got {error.got}; {error.fix}")
        return
    if not files and table == NO_IMAGES:
        empty = ", ".join(f"NULL::{kind} AS {name}" for name, kind in TABLES[table].items())
        connection.execute(f"CREATE VIEW {table} AS SELECT {empty} WHERE false")
        return
    if not files:
        names = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
        yield Violation(
            table, f"no file {table}.parquet or folder {table} of part files", None, names
        )
        return
    wrong = [each for file in files for each in _check_columns(connection, table, file)]
    yield from wrong
    if not wrong:
        paths = [duckdb_path(path) for path in files]
        connection.read_parquet(paths, hive_partitioning=False).create_view(table)


def _check_columns(
    connection: duckdb.DuckDBPyConnection, table: str, file: Path
) -> Iterator[Violation]:
    """Yield what is wrong with the columns of one of a table's files."""
    columns = TABLES[table]
    try:
        rows = connection.read_parquet(duckdb_path(file), hive_partitioning=False)
        found = dict(zip(rows.columns, map(str, rows.types), strict=True))
    except duckdb.Error as error:
        yield _unreadable(table, file.name, error)
        return
    of_file = f" in {file.name}"
    yield from (
        Violation(table, f"no column {name}", None, f"it has {', '.join(found)}{of_file}")
        for name in columns.keys() - found.keys()
    )
    yield from (
        Violation(table, f"unknown column {name}", None, f"only {', '.join(columns)}{of_file}")
        for name in found.keys() - columns.keys()
    )
    for name, kind in columns.items():
        if found.get(name, kind) != kind:
            yield Violation(
                table, f"column {name} is not {kind}", None, f"it is {found[name]}{of_file}"
            )


def _unreadable(table: str, place: str, error: Exception) -> Violation:
    """Return the violation of a file that cannot be read."""
    reason = " ".join(str(error).split())[:200]
    return Violation(table, "not readable as Parquet", None, f"{place}: {reason}")


def _find_damage(folder: Path, rule: Rule, error: duckdb.Error) -> list[Violation]:
    """Return the violation of each damaged file, after a rule's rows could not be read.

    A rule may read two tables, and DuckDB does not always name the file.
    """
    damaged = []
    for table in TABLES:
        for file in _find_files(folder, table):
            try:
                with arrow.parquet.ParquetFile(file.absolute()) as opened:
                    for _ in opened.iter_batches():
                        pass
            except (arrow.ArrowException, OSError) as fault:
                damaged.append(_unreadable(table, file.name, fault))
    return damaged or [_unreadable(rule.table, str(folder), error)]


def _find_files(folder: Path, table: str) -> list[Path]:
    """Return the Parquet files of a table, none if there is no such table.

    Raises:
        DataError: The table is there twice, or its folder has anything but Parquet files.
    """
    places = [place for place in (folder / f"{table}.parquet", folder / table) if place.exists()]
    if len(places) > 1:
        raise DataError(
            expected=f"one of {table}.parquet and {table}",
            got="both",
            where=str(folder),
            fix="remove one",
        )
    return [part for place in places for part in (list_parts(place) if place.is_dir() else [place])]


def _check_rule(connection: duckdb.DuckDBPyConnection, rule: Rule) -> Iterator[Violation]:
    """Yield the violation of a rule, if there is one."""
    query = f"SELECT count(*), any_value(wrong) FROM ({rule.rows}) AS wrong"
    count, example = connection.execute(query).fetchall()[0]
    if count:
        yield Violation(rule.table, rule.fault, count, _format(example))


def _check_files(connection: duckdb.DuckDBPyConnection, folder: Path) -> Iterator[Violation]:
    """Yield the violation of images or archives that are named and not there."""
    query = "SELECT file, count(*) FROM image_sources WHERE file IS NOT NULL GROUP BY file"
    named = sorted(connection.execute(f"{query} ORDER BY file").fetchall())
    # os.path has False where pathlib raises an error: for a name that is too long.
    missing = [each for each in named if not os.path.isfile(folder / each[0])]  # noqa: PTH113
    if missing:
        count = sum(count for _, count in missing)
        yield Violation("image_sources", "with a file that is missing", count, repr(missing[0][0]))


def _format(row: Mapping[str, Any]) -> str:
    """Return a row on one line, long texts shortened."""
    return ", ".join(f"{name} {str(value)[:60]!r}" for name, value in row.items())
