"""Raw files (CSV, TSV, JSON Lines, Parquet) as tables and views of text.

Text is parsed once, into a table of the database, which spills to disk; Parquet is read through a
view, because decoding its columns again costs less than storing them.

Types, header and quoting are not guessed. Every cell is the text in the file, leading zeros
included, and a line that does not parse is an error that names it.
"""

import contextlib
import csv
import gzip
import io
import json
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import duckdb
import pyarrow as arrow
import pyarrow.parquet

from mllm_msr.core.errors import DataError
from mllm_msr.core.files import (
    UnreadableFileError,
    duckdb_path,
    is_full_disk,
    open_regular,
    open_zip,
)
from mllm_msr.core.params import PreprocessParams

MAX_LINE_BYTES = 16_000_000  # a user with a million items on one line needs half of it
CSV_FORM = f"auto_detect=false, comment='', strict_mode=true, max_line_size={MAX_LINE_BYTES}"
JSON_TEXTS = ("VARCHAR", "BIGINT", "UBIGINT", "HUGEINT", "NULL")
PARQUET_TEXTS = re.compile(r"VARCHAR|ENUM.*|U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|\"NULL\"")
PARQUET_TIMES = re.compile(r"DATE|TIMESTAMP.*")
PARQUET_NUMBERS = re.compile(r"FLOAT|DOUBLE|DECIMAL.*")
BLANK = b" \t\r\n"  # what DuckDB skips between records of JSON Lines
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class RawFiles:
    """A reader's result: the files behind its views, for errors, and its dropped rows."""

    interactions: Path
    items: Path
    timed: bool  # whether interactions have timestamps, or only an order
    unit: Literal["milliseconds", "seconds", "iso8601"] = "milliseconds"  # of the timestamps
    unit_setting: str | None = None  # the setting of the unit, if there is one
    dropped: dict[str, int] = field(default_factory=dict)  # dropped rows by reason


Reader = Callable[[duckdb.DuckDBPyConnection, Path, PreprocessParams], RawFiles]
"""A function that creates four views of a publisher's folder. ``row`` counts a file's rows from 1:

- ``raw_interactions``: user, item, timestamp as text; position and row as integers
- ``raw_items``: item, title, description as text; row
- ``raw_images``: item; file, a path, and member, its name if the file is an archive, or url; row.
  All but row are text
- ``raw_dropped``: user, item of the interactions that a setting drops; both may be null

Settings of a single source are in a section of ``preprocess`` with the source's name.
"""


class Rows(NamedTuple):
    """How to select the rows of a file.

    Attributes:
        columns: The names of the file's columns.
        cells: SQL for the text of a column, by its name in the file.
        row: SQL for the row's number, counted from 1.
        source: SQL for what is selected from.
    """

    columns: list[str]
    cells: Mapping[str, str]
    row: str
    source: str


Form = Callable[[duckdb.DuckDBPyConnection, str, Path, Mapping[str, str]], Rows]
"""A function that returns how to select a file's rows.

Its text is the name of the records, for a table that it may create. Its mapping has the wanted
columns: our names, each with the name in the file.
"""


def find_single_file(
    folder: Path, *patterns: str, fix: str = "put the raw files there, see docs/datasets.md"
) -> Path:
    """Return the only file or folder whose name matches one of the patterns.

    Args:
        folder: The folder to search.
        patterns: Glob patterns of the name.
        fix: What to do if there is none.

    Raises:
        DataError: The folder is missing, or it has no match or more than one.
    """
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if len(found) == 1:
        return found[0]
    raise DataError(
        expected=f"one {' or '.join(patterns)}",
        got=_list_names(found or folder.glob("*")) if folder.is_dir() else "no such folder",
        where=str(folder),
        fix="keep one of them" if found else fix,
    )


def find_named_file(folder: Path, name: str, setting: str) -> Path:
    """Return the file that a setting names, without treating the name as a pattern.

    Raises:
        DataError: There is no such file.
    """
    file = folder / name
    if file.exists():
        return file
    raise DataError(
        expected=f"the file {name}",
        got=_list_names(folder.iterdir()) if folder.is_dir() else "no such folder",
        where=str(folder),
        fix=f"put it there, or correct {setting}",
    )


def view_records(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    file: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    setting: str = "",
    parse_once: bool = True,
) -> None:
    """Create a table or view ``name`` of a file's columns as text, with the row number as ``row``.

    Rows are counted from 1, without header and blank lines. Empty cells and absent optional
    columns are null. Other columns of the file are ignored.

    Args:
        connection: The database.
        name: The table's or view's name.
        file: CSV, TSV or JSON Lines, plain or gzip; Parquet, or a folder of Parquet files.
        required: Required columns, by our names.
        optional: Optional columns. One that ``names`` gives another name is required.
        names: The names of columns in the file, by our names; None if they are the same.
        setting: The setting that defines the names, for errors.
        parse_once: Whether CSV and TSV are parsed here, into a table. False for a caller that reads
            the records once: malformed lines are then only found when the view is read, see
            :func:`explain_read_errors`.

    Raises:
        DataError: A required column is missing, or the file is malformed or cannot be read.
    """
    wanted = {column: (names or {}).get(column, column) for column in (*required, *optional)}
    form = FORMS.get(_find_format(file))
    if form is None:
        raise DataError(
            expected=f"a file whose name ends in {', '.join(FORMS)}",
            got=file.name,
            where=str(file),
            fix="rename it",
        )
    if file.is_dir() and form is not _parquet:
        raise DataError(
            expected="a file",
            got="a folder",
            where=str(file),
            fix="join its parts into one file",
        )
    refuse_damaged_gzip(file)
    with explain_read_errors(file):
        rows = form(connection, name, file, wanted)
    needed = [given for ours, given in wanted.items() if ours in required or ours != given]
    missing = [column for column in dict.fromkeys(needed) if column not in rows.columns]
    if missing:
        raise DataError(
            expected=f"the columns {', '.join(needed)}",
            got=", ".join(rows.columns)[:200] or "an empty file",
            where=str(file),
            fix=f"add {', '.join(missing)}" + (f", or correct {setting}" if setting else ""),
        )
    if parse_once and form in (_csv, _tsv):
        with explain_read_errors(file):
            rows = _store(connection, f"{name}_text", rows, wanted)
    cells = ", ".join(
        f"nullif({rows.cells.get(given, 'NULL')}::VARCHAR, '') AS {quote_identifier(ours)}"
        for ours, given in wanted.items()
    )
    connection.execute(
        f"CREATE VIEW {name} AS SELECT {cells}, {rows.row} AS row FROM {rows.source}"
    )


def _store(
    connection: duckdb.DuckDBPyConnection, table: str, rows: Rows, wanted: Mapping[str, str]
) -> Rows:
    """Create a table of the wanted columns; return how to select the same rows from it."""
    found = [name for name in dict.fromkeys(wanted.values()) if name in rows.cells]
    cells = "".join(f"{rows.cells[name]} AS cell{n}, " for n, name in enumerate(found))
    connection.execute(
        f"CREATE TABLE {table} AS SELECT {cells}{rows.row} AS row FROM {rows.source}"
    )
    texts = {name: hide_statistics(f"cell{n}") for n, name in enumerate(found)}
    return Rows(rows.columns, texts, "row", table)


@contextlib.contextmanager
def explain_read_errors(file: Path) -> Iterator[None]:
    """Turn an error while reading a raw file into a one-line error with the line's number.

    Raises:
        DataError: The block could not read the file.
    """
    try:
        yield
    except (duckdb.Error, arrow.ArrowException, csv.Error, gzip.BadGzipFile, zlib.error) as error:
        if not is_fault_of_file(error):
            raise
        line, reason = _parse_duckdb_error(str(error))
        raise DataError(
            expected=f"a well-formed {file.suffix[1:]} file in UTF-8",
            got=reason,
            where=f"{file}, line {line}" if line else str(file),
            fix="download it again" if file.suffix == ".gz" else "correct it or export it again",
        ) from error


def is_fault_of_file(error: Exception) -> bool:
    """Return whether a file is to blame for an error while reading it, not disk, memory or user."""
    others = (duckdb.InterruptException, duckdb.OutOfMemoryException)
    return not (is_full_disk(error) or isinstance(error, others))


def text_file(file: Path) -> str:
    """Return the SQL arguments with which DuckDB's CSV and JSON readers read exactly this file.

    The compression is explicit, because DuckDB ignores a suffix after a question mark. Hive
    partitioning is off; otherwise a folder ``user=7`` becomes a column.
    """
    compression = "gzip" if file.suffix == ".gz" else "none"
    return (
        f"{quote_literal(duckdb_path(file))}, compression='{compression}', hive_partitioning=false"
    )


def refuse_damaged_gzip(file: Path) -> None:
    """Verify the checksums of a gzip file, which DuckDB does not; do nothing for other files.

    This takes an extra pass over the file, about four seconds per uncompressed GB.

    Raises:
        DataError: A checksum or length is wrong, the file is truncated, or has trailing data.
    """
    if file.suffix != ".gz":
        return
    try:
        with gzip.open(file) as stream:
            while stream.read(CHUNK):
                pass
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(
            expected="a valid gzip file",
            got=f"a damaged one ({error})",
            where=str(file),
            fix="download it again",
        ) from error


def list_zip(archive: Path, folder: Path) -> list[str]:
    """Return the names of a zip archive's files.

    Args:
        archive: The archive.
        folder: The folder in which it must lie, links resolved.

    Raises:
        DataError: The archive is missing, outside the folder, or damaged.
    """
    try:
        with open_regular(archive, folder) as stream:
            return [info.filename for info in open_zip(stream).infolist() if not info.is_dir()]
    except UnreadableFileError as error:
        raise DataError(
            expected="a valid zip file", got=str(error), where=str(archive), fix=error.fix
        ) from error


def locate_row(file: Path, row: int) -> str:
    """Return where a row is, for errors: its file, or part of a folder of files, and its number."""
    if not file.is_dir():
        return f"{file}, row {row}"
    before = 0
    for part in list_parts(file):
        rows = arrow.parquet.read_metadata(part.absolute()).num_rows
        if row <= before + rows:
            return f"{part}, row {row - before}"
        before += rows
    raise IndexError(row)


def find_line(file: Path, row: int) -> tuple[int, bytes]:
    """Return the line number of a record of JSON Lines, counted from 1, and the line."""
    with open_raw(file) as stream:
        filled = ((n, line) for n, line in enumerate(stream, start=1) if line.strip(BLANK))
        return next(islice(filled, row - 1, None))


def open_raw(file: Path) -> IO[bytes]:
    """Open a raw file for reading bytes; a gzip file is decompressed."""
    return cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def refuse_byte_order_mark(file: Path) -> None:
    """Refuse JSON Lines with a byte order mark, which DuckDB takes for a malformed record.

    Raises:
        DataError: The file has one.
    """
    with open_raw(file) as stream:
        if stream.read(3) == b"\xef\xbb\xbf":
            raise DataError(
                expected="JSON Lines without a byte order mark",
                got="one",
                where=f"{file}, line 1",
                fix="remove the file's first three bytes",
            )


def fetch_first(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...] | None:
    """Run a query to its end and return its first row, or None if it has none."""
    return next(iter(connection.execute(query).fetchall()), None)


def hide_statistics(text: str) -> str:
    """Return the SQL for a text without what DuckDB knows of its column; null becomes ''.

    From a table's statistics it would mark columns of the Parquet files as required, and equal rows
    from raw files of different forms would give other bytes.
    """
    return f"concat({text})"


def escape_file_name(name: str) -> str:
    """Return a file's name with bytes that are not UTF-8 escaped: no table can hold them."""
    return name.encode("utf-8", "backslashreplace").decode()


def quote_literal(text: str | Path) -> str:
    """Return a text as an SQL literal."""
    return "'" + str(text).replace("'", "''") + "'"


def quote_identifier(column: str) -> str:
    """Return a column's name quoted for SQL."""
    return '"' + column.replace('"', '""') + '"'


def _find_format(file: Path) -> str:
    """Return the suffix of a file's format, in lower case and without ``.gz``."""
    return (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()


def _csv(
    _connection: duckdb.DuckDBPyConnection,
    _name: str,
    file: Path,
    wanted: Mapping[str, str],
    delimiter: str = ",",
) -> Rows:
    """Parse the header in Python, because DuckDB skips lines until one looks like a header.

    DuckDB gets the columns as c0, c1, ..., because it cannot tell ``title`` from ``Title``.
    """
    # Only the header must be UTF-8 here: surrogates mark bytes that are not.
    with io.TextIOWrapper(open_raw(file), "utf-8-sig", "surrogateescape", newline="") as stream:
        lines = csv.reader(stream, delimiter=delimiter)
        columns = next(lines, [])
    if lines.line_num and len(columns) < 2 and not "".join(columns).strip():
        raise DataError(
            expected="a header with the names of the columns",
            got="a blank first line",
            where=f"{file}, line 1",
            fix="remove the line",
        )
    if any(unicodedata.category(char) == "Cs" or char == "\0" for char in "".join(columns)):
        raise csv.Error("no header in UTF-8, but other bytes")
    names = set(wanted.values())
    padded = [name for name in columns if name.strip() in names and name not in names]
    if padded:
        raise DataError(
            expected="names of columns without spaces around them",
            got=repr(padded[0]),
            where=f"{file}, header",
            fix="remove the spaces around the separators in all lines; ids would keep theirs",
        )
    _refuse_repeated(columns, wanted, file)
    types = ", ".join(f"'c{index}': 'VARCHAR'" for index in range(len(columns)))
    cells = {name: f"c{index}" for index, name in enumerate(columns)}
    source = (
        f"read_csv({text_file(file)}, {CSV_FORM}, header=true,"
        f" delim={quote_literal(delimiter)}, quote='\"', escape='\"', columns={{{types}}})"
    )
    return Rows(columns, cells, "row_number() OVER ()", source)


def _tsv(
    connection: duckdb.DuckDBPyConnection, name: str, file: Path, wanted: Mapping[str, str]
) -> Rows:
    return _csv(connection, name, file, wanted, delimiter="\t")


def _jsonl(
    connection: duckdb.DuckDBPyConnection, name: str, file: Path, wanted: Mapping[str, str]
) -> Rows:
    """Extract the wanted keys into a table ``<name>_cells``.

    Lists, objects, booleans and 1.0 are refused, because their text is ambiguous. A key that no
    line has is a missing column; otherwise a wrong file would be a table of nulls.
    """
    refuse_byte_order_mark(file)
    cells = {key: f"cell{index}" for index, key in enumerate(dict.fromkeys(wanted.values()))}
    extracted = ", ".join(
        f"json_extract(json, {quote_literal(_pointer(key))}) AS {cell}"
        for key, cell in cells.items()
    )
    # With ignore_errors a malformed line is null; DuckDB's own error would name another line.
    connection.execute(
        f"""CREATE TABLE {name}_cells AS
        SELECT row, json_type(json) AS record, CASE WHEN row = 1 THEN json_keys(json) END AS keys,
            {extracted}
        FROM (SELECT row_number() OVER () AS row, json FROM read_json_objects(
            {text_file(file)}, format='newline_delimited', ignore_errors=true))"""
    )
    _refuse_wrong_records(connection, file, f"{name}_cells", cells)
    counts = ", ".join(f"count({cell})" for cell in cells.values())
    first, *found = fetch_first(
        connection, f"SELECT any_value(keys), {counts} FROM {name}_cells"
    ) or [None]
    if first is None:  # no rows: cleaning refuses it
        return Rows(list(cells), cells, "row", f"{name}_cells")
    given = [key for key, count in zip(cells, found, strict=True) if count]
    texts = {key: f"({cells[key]}->>'$')" for key in given}
    return Rows(list(dict.fromkeys([*first, *given])), texts, "row", f"{name}_cells")


def _refuse_wrong_records(
    connection: duckdb.DuckDBPyConnection, file: Path, table: str, cells: Mapping[str, str]
) -> None:
    """Refuse the first line that is no object, or has a cell that is neither text nor integer."""
    found = ", ".join(
        f"{{'name': {quote_literal(name)}, 'kind': json_type({cell}), 'value': {cell}::VARCHAR}}"
        for name, cell in cells.items()
    )
    # DuckDB gives an integer of more than 64 bits the type of a fraction, but keeps its digits.
    wrong = fetch_first(
        connection,
        f"""SELECT row, cell.name, cell.value FROM (
            SELECT row, record, unnest([{found}]) AS cell FROM {table}
        ) WHERE coalesce(record <> 'OBJECT', true) OR (cell.kind NOT IN {JSON_TEXTS}
            AND NOT regexp_full_match(cell.value, '-?[0-9]+')) ORDER BY row LIMIT 1""",
    )
    if not wrong:
        return
    row, column, value = wrong
    if value is None:
        number, line = find_line(file, row)
        raise DataError(
            expected="a well-formed jsonl file in UTF-8",
            got=_json_fault(line),
            where=f"{file}, line {number}",
            fix="correct it or export it again",
        )
    raise DataError(
        expected="a text or an integer",
        got=f"{value[:80]!r}",
        where=f"{file}, row {row}, {column}",
        fix="correct it",
    )


def _json_fault(line: bytes) -> str:
    """Return why a line is no JSON object; Python accepts some lines that DuckDB does not."""
    try:
        value = json.loads(line.decode())
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair, such as \\ud800"
    except RecursionError:
        return "too many levels"
    except ValueError as error:
        return str(error)
    return "invalid JSON" if isinstance(value, dict) else "no object"


def _pointer(key: str) -> str:
    """Return a key as a JSON pointer."""
    return "/" + key.replace("~", "~0").replace("/", "~1")


def _parquet(
    connection: duckdb.DuckDBPyConnection, _name: str, file: Path, wanted: Mapping[str, str]
) -> Rows:
    """Read a Parquet file, or the parts of a folder in order."""
    columns: list[str] = []
    queries: list[str] = []
    before = 0
    for part in list_parts(file) if file.is_dir() else [file]:
        names, rows, query = _parquet_part(connection, part, wanted, before)
        if queries and names != columns:
            raise DataError(
                expected=f"the columns {', '.join(columns)[:200]}, as in the first part",
                got=", ".join(names)[:200],
                where=str(part),
                fix="write all parts again with the same columns",
            )
        columns, before = names, before + rows
        queries.append(query)
    cells = {name: quote_identifier(ours) for ours, name in wanted.items()}
    return Rows(columns, cells, "row", f"({' UNION ALL '.join(queries)})")


def _parquet_part(
    connection: duckdb.DuckDBPyConnection, file: Path, wanted: Mapping[str, str], before: int
) -> tuple[list[str], int, str]:
    """Return a file's columns, its number of rows, and SQL whose ``row`` continues ``before``.

    Types whose text is ambiguous are refused, such as 1.0 for an id.
    """
    columns, rows = _check_pages(file, wanted)
    _refuse_repeated(columns, wanted, file)
    source = f"read_parquet({quote_literal(duckdb_path(file))}, hive_partitioning=false"
    described = connection.execute(f"DESCRIBE FROM {source})").fetchall()
    # DuckDB renames columns that differ only by case; their order is that of the file.
    types = {name: kind for name, (_, kind, *_) in zip(columns, described, strict=True)}
    for ours, name in wanted.items():
        kind = types.get(name, "VARCHAR")
        if not any(form.fullmatch(kind) for form in _allowed(ours)):
            raise DataError(
                expected="texts or integers",
                got=kind,
                where=f"{file}, column {name}",
                fix="write ids as text and timestamps as integers",
            )
    cells = {
        name: quote_identifier(alias) for name, (alias, *_) in zip(columns, described, strict=True)
    }
    # DuckDB's column file_row_number allows parallel reading, unlike row_number(). A column of the
    # file with the same name hides it.
    if any(name.lower() == "file_row_number" for name in columns):
        row = f"{before} + row_number() OVER ()"
    else:
        source, row = f"{source}, file_row_number=true", f"{before} + file_row_number + 1"
    return columns, rows, _select(wanted, cells, row, f"{source})")


def _allowed(column: str) -> tuple[re.Pattern[str], ...]:
    """Return patterns of the DuckDB types that one of our columns may have in Parquet."""
    more = {"timestamp": (PARQUET_TIMES,), "rating": (PARQUET_NUMBERS,)}
    return (PARQUET_TEXTS, *more.get(column, ()))


def _check_pages(file: Path, wanted: Mapping[str, str]) -> tuple[list[str], int]:
    """Verify a Parquet file by decoding its wanted columns; return its columns and rows.

    DuckDB does not verify page checksums. Spark writes them; pandas and DuckDB do not.

    Raises:
        DataError: The file is no Parquet file, or a page is damaged.
    """
    try:
        with arrow.parquet.ParquetFile(file.absolute(), page_checksum_verification=True) as opened:
            columns, rows = list(opened.schema_arrow.names), int(opened.metadata.num_rows)
            read = [name for name in dict.fromkeys(wanted.values()) if columns.count(name) == 1]
            for _ in opened.iter_batches(columns=read):
                pass
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            expected="a well-formed parquet file",
            got=str(error)[:200],
            where=str(file),
            fix="download it again or export it again",
        ) from error
    return columns, rows


def list_parts(folder: Path) -> list[Path]:
    """Return the files of a folder that Spark or Dask wrote, ordered by the numbers in their names.

    Files whose name starts with ``_`` or ``.`` are the writer's metadata and ignored.

    Raises:
        DataError: There are no Parquet files, or others too.
    """
    found = [path for path in folder.iterdir() if not path.name.startswith(("_", "."))]
    others = [path for path in found if path.suffix != ".parquet" or path.is_dir()]
    if others or not found:
        raise DataError(
            expected="a folder of Parquet files, not partitioned by a column",
            got=_list_names(others) if others else "none",
            where=str(folder),
            fix="write it again as one file, or without partitions",
        )
    numbers = re.compile(r"(\d+)")

    def key(path: Path) -> list[tuple[int, str]]:
        texts = numbers.split(path.name)
        return [(int(text) if index % 2 else 0, text) for index, text in enumerate(texts)]

    return sorted(found, key=key)


def _refuse_repeated(columns: Sequence[str], wanted: Mapping[str, str], file: Path) -> None:
    """Refuse a wanted column that occurs twice; other columns may."""
    repeated = [name for name in wanted.values() if columns.count(name) > 1]
    if repeated:
        raise DataError(
            expected="every column once",
            got=f"{repeated[0]} again",
            where=str(file),
            fix="rename or remove one",
        )


def _select(wanted: Mapping[str, str], cells: Mapping[str, str], row: str, source: str) -> str:
    """Return the SQL that selects the wanted columns under our names."""
    columns = ", ".join(
        f"{cells.get(name, 'NULL')}::VARCHAR AS {quote_identifier(ours)}"
        for ours, name in wanted.items()
    )
    return f"SELECT {columns}, {row} AS row FROM {source}"


FORMS: dict[str, Form] = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}


def _parse_duckdb_error(message: str) -> tuple[str | None, str]:
    """Return the line number, if any, and the reason from DuckDB's long error message."""
    line = re.search(r"CSV Error on Line: (\d+)", message)
    if "invalid state" in message:
        return line and line[1], "line ends of more than one kind, or a stray quote"
    facts = re.split(r"\n\s*\n?(?:Possible|LINE)", message)[0].strip().splitlines()
    return line and line[1], facts[-1].strip()[:200]


def _list_names(paths: Iterable[Path]) -> str:
    """Return the names of a few files, for errors."""
    names = sorted(path.name for path in paths)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "") or "nothing"
