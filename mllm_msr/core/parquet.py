"""Parquet files that carry the SHA-256 of their own bytes, in the key-value metadata of the footer.

Parquet's page checksums cover neither headers nor statistics, and DuckDB neither writes nor
verifies them. This module needs neither DuckDB nor a table's model, which take a second to import.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as arrow
import pyarrow.parquet

from mllm_msr.core.errors import DataError

DIGEST_KEY = "mllm_msr.digest"  # in a table's key-value metadata: the SHA-256 of its other bytes
NO_DIGEST = "0" * 64  # placeholder while the digest is computed
# Between key and value, Thrift's compact protocol writes two bytes: a field header and a length.
DIGEST_PATTERN = re.compile(
    re.escape(DIGEST_KEY).encode() + rb".{2}sha256:([0-9a-f]{64})", re.DOTALL
)
FOOTER_END = 8  # bytes after the footer: its length, and PAR1
CHUNK = 1 << 20  # bytes read at once


def write_groups(
    schema: arrow.Schema, groups: Iterable[Sequence[Mapping[str, Any]]], path: Path
) -> None:
    """Write groups of rows as a Parquet file with its digest.

    Args:
        schema: Of the file.
        groups: The rows of each row group.
        path: The file; not written atomically.
    """
    # No statistics of floats: DuckDB would evaluate isnan() from them and miss a NaN.
    counted = [field.name for field in schema if not arrow.types.is_floating(field.type)]
    with arrow.parquet.ParquetWriter(
        path.absolute(), schema, compression="zstd", write_statistics=counted
    ) as writer:
        for group in groups:
            writer.write_table(arrow.Table.from_pylist(group, schema=schema))
        writer.add_key_value_metadata({DIGEST_KEY: f"sha256:{NO_DIGEST}"})
    write_digest(path)


def write_digest(path: Path) -> None:
    """Write the digest of a new Parquet file into its footer."""
    with path.open("r+b") as file:
        found = _find_digest(file)
        if found is None:
            raise RuntimeError(f"{path}: no place for the digest in the footer")
        digest = _compute_digest(file, found.offset)
        file.seek(found.offset)
        file.write(digest.encode())


def verify_digest(path: Path, name: Path) -> str | None:
    """Compare a Parquet file with the digest in its footer, and return it; None without one.

    Raises:
        DataError: They differ.
    """
    with path.open("rb") as file:
        found = _find_digest(file)
        if found is None:
            return None
        if _compute_digest(file, found.offset) != found.value:
            raise DataError(
                expected="the bytes that were written",
                got="other bytes: their SHA-256 is not the one in the footer",
                where=str(name),
                fix="delete the file, run its stage again, and check the disk",
            )
    return found.value


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
