"""Schemas of all tables that stages exchange, as pandera models, and how to read and write them.

Every table is one Parquet file, checked when it is written and again when it is read. The checks
run inside DuckDB (pandera's Ibis backend), so that a table never has to fit into memory.

Each file carries the SHA-256 of its own bytes in the key-value metadata of its footer. Parquet's
page checksums cover neither headers nor statistics, and DuckDB neither writes nor verifies them.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, get_args

import duckdb
import ibis
import pandera.ibis as pa
import pyarrow as arrow
import pyarrow.parquet
from ibis.expr import datatypes
from pandera.dtypes import immutable
from pandera.engines import ibis_engine
from pandera.errors import SchemaError, SchemaErrors

from mllm_msr.core.errors import DataError, ParamsError
from mllm_msr.core.files import atomic_write, duckdb_path
from mllm_msr.core.params import Sampling

ROWS_PER_GROUP = 1_000  # of tables written row by row
SPLITS = ["train", "valid", "test"]
SAMPLINGS = list(get_args(Sampling))  # of negatives, in the order of tables of results
# These skip sequences for which they find too few items.
PARTIAL_SAMPLINGS = ("targets", "contemporary")
FINITE = "finite numbers only"

MEMORY = "MLLM_MSR_MEMORY"
DIGEST_KEY = "mllm_msr.digest"  # in a table's key-value metadata: the SHA-256 of its other bytes
NO_DIGEST = "0" * 64  # placeholder while the digest is computed
# Between key and value, Thrift's compact protocol writes two bytes: a field header and a length.
DIGEST_PATTERN = re.compile(
    re.escape(DIGEST_KEY).encode() + rb".{2}sha256:([0-9a-f]{64})", re.DOTALL
)
FOOTER_END = 8  # bytes after the footer: its length, and PAR1
CHUNK = 1 << 20  # bytes read at once
# The fix for a table that names an item missing from the table Items.
ADD_ITEM = (
    "add it to the items of data/raw, or set preprocess.unknown_items to drop or keep, then run"
    " from preprocess on"
)


@ibis_engine.Engine.register_dtype(equivalents=[datatypes.Array(datatypes.float32)])
@immutable
class Vector(ibis_engine.DataType):  # type: ignore[misc]
    """A list of 32-bit floats; pandera 0.35 supports no lists in Ibis tables."""

    type = datatypes.Array(datatypes.float32)


class Table(pa.DataFrameModel):  # type: ignore[misc]
    """Base of all tables: exactly the columns that the model declares."""

    class Config:
        """Refuse missing and unknown columns."""

        strict = True

    @classmethod
    def validate(cls, check_obj: ibis.Table, lazy: bool = False) -> ibis.Table:
        """Check the table; without rows, check only its columns.

        Pandera's Ibis checks evaluate to NULL on a table without rows and count that as a failure.
        """
        if check_obj.limit(1).count().execute():
            return super().validate(check_obj, lazy=lazy)
        columns = cls.to_schema().columns
        loose = {name: pa.Column(column.dtype, nullable=True) for name, column in columns.items()}
        return pa.DataFrameSchema(loose, strict=True).validate(check_obj, lazy=lazy)


def _is_finite(data: pa.IbisData) -> ibis.expr.types.BooleanColumn:
    """Return whether each number, or each vector, of a column is finite."""
    column = data.table[data.key]
    if not column.type().is_array():
        return ~(column.isinf() | column.isnan())
    return column.filter(lambda number: number.isinf() | number.isnan()).length() == 0


class Interactions(Table):
    """Interactions. Each (user, item) pair occurs once, at its earliest time."""

    # Cleaning makes the pairs unique; checking it here would sort a hundred million rows again.
    user: str
    item: str
    timestamp: int = pa.Field(nullable=True, ge=0)  # ms since 1970; null: only the order is known
    position: int = pa.Field(ge=0)  # order in the publisher's file; breaks ties in time


class Items(Table):
    """The catalogue, with the publisher's texts; whitespace is folded."""

    item: str
    title: str = pa.Field(nullable=True)
    description: str = pa.Field(nullable=True)

    class Config:
        """One row per item."""

        unique = ["item"]


class ImageSources(Table):
    """The source of each item's image: a file, a member of a zip archive, or a URL."""

    item: str
    file: str = pa.Field(nullable=True)  # path of the image or of its archive; null: on the web
    member: str = pa.Field(nullable=True)  # name in the archive; null: file is the image itself
    url: str = pa.Field(nullable=True)  # null: in a file

    class Config:
        """One row per item."""

        unique = ["item"]


class FailedImages(Table):
    """Images that could not be fetched or decoded, and why."""

    item: str
    place: str  # path or URL
    reason: str

    class Config:
        """One row per item."""

        unique = ["item"]


class Images(Table):
    """Decoded images, shrunk and encoded again; items without an image have no row."""

    item: str
    image: datatypes.binary  # RGB; JPEG if the source was JPEG, else lossless WebP
    width: int = pa.Field(ge=1)  # pixels
    height: int = pa.Field(ge=1)  # pixels
    digest: str = pa.Field(str_length={"min_value": 64, "max_value": 64})  # SHA-256 of image

    class Config:
        """One row per item."""

        unique = ["item"]


class Sequences(Table):
    """A user's history and target: the recommender predicts the target from the history."""

    sequence: int = pa.Field(ge=0)
    user: str
    split: str = pa.Field(isin=SPLITS)
    target: str
    history_length: int = pa.Field(ge=1)  # items in the history table

    class Config:
        """One row per sequence."""

        unique = ["sequence"]


class Histories(Table):
    """The items before each target. Preferences are inferred from this table only."""

    sequence: int = pa.Field(ge=0)
    position: int = pa.Field(ge=1)  # 1 is the oldest
    item: str

    class Config:
        """One item per position."""

        unique = ["sequence", "position"]


class Candidates(Table):
    """The items to be ranked for each sequence: its target and negatives, in random order."""

    sampling: str = pa.Field(isin=SAMPLINGS)  # of the negatives (mllm_msr/data/candidates.py)
    sequence: int = pa.Field(ge=0)
    position: int = pa.Field(ge=0)
    item: str
    label: bool  # true for the target

    class Config:
        """Each item at most once per sampling and sequence."""

        unique = ["sampling", "sequence", "item"]


class Popularity(Table):
    """Interactions per item that are known at training time (mllm_msr/data/sequences.py).

    These are all interactions of users without a held-out target, and those of other users before
    their first one. With ``split: time``, only interactions before the first held-out target of all
    users count.
    """

    item: str
    interactions: int = pa.Field(ge=0)

    class Config:
        """One row per item."""

        unique = ["item"]


class Summaries(Table):
    """The item summaries that the models generate (paper, section Method, step 1)."""

    item: str
    text_summary: str = pa.Field(nullable=True)  # null: no text, or text: false
    image_description: str = pa.Field(nullable=True)  # null: no image, or image: false
    summary: str  # the fusion of both, or the only one

    class Config:
        """One row per item."""

        unique = ["item"]


class Features(Table):
    """A model's features of each item, as vectors of the model's widths."""

    item: str
    image: Vector = pa.Field(nullable=True)  # of the vision tower; null: no image
    summary: Vector = pa.Field(nullable=True)  # of the language model; null: an empty summary

    class Config:
        """One row per item."""

        unique = ["item"]

    @pa.check("image", "summary", error=FINITE)  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> ibis.expr.types.BooleanColumn:  # noqa: N805
        """Refuse the output of a model with broken weights."""
        return _is_finite(data)


class Preferences(Table):
    """The preference after each block of a history (paper, section Method, step 2)."""

    sequence: int = pa.Field(ge=0)
    block: int = pa.Field(ge=1)  # the last block of a sequence is what the recommender reads
    items: int = pa.Field(ge=1)  # items up to this block
    preference: str

    class Config:
        """One preference per block."""

        unique = ["sequence", "block"]


class Scores(Table):
    """The recommender's score of each candidate."""

    sequence: int = pa.Field(ge=0)
    item: str
    split: str = pa.Field(isin=SPLITS)
    log_odds: float  # of yes against no, fp32 logits

    class Config:
        """One score per candidate."""

        unique = ["sequence", "item"]

    @pa.check("log_odds", error=FINITE)  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> ibis.expr.types.BooleanColumn:  # noqa: N805
        """Refuse scores that cannot be ranked."""
        return _is_finite(data)


class PerSequence(Table):
    """The rank of each target by each scorer, as the counts that all metrics derive from."""

    sampling: str = pa.Field(isin=SAMPLINGS)  # of the negatives
    sequence: int = pa.Field(ge=0)
    split: str = pa.Field(isin=SPLITS)
    scorer: str
    candidates: int = pa.Field(ge=2)  # the target included
    above: int = pa.Field(ge=0)  # negatives scored higher than the target
    tied: int = pa.Field(ge=0)  # negatives with the target's score

    class Config:
        """One row per sampling, scorer and sequence."""

        unique = ["sampling", "scorer", "sequence"]


class Comparisons(Table):
    """Differences of a scorer's test AUC from that of a baseline that ignores the user."""

    sampling: str = pa.Field(isin=SAMPLINGS)  # of the negatives
    scorer: str
    baseline: str  # the scorer that ignores the user
    difference: float  # mean over the sequences
    low: float  # bounds of the paired confidence interval
    high: float
    p: float = pa.Field(ge=0, le=1)  # two-sided, Holm-corrected within the sampling

    class Config:
        """One row per sampling and pair of scorers."""

        unique = ["sampling", "scorer", "baseline"]

    @pa.check("difference", "low", "high", error=FINITE)  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> ibis.expr.types.BooleanColumn:  # noqa: N805
        """Refuse differences that are not finite."""
        return _is_finite(data)


class Oracle(Table):
    """The pocket world's true utilities: the log choice weight of each item for each user."""

    user: str
    item: str
    utility: float

    @pa.check("utility", error=FINITE)  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> ibis.expr.types.BooleanColumn:  # noqa: N805
        """Refuse utilities that are not finite."""
        return _is_finite(data)


AnyTable = type[Table]


@contextlib.contextmanager
def open_database(spill: Path, ordered: bool = True) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open an in-memory DuckDB database that spills to disk.

    Its memory limit depends on the machine and is no setting: the environment variable
    ``MLLM_MSR_MEMORY``, such as ``8GB``, or DuckDB's default, 80 % of the machine's memory.

    Args:
        spill: Folder for what does not fit into memory.
        ordered: Whether queries without ORDER BY keep the order of the rows in their files, which
            costs memory.

    Raises:
        ParamsError: The variable is not a size.
    """
    with duckdb.connect() as connection:
        connection.execute("SET temp_directory = ?", [str(spill.absolute())])
        connection.execute("SET preserve_insertion_order = ?", [ordered])
        if limit := os.environ.get(MEMORY):
            try:
                connection.execute("SET memory_limit = ?", [limit])
            except duckdb.Error as error:
                fix = "correct it, or unset it for 80 % of the machine's memory"
                raise ParamsError(
                    expected="a size such as 8GB", got=repr(limit), where=MEMORY, fix=fix
                ) from error
        yield connection


def check_table(
    model: AnyTable,
    path: Path,
    name: Path | None = None,
    connection: duckdb.DuckDBPyConnection | None = None,
) -> None:
    """Check a Parquet file against its digest and its model.

    A file that another program wrote has no digest; then only the model is checked.

    Args:
        model: The table's model.
        path: The file.
        name: The name for errors, if not the path.
        connection: The database whose memory limit and spill folder the check shares.

    Raises:
        DataError: The file is missing, not Parquet, damaged, or violates the model; the error names
            the first failed column and check, with some of the offending values.
    """
    if not path.is_file():
        raise DataError(
            expected="a table",
            got="no such file",
            where=str(path),
            fix="run the stage that writes it",
        )
    _verify_digest(path, name or path)
    backend = ibis.duckdb.from_connection((connection or duckdb.connect()).cursor())
    try:
        rows = backend.read_parquet(duckdb_path(path), hive_partitioning=False)
        model.validate(rows, lazy=True)
    except SchemaErrors as error:
        raise _explain(error, model, name or path) from error
    except duckdb.Error as error:
        raise DataError(
            expected="a Parquet file", got=str(error), where=str(path), fix="run its stage again"
        ) from error
    finally:
        backend.disconnect()


def write_query(
    model: AnyTable, connection: duckdb.DuckDBPyConnection, query: str, path: Path
) -> int:
    """Write the rows of a query as a table, atomically, and return their number.

    The query should order its rows, so that equal inputs give equal bytes.

    Raises:
        DataError: The rows violate the model, or the disk is full; then nothing is written.
    """
    with atomic_write(path) as temporary:
        digest = f"{{'{DIGEST_KEY}': 'sha256:{NO_DIGEST}'}}"
        connection.execute(
            f"COPY ({query}) TO ? (FORMAT parquet, COMPRESSION zstd, KV_METADATA {digest})",
            [str(temporary.absolute())],
        )
        _write_digest(temporary)
        check_table(model, temporary, path, connection)
    return count_rows(path)


def write_rows(
    model: AnyTable,
    rows: Iterable[Mapping[str, Any]],
    path: Path,
    rows_per_group: int = ROWS_PER_GROUP,
) -> int:
    """Write rows as a table, atomically and one row group at a time, and return their number.

    Args:
        model: The table's model.
        rows: The rows, in the table's order.
        path: The Parquet file to write.
        rows_per_group: Rows per row group, the smallest unit that a reader loads.

    Raises:
        DataError: The rows violate the model, or the disk is full; then nothing is written.
    """
    schema = arrow_schema(model)
    stream = iter(rows)
    with atomic_write(path) as temporary:
        # No statistics of floats: DuckDB would evaluate isnan() from them and miss a NaN.
        counted = [field.name for field in schema if not arrow.types.is_floating(field.type)]
        with arrow.parquet.ParquetWriter(
            temporary.absolute(), schema, compression="zstd", write_statistics=counted
        ) as writer:
            while group := list(islice(stream, rows_per_group)):
                writer.write_table(arrow.Table.from_pylist(group, schema=schema))
            writer.add_key_value_metadata({DIGEST_KEY: f"sha256:{NO_DIGEST}"})
        _write_digest(temporary)
        check_table(model, temporary, path)
    return count_rows(path)


def read_table(
    model: AnyTable, connection: duckdb.DuckDBPyConnection, path: Path, name: str
) -> None:
    """Check a table and create the view ``name`` of it.

    Raises:
        DataError: As :func:`check_table`.
    """
    check_table(model, path, connection=connection)
    connection.read_parquet(duckdb_path(path), hive_partitioning=False).create_view(name)


def read_rows(model: AnyTable, path: Path, order: str) -> Iterator[dict[str, Any]]:
    """Check a table and yield its rows as dictionaries, ordered by the columns in ``order``.

    Raises:
        DataError: As :func:`check_table`.
    """
    check_table(model, path)
    with duckdb.connect() as connection:
        result = connection.execute(
            f"FROM read_parquet(?, hive_partitioning=false) ORDER BY {order}", [duckdb_path(path)]
        )
        columns = [column[0] for column in result.description or ()]
        while rows := result.fetchmany(ROWS_PER_GROUP):
            for row in rows:
                yield dict(zip(columns, row, strict=True))


def count_rows(path: Path) -> int:
    """Return the number of rows of a Parquet file, read from its footer."""
    return int(arrow.parquet.read_metadata(path.absolute()).num_rows)


def arrow_schema(model: AnyTable) -> arrow.Schema:
    """Return the Arrow schema of a table's model."""
    columns = model.to_schema().columns
    types = {name: column.dtype.type for name, column in columns.items()}
    return ibis.schema(types).to_pyarrow()


class _Digest(NamedTuple):
    """The digest in a file's footer, and its offset in bytes."""

    offset: int
    value: str


def _find_digest(file: IO[bytes]) -> _Digest | None:
    """Return the digest in a Parquet file's footer, or None without one."""
    size = file.seek(0, os.SEEK_END)
    if size < FOOTER_END:
        return None
    file.seek(size - FOOTER_END)
    length = int.from_bytes(file.read(4), "little")
    start = max(0, size - FOOTER_END - length)
    file.seek(start)
    # Statistics may hold text that looks like a digest; key-value metadata comes after them.
    *_, last = [None, *DIGEST_PATTERN.finditer(file.read(length))]
    return None if last is None else _Digest(start + last.start(1), last[1].decode())


def _compute_digest(file: IO[bytes], offset: int) -> str:
    """Return the SHA-256 of a file, with :data:`NO_DIGEST` in place of its digest."""
    digest = hashlib.sha256()
    file.seek(0)
    while left := offset - file.tell():
        digest.update(file.read(min(CHUNK, left)))
    digest.update(NO_DIGEST.encode())
    file.seek(len(NO_DIGEST), os.SEEK_CUR)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _write_digest(path: Path) -> None:
    """Write the digest of a new Parquet file into its footer."""
    with path.open("r+b") as file:
        found = _find_digest(file)
        if found is None:
            raise RuntimeError(f"{path}: no place for the digest in the footer")
        digest = _compute_digest(file, found.offset)
        file.seek(found.offset)
        file.write(digest.encode())


def _verify_digest(path: Path, name: Path) -> None:
    """Compare a Parquet file with the digest in its footer, if it has one.

    Raises:
        DataError: They differ.
    """
    with path.open("rb") as file:
        found = _find_digest(file)
        if found is not None and _compute_digest(file, found.offset) != found.value:
            raise DataError(
                expected="the bytes that were written",
                got="other bytes: their SHA-256 is not the one in the footer",
                where=str(name),
                fix="delete the file, run its stage again, and check the disk",
            )


def _explain(error: SchemaErrors, model: AnyTable, path: Path) -> DataError:
    """Return an error that names missing and unknown columns, or the first failed check."""
    failed = {str(each.check): str(each.failure_cases) for each in reversed(error.schema_errors)}
    columns = [
        f"{word} column {failed[check]}"
        for check, word in (("column_in_dataframe", "no"), ("column_in_schema", "unknown"))
        if check in failed
    ]
    if columns:
        return DataError(
            expected=f"the table {model.__name__} with the columns"
            f" {', '.join(model.to_schema().columns)}",
            got=", ".join(columns),
            where=str(path),
            fix="run the stage that writes this table, or name another file",
        )
    first: SchemaError = error.schema_errors[0]
    column = getattr(first.schema, "name", None) or model.__name__
    check = getattr(first.check, "error", None) or str(first.check)
    return DataError(
        expected=f"the table {model.__name__} with {check}",
        got=_cases(first),
        where=f"{path}, column {column}",
        fix="correct the input of the stage that writes this table, and run it again",
    )


def _cases(error: SchemaError) -> str:
    """Return a few of the offending values, or pandera's own reason."""
    cases = error.failure_cases
    if isinstance(cases, ibis.Table):
        return ", ".join(str(row) for row in cases.limit(3).to_pyarrow().to_pylist())
    return str(cases if cases is not None else error)[:200]
