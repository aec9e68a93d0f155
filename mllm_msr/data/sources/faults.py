"""Records of JSON Lines files, each with its first fault; faults are counted or they are errors.

In files of tens of millions of lines some are broken. DuckDB marks them in the pass that reads
the file; Python looks again only at the line that an error or a warning names.
"""

import contextlib
import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import duckdb

from mllm_msr.core.errors import DataError
from mllm_msr.data.sources.raw import (
    find_line,
    first_row,
    literal,
    name_of,
    opened,
    refuse_damaged_gzip,
    refuse_mark,
    text_file,
)

log = logging.getLogger(__name__)


def view_objects(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    file: Path,
    kinds: Mapping[str, Sequence[str]],
) -> None:
    """Make a file of one JSON object per line a view ``name`` of some of their fields.

    Args:
        connection: Where the view is made.
        name: The view's name.
        file: JSON Lines, plain or gzip.
        kinds: For each field, the types that ``json_type`` may give; ``NULL`` is also what an
            absent field has.

    The view's columns are ``row``, from 1 without blank lines; ``fault``, the first field of
    another kind, or ``json`` where the line is no object, or null; and the fields as JSON.

    Raises:
        DataError: The file starts with a byte order mark, or is a damaged gzip file.
    """
    refuse_damaged_gzip(file)
    refuse_mark(file)
    paths = ", ".join(literal(f"$.{name_of(field)}") for field in kinds)
    wrong = "".join(
        f" WHEN coalesce(json_type(cells[{place}]), 'NULL') NOT IN {_choice(allowed)}"
        f" THEN {literal(field)}"
        for place, (field, allowed) in enumerate(kinds.items(), start=1)
    )
    cells = ", ".join(
        f"cells[{place}] AS {name_of(field)}" for place, field in enumerate(kinds, start=1)
    )
    connection.execute(
        f"""CREATE VIEW {name} AS
        SELECT row, CASE WHEN kind <> 'OBJECT' THEN 'json'{wrong} END AS fault, {cells} FROM (
            SELECT row_number() OVER () AS row, coalesce(json_type(json), 'NULL') AS kind,
                json_extract(json, [{paths}]) AS cells
            FROM read_json_objects(
                {text_file(file)}, format='newline_delimited', ignore_errors=true)
        )"""
    )


def count_faults(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    file: Path,
    expected: Mapping[str, str],
    drop: bool,
) -> dict[str, int]:
    """Count a table's bad records by fault, and name the first of each.

    Args:
        connection: Where the table is.
        table: A table with the columns ``row`` and ``fault``; it names the records, as ``reviews``.
        file: Where the records come from.
        expected: The faults that make a record bad, each with what is expected instead.
        drop: Whether bad records are only counted, or are an error.

    Returns:
        How many records have each fault, as ``reviews_with_bad_rating``; faults without records
        are left out.

    Raises:
        DataError: There is a bad record and it must not be dropped, or no record is good.
    """
    found = connection.execute(
        f"SELECT fault, count(*), min(row) FROM {table} WHERE fault IN {_choice(expected)}"
        " GROUP BY fault ORDER BY 3"
    ).fetchall()
    (total,) = first_row(connection, f"SELECT count(*) FROM {table}") or (0,)
    if not total:
        raise DataError(
            expected="at least one row", got="none", where=str(file), fix="put the whole file there"
        )
    if found and (not drop or sum(count for _, count, _ in found) == total):
        fault, _, row = found[0]
        fix = (
            "put the file there that belongs there: this looks like another one"
            if drop
            else "correct it, or set preprocess.amazon.bad_records to drop"
        )
        raise _bad_record(file, row, fault, expected[fault], fix)
    for fault, count, row in found:
        where, _ = find_record(file, row)
        log.warning("dropped %s %s with bad %s, the first in %s", count, table, fault, where)
    return {f"{table}_with_bad_{fault}": count for fault, count, _ in found}


def _bad_record(file: Path, row: int, fault: str, expected: str, fix: str) -> DataError:
    """Show the field that is wrong, or the start of a line that is no object."""
    where, line = find_record(file, row)
    record: dict[str, object] = {}
    with contextlib.suppress(ValueError, RecursionError):  # DuckDB knows no such bounds
        record = {} if fault == "json" else json.loads(line)
    if fault in record:
        got = f"{fault} {json.dumps(record[fault])[:80]}"
    else:
        got = f"no {fault} but {', '.join(record)[:120]}" if record else repr(line[:80])
    return DataError(expected=expected, got=got, where=where, fix=fix)


def find_record(file: Path, row: int) -> tuple[str, str]:
    """Give a record's place and its line, of CSV as JSON; lines are counted from 1."""
    if ".csv" in file.suffixes:
        with opened(file) as stream:
            rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
            return f"{file}, row {row}", json.dumps(next(islice(rows, row - 1, None)))
    number, line = find_line(file, row)
    return f"{file}, line {number}", line.decode(errors="replace").strip()


def _choice(names: Mapping[str, str] | Sequence[str]) -> str:
    """Write names as the right side of SQL's ``IN``."""
    return f"({', '.join(literal(name) for name in names)})"
