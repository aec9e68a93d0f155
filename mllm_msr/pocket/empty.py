"""A pocket world without rows, for a run on other data: raw files with headers, an empty oracle.

The stage writes these in every run on other data, so this module imports nothing of what generates
a world and nothing of what checks tables.
"""

import csv
from collections.abc import Iterable
from pathlib import Path

import pyarrow as arrow

from mllm_msr.core.files import atomic_write
from mllm_msr.core.parquet import write_groups

ITEM_COLUMNS = ("item", "title", "description", "image")
INTERACTION_COLUMNS = ("user", "item", "timestamp")
# That of the table Oracle; a test compares both.
ORACLE_SCHEMA = arrow.schema(
    [("user", arrow.string()), ("item", arrow.string()), ("utility", arrow.float64())]
)


def write_empty_world(folder: Path, oracle: Path) -> None:
    """Write raw files and an oracle without rows."""
    with atomic_write(folder) as temporary:
        (temporary / "images").mkdir(parents=True)
        write_csv(temporary / "items.csv", ITEM_COLUMNS, [])
        write_csv(temporary / "interactions.csv", INTERACTION_COLUMNS, [])
    with atomic_write(oracle) as temporary:
        write_groups(ORACLE_SCHEMA, [], temporary)


def write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    """Write a CSV file with a header."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
