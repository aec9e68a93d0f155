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
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, cast

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

LONGEST_LINE = 16_000_000  # bytes; a user with a million items on one line is half of it
CSV_FORM = f"auto_detect=false, comment='', strict_mode=true, max_line_size={LONGEST_LINE}"
JSON_TEXTS = ("VARCHAR", "BIGINT", "UBIGINT", "HUGEINT", "NULL")
PARQUET_TEXTS = re.compile(r"VARCHAR|ENUM.*|U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|\"NULL\"")
PARQUET_TIMES = re.compile(r"DATE|TIMESTAMP.*")
PARQUET_NUMBERS = re.compile(r"FLOAT|DOUBLE|DECIMAL.*")
BLANK = b" \t\r\n"  # what DuckDB skips between records of JSON Lines
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class RawFiles:
    """The files behind a reader's views, for errors to name, and what it left out of them."""

    interactions: Path
    items: Path
    timed: bool  # whether interactions carry timestamps, or only an order
    unit: Literal["milliseconds", "seconds", "iso8601"] = "milliseconds"  # of the timestamps
    unit_setting: str | None = None  # the setting that names the unit, where there is one
    dropped: dict[str, int] = field(default_factory=dict)  # rows that the views lack, by reason


Reader = Callable[[duckdb.DuckDBPyConnection, Path, PreprocessParams], RawFiles]
"""Makes, of a publisher's folder, four views in which ``row`` counts a file's rows from 1:

- ``raw_interactions``: user, item, timestamp as texts; position and row as integers
- ``raw_items``: item, title, description as texts; row
- ``raw_images``: item; file, the path complete, and member, where the file is an archive, or url;
  row. All but row are texts
- ``raw_dropped``: user, item of the interactions that a setting leaves out; both may be null

Settings that only one source has are in a section of ``preprocess`` with its name.
"""

Form = Callable[[duckdb.DuckDBPyConnection, Path, Mapping[str, str]], tuple[list[str], str]]
"""Gives the names of a file's columns, and SQL for its rows.

It gets our names of the wanted columns, each with the file's own name. The SQL's columns have our
names and are texts, null where the file lacks the column; ``row`` counts from 1.
"""


def find_one(
    folder: Path, *patterns: str, fix: str = "put the raw files there, see docs/datasets.md"
) -> Path:
    """Find the one file or folder whose name matches one of the patterns.

    Args:
        folder: Where it is.
        patterns: Of its name.
        fix: What to do where there is none.

    Raises:
        DataError: There is no such folder, no match in it, or more than one.
    """
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if len(found) == 1:
        return found[0]
    raise DataError(
        expected=f"one {' or '.join(patterns)}",
        got=_names(found or folder.glob("*")) if folder.is_dir() else "no such folder",
        where=str(folder),
        fix="keep one of them" if found else fix,
    )


def find_named(folder: Path, name: str, setting: str) -> Path:
    """Find the file that a setting names, whatever characters it has.

    Raises:
        DataError: There is no such file.
    """
    file = folder / name
    if file.exists():
        return file
    raise DataError(
        expected=f"the file {name}",
        got=_names(folder.iterdir()) if folder.is_dir() else "no such folder",
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
) -> None:
    """Make a file's columns a view ``name`` of texts, with each row's number as ``row``.

    Rows are counted from 1, without header and blank lines. Empty cells and absent optional
    columns are null. The file's other columns are ignored.

    Args:
        connection: Where the view is made.
        name: The view's name.
        file: CSV, TSV or JSON Lines, plain or gzip; Parquet, or a folder of Parquet files.
        required: Columns that must be there, by our names.
        optional: Columns that may be there. Under a name other than ours they must.
        names: The file's own names of columns, by ours; without it they are the same.
        setting: The setting that the names come from, for errors.

    Raises:
        DataError: A required column is missing, or the file cannot be read. Broken lines further
            down only show when the view is read, see :func:`reading`.
    """
    wanted = {column: (names or {}).get(column, column) for column in (*required, *optional)}
    form = FORMS.get(_form(file))
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
            fix="put its parts together into one file",
        )
    refuse_damaged_gzip(file)
    with reading(file):
        columns, query = form(connection, file, wanted)
    needed = [given for ours, given in wanted.items() if ours in required or ours != given]
    missing = [column for column in dict.fromkeys(needed) if column not in columns]
    if missing:
        raise DataError(
            expected=f"the columns {', '.join(needed)}",
            got=", ".join(columns)[:200] or "an empty file",
            where=str(file),
            fix=f"add {', '.join(missing)}" + (f", or correct {setting}" if setting else ""),
        )
    cells = ", ".join(f"nullif({name_of(ours)}, '') AS {name_of(ours)}" for ours in wanted)
    connection.execute(f"CREATE VIEW {name} AS SELECT {cells}, row FROM ({query})")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Say in one line what cannot be read of a raw file, and on which line.

    Raises:
        DataError: The block met such a place.
    """
    try:
        yield
    except (duckdb.Error, arrow.ArrowException, csv.Error, gzip.BadGzipFile, zlib.error) as error:
        if is_full_disk(error) or isinstance(error, duckdb.InterruptException):
            raise
        line, reason = _broken_csv(str(error))
        raise DataError(
            expected=f"a well-formed {file.suffix[1:]} file in UTF-8",
            got=reason,
            where=f"{file}, line {line}" if line else str(file),
            fix="download it again" if file.suffix == ".gz" else "correct it or export it again",
        ) from error


def text_file(file: Path) -> str:
    """Write the arguments by which DuckDB's readers of CSV and JSON take a file for what it is.

    DuckDB looks for the suffix that names a compression only before the first question mark, and
    would make a column of a folder ``user=7``.
    """
    compression = "gzip" if file.suffix == ".gz" else "none"
    return f"{literal(duckdb_path(file))}, compression='{compression}', hive_partitioning=false"


def refuse_damaged_gzip(file: Path) -> None:
    """Read a gzip file to its end, which compares its checksums; DuckDB does not look at them.

    This takes a pass of its own, about four seconds per GB unpacked. Any other file is left alone.

    Raises:
        DataError: A checksum or a length is wrong, the file is cut short, or something follows.
    """
    if file.suffix != ".gz":
        return
    try:
        with gzip.open(file) as stream:
            while stream.read(CHUNK):
                pass
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(
            expected="a whole gzip file",
            got=f"a damaged one ({error})",
            where=str(file),
            fix="download it again",
        ) from error


def list_zip(archive: Path, folder: Path) -> list[str]:
    """List the names of a zip archive's files.

    Args:
        archive: The file.
        folder: What no link may lead out of.

    Raises:
        DataError: There is no such file, it lies elsewhere, or it is no whole zip file.
    """
    try:
        with open_regular(archive, folder) as stream:
            return [info.filename for info in open_zip(stream).infolist() if not info.is_dir()]
    except UnreadableFileError as error:
        raise DataError(
            expected="a whole zip file", got=str(error), where=str(archive), fix=error.fix
        ) from error


def place_of(file: Path, row: int) -> str:
    """Say where a row is: the file, or the part of a folder of Parquet files, and its number."""
    if not file.is_dir():
        return f"{file}, row {row}"
    before = 0
    for part in _list_parts(file):
        rows = arrow.parquet.read_metadata(part.absolute()).num_rows
        if row <= before + rows:
            return f"{part}, row {row - before}"
        before += rows
    raise IndexError(row)


def find_line(file: Path, row: int) -> tuple[int, bytes]:
    """Return the number of a record's line in a file of JSON Lines, from 1, and the line."""
    with opened(file) as stream:
        filled = ((n, line) for n, line in enumerate(stream, start=1) if line.strip(BLANK))
        return next(islice(filled, row - 1, None))


def opened(file: Path) -> IO[bytes]:
    """Open a raw file to read its bytes; those of a gzip file are unpacked."""
    return cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def refuse_mark(file: Path) -> None:
    """Refuse JSON Lines with a byte order mark: DuckDB would take the first record for broken.

    Raises:
        DataError: There is one.
    """
    with opened(file) as stream:
        if stream.read(3) == b"\xef\xbb\xbf":
            raise DataError(
                expected="JSON Lines without a byte order mark",
                got="one",
                where=f"{file}, line 1",
                fix="remove the file's first three bytes",
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


def _form(file: Path) -> str:
    """Return the suffix that tells a file's form, in lower case and without ``.gz``."""
    return (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()


def _csv(
    _: duckdb.DuckDBPyConnection, file: Path, wanted: Mapping[str, str], delimiter: str = ","
) -> tuple[list[str], str]:
    """Take the header ourselves: DuckDB skips lines until it finds one to its liking.

    It knows the columns by their place, so that it need not tell ``title`` from ``Title``.
    """
    # What is no UTF-8 may be in a line below: of the header it shows as surrogates.
    with io.TextIOWrapper(opened(file), "utf-8-sig", "surrogateescape", newline="") as stream:
        columns = next(csv.reader(stream, delimiter=delimiter), [])
    if any(unicodedata.category(char) == "Cs" or char == "\0" for char in "".join(columns)):
        raise csv.Error("no header in UTF-8, but other bytes")
    names = set(wanted.values())
    padded = [name for name in columns if name.strip() in names and name not in names]
    if padded:
        raise DataError(
            expected="names of columns without spaces around them",
            got=repr(padded[0]),
            where=f"{file}, header",
            fix="remove the spaces at the separators, in all lines: ids would keep theirs",
        )
    _refuse_repeated(columns, wanted, file)
    types = ", ".join(f"'c{place}': 'VARCHAR'" for place in range(len(columns)))
    cells = {name: f"c{place}" for place, name in enumerate(columns)}
    source = (
        f"read_csv({text_file(file)}, {CSV_FORM}, header=true,"
        f" delim={literal(delimiter)}, quote='\"', escape='\"', columns={{{types}}})"
    )
    return columns, _select(wanted, cells, "row_number() OVER ()", source)


def _tsv(
    connection: duckdb.DuckDBPyConnection, file: Path, wanted: Mapping[str, str]
) -> tuple[list[str], str]:
    return _csv(connection, file, wanted, delimiter="\t")


def _jsonl(
    connection: duckdb.DuckDBPyConnection, file: Path, wanted: Mapping[str, str]
) -> tuple[list[str], str]:
    """Take the wanted keys; lists, objects, truth values and 1.0 have no one text: refused.

    A key that no line has is no column: a file of other things would else be one of nulls.
    """
    refuse_mark(file)
    # A broken line becomes a null here; DuckDB's own error would name another line.
    objects = (
        "(SELECT row_number() OVER () AS row, json FROM read_json_objects("
        f"{text_file(file)}, format='newline_delimited', ignore_errors=true))"
    )
    cells = {name: f"json_extract(json, {literal(_pointer(name))})" for name in wanted.values()}
    _refuse_wrong_records(connection, file, objects, cells)
    counts = ", ".join(f"count({cell})" for cell in cells.values())
    first, *found = first_row(
        connection, f"SELECT first(json_keys(json) ORDER BY row), {counts} FROM {objects}"
    ) or [None]
    if first is None:
        return list(cells), _select(wanted, cells, "row", objects)  # no column lacks, but all rows
    given = [name for name, count in zip(cells, found, strict=True) if count]
    texts = {name: f"({cells[name]}->>'$')" for name in given}
    return list(dict.fromkeys([*first, *given])), _select(wanted, texts, "row", objects)


def _refuse_wrong_records(
    connection: duckdb.DuckDBPyConnection, file: Path, objects: str, cells: Mapping[str, str]
) -> None:
    """Refuse the first line that is no object, or has a cell that is no text and no integer."""
    found = ", ".join(
        f"{{'name': {literal(name)}, 'kind': json_type({cell}), 'value': {cell}::VARCHAR}}"
        for name, cell in cells.items()
    )
    # An integer of more than 64 bits has the kind of a fraction, and keeps its digits.
    wrong = first_row(
        connection,
        f"""SELECT row, cell.name, cell.value FROM (
            SELECT row, json_type(json) AS record, unnest([{found}]) AS cell FROM {objects}
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
    """Say why a line is no JSON object; Python takes some that DuckDB does not."""
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
    """Write a key as a JSON pointer."""
    return "/" + key.replace("~", "~0").replace("/", "~1")


def _parquet(
    connection: duckdb.DuckDBPyConnection, file: Path, wanted: Mapping[str, str]
) -> tuple[list[str], str]:
    """Read a file, or the parts of a folder one after the other."""
    columns: list[str] = []
    queries: list[str] = []
    before = 0
    for part in _list_parts(file) if file.is_dir() else [file]:
        names, rows, query = _parquet_part(connection, part, wanted, before)
        if queries and names != columns:
            raise DataError(
                expected=f"the columns {', '.join(columns)[:200]}, as in the first part",
                got=", ".join(names)[:200],
                where=str(part),
                fix="write all parts anew with the same columns",
            )
        columns, before = names, before + rows
        queries.append(query)
    return columns, " UNION ALL ".join(queries)


def _parquet_part(
    connection: duckdb.DuckDBPyConnection, file: Path, wanted: Mapping[str, str], before: int
) -> tuple[list[str], int, str]:
    """Return a file's columns, how many rows it has, and SQL that counts on from ``before``.

    Types without one text for each value are refused, such as 1.0 for an id.
    """
    columns, rows = _check_pages(file, wanted)
    _refuse_repeated(columns, wanted, file)
    source = f"read_parquet({literal(duckdb_path(file))}, hive_partitioning=false"
    described = connection.execute(f"DESCRIBE FROM {source})").fetchall()
    # DuckDB gives columns that differ only by case other names; the order is the file's.
    types = {name: kind for name, (_, kind, *_) in zip(columns, described, strict=True)}
    for ours, name in wanted.items():
        kind = types.get(name, "VARCHAR")
        if not any(form.fullmatch(kind) for form in _allowed(ours)):
            raise DataError(
                expected="texts or integers",
                got=kind,
                where=f"{file}, column {name}",
                fix="write ids as texts and timestamps as integers",
            )
    cells = {name: name_of(alias) for name, (alias, *_) in zip(columns, described, strict=True)}
    # A file knows its rows' numbers; counting them anew reads it on one core. That column hides
    # behind one of the file's own with its name.
    if any(name.lower() == "file_row_number" for name in columns):
        row = f"{before} + row_number() OVER ()"
    else:
        source, row = f"{source}, file_row_number=true", f"{before} + file_row_number + 1"
    return columns, rows, _select(wanted, cells, row, f"{source})")


def _allowed(column: str) -> tuple[re.Pattern[str], ...]:
    """Return which types of Parquet one of our columns may have."""
    more = {"timestamp": (PARQUET_TIMES,), "rating": (PARQUET_NUMBERS,)}
    return (PARQUET_TEXTS, *more.get(column, ()))


def _check_pages(file: Path, wanted: Mapping[str, str]) -> tuple[list[str], int]:
    """Return a Parquet file's columns and number of rows, once its wanted columns are decoded.

    DuckDB does not look at the checksums of pages. Not all writers write them: Spark does, pandas
    and DuckDB do not.

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


def _list_parts(folder: Path) -> list[Path]:
    """List the files of a folder that Spark or Dask wrote, in the order of the numbers in them.

    What starts with ``_`` or ``.`` is a note of the writer's.

    Raises:
        DataError: There are none, or something else is there.
    """
    found = [path for path in folder.iterdir() if not path.name.startswith(("_", "."))]
    others = [path for path in found if path.suffix != ".parquet" or path.is_dir()]
    if others or not found:
        raise DataError(
            expected="a folder of Parquet files, not partitioned by a column",
            got=_names(others) if others else "none",
            where=str(folder),
            fix="write it again as one file, or without partitions",
        )
    numbers = re.compile(r"(\d+)")

    def key(path: Path) -> list[tuple[int, str]]:
        texts = numbers.split(path.name)
        return [(int(text) if place % 2 else 0, text) for place, text in enumerate(texts)]

    return sorted(found, key=key)


def _refuse_repeated(columns: Sequence[str], wanted: Mapping[str, str], file: Path) -> None:
    """Refuse a wanted column that is there twice; of others nobody asks which."""
    repeated = [name for name in wanted.values() if columns.count(name) > 1]
    if repeated:
        raise DataError(
            expected="every column once",
            got=f"{repeated[0]} again",
            where=str(file),
            fix="rename or remove one",
        )


def _select(wanted: Mapping[str, str], cells: Mapping[str, str], row: str, source: str) -> str:
    """Write SQL that gives the wanted columns our names."""
    columns = ", ".join(
        f"{cells.get(name, 'NULL')}::VARCHAR AS {name_of(ours)}" for ours, name in wanted.items()
    )
    return f"SELECT {columns}, {row} AS row FROM {source}"


FORMS: dict[str, Form] = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}


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
