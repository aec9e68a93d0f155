"""Inputs of the report: outputs of the stages, the tables as views of one database."""

import contextlib
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import (
    Candidates,
    Histories,
    Items,
    PerSequence,
    Popularity,
    Preferences,
    Scores,
    Sequences,
    Summaries,
)
from mllm_msr.core.tables import read_table


@dataclass(frozen=True)
class Inputs:
    """The folders and tables that the report reads.

    Attributes:
        dropped: Document of ``preprocess`` with the number of dropped rows by reason.
        filtered: Folder of ``filter_sequences``.
        images: The table Images.
        summaries: The table Summaries.
        preferences: The table Preferences.
        trained: Folder of ``sft``.
        scores: The table Scores.
        evaluated: Folder of ``evaluate``.
        studies: Folder with a folder for each study; it may be missing.
    """

    dropped: Path
    filtered: Path
    images: Path
    summaries: Path
    preferences: Path
    trained: Path
    scores: Path
    evaluated: Path
    studies: Path


@contextlib.contextmanager
def open_tables(inputs: Inputs, sampling: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database with the tables as views.

    The views are sequences, histories, popularity, items, summaries, preferences, scores,
    candidates and per_sequence. The last two have the rows of test and of one sampling of
    negatives; all_per_sequence has every split and sampling.

    Args:
        inputs: The tables.
        sampling: Of the negatives in the views candidates and per_sequence.

    Raises:
        DataError: A table is missing or breaks its model.
    """
    filtered = inputs.filtered
    with duckdb.connect() as connection:
        for model, path, name in (
            (Sequences, filtered / "sequences.parquet", "sequences"),
            (Histories, filtered / "histories.parquet", "histories"),
            (Candidates, filtered / "test_candidates.parquet", "all_candidates"),
            (Popularity, filtered / "popularity.parquet", "popularity"),
            (Items, filtered / "items.parquet", "items"),
            (Summaries, inputs.summaries, "summaries"),
            (Preferences, inputs.preferences, "preferences"),
            (Scores, inputs.scores, "scores"),
            (PerSequence, inputs.evaluated / "per_sequence.parquet", "all_per_sequence"),
        ):
            read_table(model, connection, path, name)
        chosen = f"WHERE sampling = '{sampling}'"  # a constant; views take no parameters
        connection.execute(f"CREATE VIEW candidates AS FROM all_candidates {chosen}")
        connection.execute(
            f"CREATE VIEW per_sequence AS FROM all_per_sequence {chosen} AND split = 'test'"
        )
        yield connection


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """Read a stage's JSON document.

    Raises:
        DataError: It is missing or no JSON object.
    """
    fix = f"run the stage {stage}"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            expected="a JSON document", got="no such file", where=str(path), fix=fix
        ) from error
    except ValueError as error:
        raise DataError(
            expected="a JSON document", got=str(error), where=str(path), fix=fix
        ) from error
    if not isinstance(document, dict):
        raise DataError(
            expected="a JSON object", got=type(document).__name__, where=str(path), fix=fix
        )
    return document


def read_csv(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    """Read a small file of separated values with a header, as it is written.

    Raises:
        DataError: It is missing.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, delimiter=delimiter))
    except FileNotFoundError as error:
        fix = "run the stage that writes it"
        raise DataError(expected="a table", got="no such file", where=str(path), fix=fix) from error
