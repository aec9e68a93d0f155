"""Read and write the tables that stages exchange.

Every table is one Parquet file, checked against its model in :mod:`mllm_msr.core.schemas` when it
is written and again when it is read. Ibis and pandera take a second to import, so the functions
that need them import them: a stage that writes nothing need not wait for them.
Each file carries the SHA-256 of its own bytes (:mod:`mllm_msr.core.parquet`).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as arrow
import pyarrow.parquet

from mllm_msr.core.errors import DataError, ParamsError
from mllm_msr.core.files import atomic_write, duckdb_path, is_full_disk
from mllm_msr.core.parquet import DIGEST_KEY, NO_DIGEST, verify_digest, write_digest, write_groups

if TYPE_CHECKING:
    from pandera.errors import SchemaError, SchemaErrors

    from mllm_msr.core.schemas import AnyTable

ROWS_PER_GROUP = 1_000  # of tables written row by row

MEMORY = "MLLM_MSR_MEMORY"
# The fix for a table that names an item missing from the table Items.
ADD_ITEM = (
    "add it to the items of data/raw, or set preprocess.unknown_items to drop or keep, then run"
    " from preprocess on"
)
# Models and digests of the tables that fitted in this process: equal bytes fit again.
_checked: set[tuple["AnyTable", str]] = set()


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
        DataError: Memory ran out within the block.
    """
    with _explain_out_of_memory("a query"), duckdb.connect() as connection:
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
    model: "AnyTable",
    path: Path,
    name: Path | None = None,
    connection: duckdb.DuckDBPyConnection | None = None,
) -> None:
    """Check a Parquet file against its digest and its model.

    A file that another program wrote has no digest; then only the model is checked. Bytes that this
    process has checked before, be it in another file, are only compared with their digest.

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
    digest = verify_digest(path, name or path)
    if digest is None:
        _validate(model, path, name or path, connection)
    elif (model, digest) not in _checked:
        _validate(model, path, name or path, connection)
        _checked.add((model, digest))


def _validate(
    model: "AnyTable", path: Path, name: Path, connection: duckdb.DuckDBPyConnection | None
) -> None:
    """Check a Parquet file against its model, as :func:`check_table` does."""
    import ibis
    from pandera.errors import SchemaErrors

    backend = ibis.duckdb.from_connection((connection or duckdb.connect()).cursor())
    try:
        with _explain_out_of_memory(str(name)):
            rows = backend.read_parquet(duckdb_path(path), hive_partitioning=False)
            model.validate(rows, lazy=True)
    except SchemaErrors as error:
        raise _explain(error, model, name) from error
    except duckdb.Error as error:
        raise DataError(
            expected="a Parquet file", got=str(error), where=str(path), fix="run its stage again"
        ) from error
    finally:
        backend.disconnect()


def write_query(
    model: "AnyTable", connection: duckdb.DuckDBPyConnection, query: str, path: Path
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
        write_digest(temporary)
        check_table(model, temporary, path, connection)
    return count_rows(path)


def write_rows(
    model: "AnyTable",
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
    schema, stream = arrow_schema(model), iter(rows)
    groups = iter(lambda: list(islice(stream, rows_per_group)), [])
    with atomic_write(path) as temporary:
        write_groups(schema, groups, temporary)
        check_table(model, temporary, path)
    return count_rows(path)


def read_table(
    model: "AnyTable", connection: duckdb.DuckDBPyConnection, path: Path, name: str
) -> None:
    """Check a table and create the view ``name`` of it.

    Raises:
        DataError: As :func:`check_table`.
    """
    check_table(model, path, connection=connection)
    connection.read_parquet(duckdb_path(path), hive_partitioning=False).create_view(name)


def read_rows(model: "AnyTable", path: Path, order: str) -> Iterator[dict[str, Any]]:
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


def read_last_preferences(path: Path) -> dict[int, str]:
    """Return the preference after the last block of each sequence of a table Preferences.

    Raises:
        DataError: The table is missing or breaks its model.
    """
    from mllm_msr.core.schemas import Preferences

    rows = read_rows(Preferences, path, order="sequence, block")
    return {row["sequence"]: row["preference"] for row in rows}


def count_rows(path: Path) -> int:
    """Return the number of rows of a Parquet file, read from its footer."""
    return int(arrow.parquet.read_metadata(path.absolute()).num_rows)


def arrow_schema(model: "AnyTable") -> arrow.Schema:
    """Return the Arrow schema of a table's model."""
    import ibis

    columns = model.to_schema().columns
    types = {name: column.dtype.type for name, column in columns.items()}
    return ibis.schema(types).to_pyarrow()


@contextlib.contextmanager
def _explain_out_of_memory(where: str) -> Iterator[None]:
    """Turn DuckDB's running out of memory within the block into a user error.

    Raises:
        DataError: Memory ran out.
    """
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        if is_full_disk(error):  # there was no room to spill to
            raise
        fix = f"free memory, or raise {MEMORY}; earlier outputs are untouched"
        got = "too little"
        raise DataError(expected="memory for DuckDB", got=got, where=where, fix=fix) from error


def _explain(error: "SchemaErrors", model: "AnyTable", path: Path) -> DataError:
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


def _cases(error: "SchemaError") -> str:
    """Return a few of the offending values, or pandera's own reason."""
    import ibis

    cases = error.failure_cases
    if isinstance(cases, ibis.Table):
        return ", ".join(str(row) for row in cases.limit(3).to_pyarrow().to_pylist())
    return str(cases if cases is not None else error)[:200]
