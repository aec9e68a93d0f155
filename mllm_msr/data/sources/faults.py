"""Bad records of JSON Lines files: found, then dropped and counted, or refused.

Files of tens of millions of lines have some bad ones. DuckDB marks each bad record with its first
fault in the pass that reads the file; Python reads only the line that an error or warning shows.
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
from mllm_msr.data.sources.parsing import (
    fetch_first,
    find_line,
    open_raw,
    quote_identifier,
    quote_literal,
    refuse_byte_order_mark,
    refuse_damaged_gzip,
    text_file,
)

log = logging.getLogger(__name__)


def view_objects(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    file: Path,
    kinds: Mapping[str, Sequence[str]],
) -> None:
    """Create a view ``name`` of some fields of a file with one JSON object per line.

    Its columns are ``row``, counted from 1 without blank lines; ``fault``, the first field of a
    wrong type, ``json`` if the line is no object, or null; and the fields as JSON.

    Args:
        connection: The database.
        name: The view's name.
        file: JSON Lines, plain or gzip.
        kinds: The allowed results of DuckDB's ``json_type`` for each field; an absent field has
            the type ``NULL``.

    Raises:
        DataError: The file starts with a byte order mark, or is a damaged gzip file.
    """
    refuse_damaged_gzip(file)
    refuse_byte_order_mark(file)
    paths = ", ".join(quote_literal(f"$.{quote_identifier(field)}") for field in kinds)
    wrong = "".join(
        f" WHEN coalesce(json_type(cells[{index}]), 'NULL') NOT IN {_list_literals(allowed)}"
        f" THEN {quote_literal(field)}"
        for index, (field, allowed) in enumerate(kinds.items(), start=1)
    )
    cells = ", ".join(
        f"cells[{place}] AS {quote_identifier(field)}" for place, field in enumerate(kinds, start=1)
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
    """Count a table's bad records by fault, with a warning that names the first of each.

    Args:
        connection: The database.
        table: A table with the columns ``row`` and ``fault``, named after its records.
        file: The file of the records.
        expected: What is expected instead, for each fault that makes a record bad.
        drop: Whether bad records are dropped; otherwise they are an error.

    Returns:
        Bad records by reason, such as ``reviews_with_bad_rating``; only counts above 0.

    Raises:
        DataError: There is a bad record and ``drop`` is false, or all records are bad.
    """
    found = connection.execute(
        f"SELECT fault, count(*), min(row) FROM {table} WHERE fault IN {_list_literals(expected)}"
        " GROUP BY fault ORDER BY 3"
    ).fetchall()
    (total,) = fetch_first(connection, f"SELECT count(*) FROM {table}") or (0,)
    if not total:
        raise DataError(
            expected="at least one row", got="none", where=str(file), fix="use the complete file"
        )
    if found and (not drop or sum(count for _, count, _ in found) == total):
        fault, _, row = found[0]
        fix = (
            "replace it: this looks like another file"
            if drop
            else "correct it, or set preprocess.amazon.bad_records to drop"
        )
        raise _bad_record(file, row, fault, expected[fault], fix)
    for fault, count, row in found:
        where, _ = find_record(file, row)
        log.warning("dropped %s %s with bad %s, the first in %s", count, table, fault, where)
    return {f"{table}_with_bad_{fault}": count for fault, count, _ in found}


def _bad_record(file: Path, row: int, fault: str, expected: str, fix: str) -> DataError:
    """Return the error for a bad record, with its wrong field or the start of its line."""
    where, line = find_record(file, row)
    record: dict[str, object] = {}
    with contextlib.suppress(ValueError, RecursionError):  # stricter than DuckDB's parser
        record = {} if fault == "json" else json.loads(line)
    if fault in record:
        got = f"{fault} {json.dumps(record[fault])[:80]}"
    else:
        got = f"no {fault} but {', '.join(record)[:120]}" if record else repr(line[:80])
    return DataError(expected=expected, got=got, where=where, fix=fix)


def find_record(file: Path, row: int) -> tuple[str, str]:
    """Return where a record is, for errors, and its text (a CSV row as JSON)."""
    if ".csv" in file.suffixes:
        with open_raw(file) as stream:
            rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
            return f"{file}, row {row}", json.dumps(next(islice(rows, row - 1, None)))
    number, line = find_line(file, row)
    return f"{file}, line {number}", line.decode(errors="replace").strip()


def _list_literals(names: Mapping[str, str] | Sequence[str]) -> str:
    """Return names as the right side of SQL's ``IN``."""
    return f"({', '.join(quote_literal(name) for name in names)})"
