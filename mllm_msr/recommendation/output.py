"""Recommendations as a table for people, JSON Lines, CSV or Parquet."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as arrow
import pyarrow.parquet

from mllm_msr.core.files import atomic_write

if TYPE_CHECKING:  # the module loads torch
    from mllm_msr.recommendation.recommender import Recommendations

SCHEMA = arrow.schema(
    [
        arrow.field("user", arrow.string()),  # null for a history that was given
        arrow.field("rank", arrow.int32(), nullable=False),  # from 1
        arrow.field("item", arrow.string(), nullable=False),
        arrow.field("title", arrow.string()),
        arrow.field("p_yes", arrow.float64()),  # null where no model ranked
        arrow.field("log_odds", arrow.float64()),
        arrow.field("retriever", arrow.string()),  # null for an item new to the catalogue
        arrow.field("retriever_rank", arrow.int32()),  # from 1
    ]
)
EXPLANATION = (  # further columns of an explained recommendation
    arrow.field("history", arrow.list_(arrow.string())),  # oldest first
    arrow.field("preferences", arrow.list_(arrow.string())),  # after each block
)
ROWS_PER_GROUP = 10_000


class Format(StrEnum):
    """Forms of output."""

    TABLE = "table"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


def write(
    found: Iterable["Recommendations"], form: Format, path: Path | None, *, explain: bool
) -> int:
    """Write recommendations and return the number of rows.

    Args:
        found: The recommendations of each user.
        form: Of the output; Parquet needs a path.
        path: The file, which appears when all rows are in it; None: standard output.
        explain: Whether to add the history and the preference after each block.

    Raises:
        DataError: The disk is full.
    """
    if form is Format.PARQUET:
        assert path, "checked by the command"
        return _write_parquet(found, path, explain=explain)
    writers = {Format.TABLE: _write_table, Format.JSONL: _write_jsonl, Format.CSV: _write_csv}
    with _open(path) as file:
        return writers[form](found, file, explain)


def rows_of(found: "Recommendations", *, explain: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for each recommended item, with the columns of :data:`SCHEMA`.

    Args:
        found: The recommendations of one user.
        explain: Whether to add the columns of :data:`EXPLANATION`.
    """
    history = [each.item for each in found.history]
    reasons = {"history": history, "preferences": list(found.preferences)}
    for item in found.items:
        yield {"user": found.user} | item._asdict() | (reasons if explain else {})


@contextmanager
def _open(path: Path | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
        return
    with (
        atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        yield file


def _write_table(found: Iterable["Recommendations"], file: IO[str], explain: bool) -> int:
    written = 0
    for each in found:
        retriever = next((item.retriever for item in each.items if item.retriever), "")
        lines = [["rank", "item", "title", "p(yes)", retriever]]
        for item in each.items:
            p_yes = "" if item.p_yes is None else f"{item.p_yes:.3f}"
            cells = [str(item.rank), item.item, item.title or "", p_yes]
            place = "new" if item.retriever_rank is None else str(item.retriever_rank)
            lines.append([*cells, place])
        heading = [f"user {each.user}"] if each.user is not None else []
        if explain:
            heading += ["history, oldest first:"]
            heading += [f"  {taken.item}  {taken.title or ''}".rstrip() for taken in each.history]
            heading += ["preference after each block:"] if each.preferences else []
            heading += [f"  {n}. {text}" for n, text in enumerate(each.preferences, start=1)]
            heading += [""]
        file.write("\n".join([*heading, *_align(lines), ""]) + "\n")
        written += len(each.items)
    return written


def _align(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _write_jsonl(found: Iterable["Recommendations"], file: IO[str], explain: bool) -> int:
    written = 0
    for each in found:
        for row in rows_of(each, explain=explain):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    return written


def _write_csv(found: Iterable["Recommendations"], file: IO[str], explain: bool) -> int:
    names = [*SCHEMA.names, *(field.name for field in EXPLANATION if explain)]
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    written = 0
    for each in found:
        for row in rows_of(each, explain=explain):
            lists = {
                name: json.dumps(v, ensure_ascii=False)
                for name, v in row.items()
                if isinstance(v, list)
            }
            writer.writerow(row | lists)
            written += 1
    return written


def _write_parquet(found: Iterable["Recommendations"], path: Path, *, explain: bool) -> int:
    schema = arrow.schema([*SCHEMA, *(EXPLANATION if explain else ())])
    written, rows = 0, list[dict[str, Any]]()
    with (
        atomic_write(path) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, schema) as writer,
    ):
        for each in found:
            rows += rows_of(each, explain=explain)
            if len(rows) >= ROWS_PER_GROUP:
                writer.write_table(arrow.Table.from_pylist(rows, schema))
                written, rows = written + len(rows), []
        writer.write_table(arrow.Table.from_pylist(rows, schema))
    return written + len(rows)
