"""Raw files as views of text: CSV, TSV, JSON Lines or Parquet, every cell as it was written.

Nothing is guessed: no types, no header, no quoting. A cell keeps its leading zeros, and what does
not parse is an error that names its line.
"""

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import duckdb

from mllm_msr.errors import DataError
from mllm_msr.files import is_full_disk
from mllm_msr.params import PreprocessParams

LONGEST_LINE = 16_000_000  # bytes; a user with a million items on one line is half of it
CSV_FORM = f"auto_detect=false, comment='', strict_mode=true, max_line_size={LONGEST_LINE}"
JSON_TEXTS = ("VARCHAR", "BIGINT", "UBIGINT", "HUGEINT", "NULL")
PARQUET_TEXTS = re.compile(r"VARCHAR|ENUM.*|U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER")


@dataclass(frozen=True)
class RawFiles:
    """The files behind a reader's views, for errors to name, and what it left out of them."""

    interactions: Path
    items: Path
    timed: bool  # whether interactions carry timestamps, or only an order
    dropped: dict[str, int] = field(default_factory=dict)  # rows that the views lack, by reason


Reader = Callable[[duckdb.DuckDBPyConnection, Path, PreprocessParams], RawFiles]
"""Makes, of a publisher's folder, three views in which ``row`` counts a file's rows from 1:

- ``raw_interactions``: user, item, timestamp as texts; position and row as integers
- ``raw_items``: item, title, description as texts; row
- ``raw_images``: item; file, the path complete, and member, where the file is an archive, or url;
  row. All but row are texts

Settings that only one source has are in a section of ``preprocess`` with its name.
"""

Form = Callable[[duckdb.DuckDBPyConnection, Path, Sequence[str]], tuple[str, list[str]]]
"""Gives, of a file and the columns wanted, its rows in SQL and the columns that they have."""


def find_one(folder: Path, *patterns: str) -> Path:
    """Find the one file or folder whose name matches one of the patterns.

    Raises:
        DataError: There is no such folder, no match in it, or more than one.
    """
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"one {' or '.join(patterns)}",
        _names(found or folder.glob("*")) if folder.is_dir() else "no such folder",
        str(folder),
        "keep one of them" if found else "put the raw files there, see README.md",
    )


def view_records(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    file: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
) -> None:
    """Make a file's columns a view ``name`` of texts, with each row's number as ``row``.

    Rows are counted from 1, without header and blank lines. Empty cells and absent optional
    columns are null. The file's other columns are ignored.

    Raises:
        DataError: A required column is missing, or the file cannot be read. Broken lines further
            down only show when the view is read, see :func:`reading`.
    """
    wanted = [*required, *optional]
    with reading(file):
        form = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
        source, columns = FORMS[form](connection, file, wanted)
    missing = [column for column in required if column not in columns]
    if missing:
        raise DataError(
            f"the columns {', '.join(required)}",
            ", ".join(columns)[:200] or "an empty file",
            str(file),
            f"add {', '.join(missing)}",
        )
    cells = ", ".join(
        f"nullif({name_of(column) if column in columns else 'NULL'}::VARCHAR, '')"
        f" AS {name_of(column)}"
        for column in wanted
    )
    # A Parquet file knows its rows' numbers; counting them anew would read it on one core.
    row = "file_row_number + 1" if form == ".parquet" else "row_number() OVER ()"
    connection.execute(f"CREATE VIEW {name} AS SELECT {cells}, {row} AS row FROM {source}")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Say in one line what cannot be read of a raw file, and on which line.

    Raises:
        DataError: The block met such a place.
    """
    try:
        yield
    except (duckdb.Error, csv.Error, gzip.BadGzipFile, zlib.error, EOFError) as error:
        if is_full_disk(error) or isinstance(error, duckdb.InterruptException):
            raise
        line, reason = _broken_line(file) if file.suffix == ".jsonl" else _broken_csv(str(error))
        raise DataError(
            f"a well-formed {file.suffix[1:]} file in UTF-8",
            reason or str(error)[:200],
            f"{file}, line {line}" if line else str(file),
            "download it again" if file.suffix == ".gz" else "correct it or export it again",
        ) from error


def opened(file: Path) -> IO[bytes]:
    """Open a raw file to read its bytes; those of a gzip file are unpacked."""
    return cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def refuse_mark(file: Path) -> None:
    """Refuse JSON Lines with a byte order mark: DuckDB would take the first record for broken.

    Raises:
        DataError: There is one, or the file cannot be read.
    """
    with reading(file), opened(file) as stream:
        if stream.read(3) == b"\xef\xbb\xbf":
            raise DataError(
                "JSON Lines without a byte order mark",
                "one",
                f"{file}, line 1",
                "remove the file's first three bytes",
            )


def first_row(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...] | None:
    """Run a query to its end and give its first row, if it has one."""
    return next(iter(connection.execute(query).fetchall()), None)


def literal(text: str | Path) -> str:
    """Write a text as an SQL literal."""
    return "'" + str(text).replace("'", "''") + "'"


def name_of(column: str) -> str:
    """Write a column's name in SQL."""
    return '"' + column.replace('"', '""') + '"'


def _csv(
    _: duckdb.DuckDBPyConnection, file: Path, wanted: Sequence[str], delimiter: str = ","
) -> tuple[str, list[str]]:
    """Take the header ourselves: DuckDB skips lines until it finds one to its liking."""
    with io.TextIOWrapper(opened(file), "utf-8-sig", "replace", newline="") as stream:
        columns = next(csv.reader(stream, delimiter=delimiter), [])
    if "\ufffd" in "".join(columns) or not "".join(columns).isprintable():
        raise csv.Error("no header in UTF-8, but other bytes")
    padded = [name for name in columns if name.strip() in wanted and name not in wanted]
    if padded:
        raise DataError(
            "names of columns without spaces around them",
            repr(padded[0]),
            f"{file}, header",
            "remove the spaces at the separators, in all lines: ids would keep theirs",
        )
    repeated = [column for column in columns if columns.count(column) > 1]
    if repeated:
        raise DataError(
            "every column once", f"{repeated[0]} again", str(file), "rename or remove one"
        )
    types = ", ".join(f"{literal(column)}: 'VARCHAR'" for column in columns)
    source = (
        f"read_csv({literal(file)}, {CSV_FORM}, header=true, delim={literal(delimiter)},"
        f" quote='\"', escape='\"', columns={{{types}}})"
    )
    return source, columns


def _tsv(
    connection: duckdb.DuckDBPyConnection, file: Path, wanted: Sequence[str]
) -> tuple[str, list[str]]:
    return _csv(connection, file, wanted, delimiter="\t")


def _jsonl(
    connection: duckdb.DuckDBPyConnection, file: Path, wanted: Sequence[str]
) -> tuple[str, list[str]]:
    """Take the wanted keys; lists, objects, truth values and 1.0 have no one text: refused.

    A key that no line has is no column: a file of other things would else be one of nulls.
    """
    refuse_mark(file)
    types = ", ".join(f"{literal(column)}: 'JSON'" for column in wanted)
    source = (
        f"read_json({literal(file)}, format='newline_delimited', records=true, columns={{{types}}})"
    )
    kinds = ", ".join(
        f"{{'name': {literal(column)}, 'kind': json_type({name_of(column)}),"
        f" 'value': {name_of(column)}::VARCHAR}}"
        for column in wanted
    )
    wrong = first_row(
        connection,
        f"SELECT row, cell.name, cell.value FROM"
        f" (SELECT row_number() OVER () AS row, unnest([{kinds}]) AS cell FROM {source})"
        f" WHERE cell.kind NOT IN {JSON_TEXTS} ORDER BY row LIMIT 1",
    )
    if wrong:
        row, column, value = wrong
        raise DataError(
            "a text or an integer", f"{value[:80]!r}", f"{file}, row {row}, {column}", "correct it"
        )
    texts = ", ".join(f"{name_of(column)}->>'$' AS {name_of(column)}" for column in wanted)
    return f"(SELECT {texts} FROM {source})", _find_keys(connection, file, source, wanted)


def _find_keys(
    connection: duckdb.DuckDBPyConnection, file: Path, source: str, wanted: Sequence[str]
) -> list[str]:
    """Give the keys of the first line, and those of the wanted ones that any line has values of."""
    with file.open("rb") as stream:
        first = next(filter(bytes.strip, stream), None)
    if first is None:
        return list(wanted)  # not a column is missing, but everything
    counts = ", ".join(f"count({name_of(column)})" for column in wanted)
    found = first_row(connection, f"SELECT {counts} FROM {source}") or ()
    given = [column for column, count in zip(wanted, found, strict=True) if count]
    return list(dict.fromkeys([*json.loads(first), *given]))


def _parquet(
    connection: duckdb.DuckDBPyConnection, file: Path, wanted: Sequence[str]
) -> tuple[str, list[str]]:
    """Refuse types without one text for each value, such as 1.0 for an id."""
    source = f"read_parquet({literal(file)})"
    described = connection.execute(f"DESCRIBE FROM {source}").fetchall()
    types = {name: kind for name, kind, *_ in described}
    for column in wanted:
        if not PARQUET_TEXTS.fullmatch(types.get(column, "VARCHAR")):
            raise DataError(
                "texts or integers",
                types[column],
                f"{file}, column {column}",
                "write ids as texts and timestamps as integers, milliseconds since 1970",
            )
    return f"read_parquet({literal(file)}, file_row_number=true)", list(types)


FORMS: dict[str, Form] = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}


def _broken_line(file: Path) -> tuple[int | None, str]:
    """Find the first line that is no JSON object; DuckDB's own count is off by one."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return number, "no object"
            except ValueError as error:
                return number, str(error)
    return None, ""


def _broken_csv(message: str) -> tuple[str | None, str]:
    """Take line and reason out of DuckDB's page of advice."""
    line = re.search(r"CSV Error on Line: (\d+)", message)
    if "invalid state" in message:
        return line and line[1], "line ends of more than one kind, or a stray quote"
    facts = re.split(r"\n\s*\n?(?:Possible|LINE)", message)[0].strip().splitlines()
    return line and line[1], facts[-1].strip()[:200]


def _names(paths: Iterable[Path]) -> str:
    """Name a few files."""
    names = sorted(path.name for path in paths)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "") or "nothing"
