"""The data dictionary: a pandera model for each table that crosses a stage.

Every table is one Parquet file, checked when it is written and again when it is read. The checks
run inside DuckDB (pandera's Ibis backend), so that a table never has to fit into memory.

A table carries the SHA-256 of its own bytes in the key-value metadata of its footer. Parquet's page
checksums would leave headers and statistics uncovered, and DuckDB neither writes nor verifies them.
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
SAMPLINGS = list(get_args(Sampling))  # of negatives, in the order that tables of results have
# Those that leave out sequences for which they find too few items.
PARTIAL_SAMPLINGS = ("targets", "contemporary")
FINITE = "finite numbers only"

MEMORY = "MLLM_MSR_MEMORY"
DIGEST_KEY = "mllm_msr.digest"  # in a table's key-value metadata: the SHA-256 of its other bytes
NO_DIGEST = "0" * 64  # stands in the digest's place while it is computed
# Between key and value, Thrift's compact protocol writes the value's field header and length.
SEALED = re.compile(re.escape(DIGEST_KEY).encode() + rb".{2}sha256:([0-9a-f]{64})", re.DOTALL)
FOOTER_END = 8  # bytes after the footer: its length, and PAR1
CHUNK = 1 << 20  # bytes read at once
# What to do where a table names an item that the table Items has not.
ADD_ITEM = (
    "add it to the items of data/raw, or set preprocess.unknown_items to drop or keep, then run"
    " from preprocess on"
)


@ibis_engine.Engine.register_dtype(equivalents=[datatypes.Array(datatypes.float32)])
@immutable
class Vector(ibis_engine.DataType):  # type: ignore[misc]
    """A list of 32-bit floats; pandera 0.35 knows no lists in Ibis's tables."""

    type = datatypes.Array(datatypes.float32)


class Table(pa.DataFrameModel):  # type: ignore[misc]
    """A table with exactly the columns that its model names."""

    class Config:
        """No column may be missing or unknown."""

        strict = True

    @classmethod
    def validate(cls, check_obj: ibis.Table, lazy: bool = False) -> ibis.Table:
        """Check the table; one without rows needs only the right columns.

        Pandera's Ibis checks reduce no rows to NULL and take that for a failure.
        """
        if check_obj.limit(1).count().execute():
            return super().validate(check_obj, lazy=lazy)
        columns = cls.to_schema().columns
        loose = {name: pa.Column(column.dtype, nullable=True) for name, column in columns.items()}
        return pa.DataFrameSchema(loose, strict=True).validate(check_obj, lazy=lazy)


def _is_finite(data: pa.IbisData) -> ibis.expr.types.BooleanColumn:
    """Tell of each number of a column, or of each vector, whether it is finite."""
    column = data.table[data.key]
    if not column.type().is_array():
        return ~(column.isinf() | column.isnan())
    return column.filter(lambda number: number.isinf() | number.isnan()).length() == 0


class Interactions(Table):
    """Who took what, when. A (user, item) pair occurs once, at its earliest time."""

    # Uniqueness is the readers' work: a check of it would sort a hundred million rows again.
    user: str
    item: str
    timestamp: int = pa.Field(nullable=True, ge=0)  # ms since 1970; null: publisher has only order
    position: int = pa.Field(ge=0)  # row or place in the publisher's file; breaks ties in time


class Items(Table):
    """The catalogue. Texts are as the publisher has them, whitespace folded."""

    item: str
    title: str = pa.Field(nullable=True)
    description: str = pa.Field(nullable=True)

    class Config:
        """One row per item."""

        unique = ["item"]


class ImageSources(Table):
    """Where the publisher has the image of an item: in a file, in an archive, or on the web."""

    item: str
    file: str = pa.Field(nullable=True)  # its path; null: on the web
    member: str = pa.Field(nullable=True)  # its name in the archive that file is; null: no archive
    url: str = pa.Field(nullable=True)  # null: in a file

    class Config:
        """One row per item."""

        unique = ["item"]


class FailedImages(Table):
    """Images that could not be had, and why."""

    item: str
    place: str  # path or URL
    reason: str

    class Config:
        """One row per item."""

        unique = ["item"]


class Images(Table):
    """Images, decoded once, bounded and encoded again; items without one have no row."""

    item: str
    image: datatypes.binary  # RGB; JPEG where it came as JPEG, else lossless WebP
    width: int = pa.Field(ge=1)  # pixels
    height: int = pa.Field(ge=1)  # pixels
    digest: str = pa.Field(str_length={"min_value": 64, "max_value": 64})  # SHA-256 of image

    class Config:
        """One row per item."""

        unique = ["item"]


class Sequences(Table):
    """One question each: would this user take the target after the history?"""

    sequence: int = pa.Field(ge=0)
    user: str
    split: str = pa.Field(isin=SPLITS)
    target: str
    history_length: int = pa.Field(ge=1)  # items in the history table

    class Config:
        """One row per sequence."""

        unique = ["sequence"]


class Histories(Table):
    """What came before the target, and nothing else: the one table preferences are made from."""

    sequence: int = pa.Field(ge=0)
    position: int = pa.Field(ge=1)  # 1 is the oldest
    item: str

    class Config:
        """A place in a history holds one item."""

        unique = ["sequence", "position"]


class Candidates(Table):
    """The items a sequence is asked about: its target and its negatives, in random order."""

    sampling: str = pa.Field(isin=SAMPLINGS)  # of the negatives (mllm_msr/data/candidates.py)
    sequence: int = pa.Field(ge=0)
    position: int = pa.Field(ge=0)
    item: str
    label: bool  # true for the target

    class Config:
        """No item is asked about twice in a sequence and sampling."""

        unique = ["sampling", "sequence", "item"]


class Popularity(Table):
    """How often an item was taken, counting what may be known (mllm_msr/data/sequences.py).

    All that users without a held-out target took, and what the others took before their first one;
    under ``split: time`` only what anybody took before the first held-out target.
    """

    item: str
    interactions: int = pa.Field(ge=0)

    class Config:
        """One row per item."""

        unique = ["item"]


class Summaries(Table):
    """What the summarizer says of each item (paper, section Method, step 1)."""

    item: str
    text_summary: str = pa.Field(nullable=True)  # null: no text, or text: false
    image_description: str = pa.Field(nullable=True)  # null: no image, or image: false
    summary: str  # the fusion of the two, or the one there is

    class Config:
        """One row per item."""

        unique = ["item"]


class Features(Table):
    """What a model makes of each item, as vectors of its own widths."""

    item: str
    image: Vector = pa.Field(nullable=True)  # of the vision tower; null: no image
    summary: Vector = pa.Field(nullable=True)  # of the language model; null: an empty summary

    class Config:
        """One row per item."""

        unique = ["item"]

    @pa.check("image", "summary", error=FINITE)  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> ibis.expr.types.BooleanColumn:  # noqa: N805
        """Refuse vectors that a model with broken weights gives."""
        return _is_finite(data)


class Preferences(Table):
    """The preference after each block of a history (paper, section Method, step 2)."""

    sequence: int = pa.Field(ge=0)
    block: int = pa.Field(ge=1)  # the last block of a sequence is what the recommender reads
    items: int = pa.Field(ge=1)  # items read so far
    preference: str

    class Config:
        """One preference per block."""

        unique = ["sequence", "block"]


class Scores(Table):
    """What the recommender says of each candidate."""

    sequence: int = pa.Field(ge=0)
    item: str
    split: str = pa.Field(isin=SPLITS)
    log_odds: float  # of yes against no, fp32 logits

    class Config:
        """One score per candidate."""

        unique = ["sequence", "item"]

    @pa.check("log_odds", error=FINITE)  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> ibis.expr.types.BooleanColumn:  # noqa: N805
        """Refuse what no order of candidates follows from."""
        return _is_finite(data)


class PerSequence(Table):
    """The rank of each target by each scorer, as counts that every metric follows from."""

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
    """How far a scorer's AUC on test is above that of one that does not know the user."""

    sampling: str = pa.Field(isin=SAMPLINGS)  # of the negatives
    scorer: str
    baseline: str  # the one that does not know the user
    difference: float  # mean over the sequences
    low: float  # bounds of its paired interval
    high: float
    p: float = pa.Field(ge=0, le=1)  # two-sided, Holm-corrected within the sampling

    class Config:
        """One row per sampling and pair of scorers."""

        unique = ["sampling", "scorer", "baseline"]


class Oracle(Table):
    """The pocket world's truth: the log weight of each item for each user's last taste."""

    user: str
    item: str
    utility: float

    @pa.check("utility", error=FINITE)  # type: ignore[untyped-decorator]
    def finite(cls, data: pa.IbisData) -> ibis.expr.types.BooleanColumn:  # noqa: N805
        """Refuse weights that are no numbers."""
        return _is_finite(data)


AnyTable = type[Table]


@contextlib.contextmanager
def open_database(spill: Path, ordered: bool = True) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database in memory for tables that may be larger than it.

    How much memory it takes is the machine's business: the environment variable
    ``MLLM_MSR_MEMORY``, such as ``8GB``, or DuckDB's own default, 80 % of what there is.

    Args:
        spill: Folder for what does not fit.
        ordered: Whether rows keep the order of their files where a query asks for none. Where no
            query relies on that, it costs memory for nothing.

    Raises:
        ParamsError: The variable is no amount of memory.
    """
    with duckdb.connect() as connection:
        connection.execute("SET temp_directory = ?", [str(spill.absolute())])
        connection.execute("SET preserve_insertion_order = ?", [ordered])
        if limit := os.environ.get(MEMORY):
            try:
                connection.execute("SET memory_limit = ?", [limit])
            except duckdb.Error as error:
                fix = "correct it, or unset it for 80 % of the machine's"
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
    """Check a Parquet file against its digest and its model; the latter inside DuckDB.

    A table of another program has no digest, and only the model is checked.

    Args:
        model: The table's model.
        path: The file.
        name: What errors call the file, if not by its path.
        connection: Of the database whose memory and spill folder the check shares.

    Raises:
        DataError: The file is missing, not Parquet, damaged, or breaks the model; names the first
            column and check that failed, with some of the offending values.
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
    """Write a query's rows as a table; returns how many.

    The query should order its rows: equal inputs then give equal bytes.

    Raises:
        DataError: The rows break the model, or the disk is full; nothing is written then.
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
    """Write rows, a group at a time, as a table; returns how many.

    Args:
        model: The table's model.
        rows: Its rows, in their order.
        path: The Parquet file to write.
        rows_per_group: Rows of a row group, which is what a reader reads at least.

    Raises:
        DataError: The rows break the model, or the disk is full; nothing is written then.
    """
    schema = arrow_schema(model)
    stream = iter(rows)
    with atomic_write(path) as temporary:
        # Without statistics of floats: DuckDB would answer isnan() from them, and miss a NaN.
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
    """Check a table and make it a view ``name`` of the connection.

    Raises:
        DataError: As :func:`check_table`.
    """
    check_table(model, path, connection=connection)
    connection.read_parquet(duckdb_path(path), hive_partitioning=False).create_view(name)


def read_rows(model: AnyTable, path: Path, order: str) -> Iterator[dict[str, Any]]:
    """Check a table and yield its rows as dictionaries, ordered by the columns of ``order``.

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
    """Count a Parquet file's rows from its footer."""
    return int(arrow.parquet.read_metadata(path.absolute()).num_rows)


def arrow_schema(model: AnyTable) -> arrow.Schema:
    """Give the Arrow schema of a table's model."""
    columns = model.to_schema().columns
    types = {name: column.dtype.type for name, column in columns.items()}
    return ibis.schema(types).to_pyarrow()


class _Digest(NamedTuple):
    """The digest that a table carries, and where it is in the file, in bytes."""

    offset: int
    value: str


def _find_digest(file: IO[bytes]) -> _Digest | None:
    """Find the digest in a Parquet file's footer, or None where there is none."""
    size = file.seek(0, os.SEEK_END)
    if size < FOOTER_END:
        return None
    file.seek(size - FOOTER_END)
    length = int.from_bytes(file.read(4), "little")
    start = max(0, size - FOOTER_END - length)
    file.seek(start)
    # Key-value metadata comes after the statistics, which may hold any text.
    *_, last = [None, *SEALED.finditer(file.read(length))]
    return None if last is None else _Digest(start + last.start(1), last[1].decode())


def _compute_digest(file: IO[bytes], offset: int) -> str:
    """Compute the SHA-256 of a file with :data:`NO_DIGEST` in its digest's place."""
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
    """Compare a Parquet file with the digest that it carries, if it carries one.

    Raises:
        DataError: They differ.
    """
    with path.open("rb") as file:
        found = _find_digest(file)
        if found is not None and _compute_digest(file, found.offset) != found.value:
            raise DataError(
                expected="a table as it was written",
                got="other bytes: their SHA-256 is not the one in its footer",
                where=str(name),
                fix="delete the file, run its stage again, and check the disk",
            )


def _explain(error: SchemaErrors, model: AnyTable, path: Path) -> DataError:
    """Say in one line which column failed which check, and on what."""
    first: SchemaError = error.schema_errors[0]
    column = getattr(first.schema, "name", None) or model.__name__
    check = getattr(first.check, "error", None) or str(first.check)
    return DataError(
        expected=f"the table {model.__name__} with {check}",
        got=_cases(first),
        where=f"{path}, column {column}",
        fix="correct the input; the file was not written or must be made again",
    )


def _cases(error: SchemaError) -> str:
    """Show a few of the offending values, or pandera's own reason."""
    cases = error.failure_cases
    if isinstance(cases, ibis.Table):
        return ", ".join(str(row) for row in cases.limit(3).to_pyarrow().to_pylist())
    return str(cases if cases is not None else error)[:200]
