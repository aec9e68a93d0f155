"""Read the lists of the evaluation on the whole catalogue from the stages' tables.

Joins drop nothing: a sequence without a list, or a list whose items the model did not score, is an
error.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
from scipy import sparse

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import FirstItems, Items, Popularity, Retrieved, Scores, Sequences
from mllm_msr.core.tables import read_table
from mllm_msr.evaluation.full_catalogue import Catalogue, Lists, Reranked
from mllm_msr.evaluation.scorers import SCORERS

FIX = "run the stages retrieve and rerank again"
NUMBERED = """
    CREATE TABLE items AS
    SELECT item, row_number() OVER (ORDER BY item) - 1 AS number, interactions, title
    FROM popularity LEFT JOIN catalogue USING (item);
"""
LISTS = """
    SELECT sequence, number AS item, rank, score, items.item = target AS label, {log_odds}
    FROM {table} JOIN sequences USING (split, sequence) JOIN items USING (item) {scores}
    WHERE {where} ORDER BY sequence, rank
"""


class RetrievedLists(NamedTuple):
    """All that the tables say.

    Attributes:
        valid: The retriever's lists of the sequences of valid.
        test: Those of test.
        baselines: Lists of test by each other scorer, in the order of ``SCORERS``.
        catalogue: All items.
    """

    valid: Reranked
    test: Reranked
    baselines: dict[str, Lists]
    catalogue: Catalogue


def read_lists(retrieved: Path, reranked: Path, filtered: Path) -> RetrievedLists | None:
    """Read the lists of a retriever, the model's scores of them, and the baselines' lists.

    Args:
        retrieved: Folder of the stage ``retrieve``.
        reranked: The table of the stage ``rerank``; without rows, no model was run.
        filtered: Folder of ``filter_sequences``.

    Returns:
        The lists, or None where the retriever was left out.

    Raises:
        DataError: A table is missing or breaks its model, or they are not of one run.
    """
    tables: dict[str, tuple[Any, Path]] = {
        "candidates": (Retrieved, retrieved / "candidates.parquet"),
        "baselines": (FirstItems, retrieved / "baselines.parquet"),
        "scores": (Scores, reranked),
        "all_sequences": (Sequences, filtered / "sequences.parquet"),
        "popularity": (Popularity, filtered / "popularity.parquet"),
        "catalogue": (Items, filtered / "items.parquet"),
    }
    with duckdb.connect() as connection:
        for name, (model, path) in tables.items():
            read_table(model, connection, path, name)
        if not _count(connection, "candidates"):
            return None
        connection.execute("CREATE TABLE sequences AS FROM all_sequences WHERE used")
        connection.execute(NUMBERED)
        _refuse_other_runs(connection, retrieved)
        valid, test = (_read_reranked(connection, split) for split in ("valid", "test"))
        names = [
            name
            for (name,) in connection.execute("SELECT DISTINCT scorer FROM baselines").fetchall()
        ]
        others = {
            name: _read_list(connection, "baselines", "scorer = ?", [name])[0]
            for name in sorted(names, key=SCORERS.index)
        }
        return RetrievedLists(valid, test, others, _read_catalogue(connection))


def _count(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    (row,) = connection.execute(f"SELECT count(*) FROM {table}").fetchall()
    return int(row[0])


def _refuse_other_runs(connection: duckdb.DuckDBPyConnection, where: Path) -> None:
    """Refuse lists of other sequences or items, and scores of other pairs."""
    asked = "(FROM sequences WHERE split <> 'train')"
    checks = {
        "a list for each used sequence of valid and test": (
            f"SELECT sequence FROM {asked} FULL JOIN (SELECT DISTINCT split, sequence, 1 AS listed"
            " FROM candidates) USING (split, sequence) WHERE target IS NULL OR listed IS NULL"
        ),
        "items of the catalogue": (
            "FROM (SELECT item FROM candidates UNION ALL SELECT item FROM baselines)"
            " ANTI JOIN items USING (item)"
        ),
        "lists of each baseline for the used sequences of test": (
            "SELECT scorer FROM (SELECT DISTINCT scorer, sequence FROM baselines) GROUP BY scorer"
            " HAVING count(*) <> (SELECT count(*) FROM sequences WHERE split = 'test')"
        ),
    }
    if _count(connection, "scores"):
        checks["a score of the model for each candidate"] = (
            "SELECT sequence FROM candidates FULL JOIN scores USING (split, sequence, item)"
            " WHERE log_odds IS NULL OR rank IS NULL"
        )
    for expected, query in checks.items():
        if found := len(connection.execute(query).fetchall()):
            raise DataError(expected=expected, got=f"{found:,} others", where=str(where), fix=FIX)


def _read_reranked(connection: duckdb.DuckDBPyConnection, split: str) -> Reranked:
    """Read the retriever's lists of a split, and the model's scores if there are any."""
    lists, scores = _read_list(connection, "candidates", "split = ?", [split])
    return Reranked(lists, scores if _count(connection, "scores") else None)


def _read_list(
    connection: duckdb.DuckDBPyConnection, table: str, where: str, values: Sequence[str]
) -> tuple[Lists, npt.NDArray[np.float64]]:
    """Read the lists of a table, and the model's scores of their rows."""
    has_scores = table == "candidates"
    join = "LEFT JOIN scores USING (split, sequence, item)" if has_scores else ""
    query = LISTS.format(
        table=table,
        log_odds="log_odds" if has_scores else "NULL::DOUBLE AS log_odds",
        scores=join,
        where=where,
    )
    columns = connection.execute(query, list(values)).fetchnumpy()
    sequences, rows = np.unique(columns["sequence"], return_inverse=True)
    lists = Lists(
        sequences, rows, columns["item"], columns["score"], columns["label"], columns["rank"]
    )
    return lists, np.ma.filled(columns["log_odds"], np.nan)


def _read_catalogue(connection: duckdb.DuckDBPyConnection) -> Catalogue:
    """Read the interactions of each item, and vectors of the titles."""
    columns = connection.execute(
        "SELECT interactions, coalesce(title, '') AS title FROM items ORDER BY number"
    ).fetchnumpy()
    return Catalogue(columns["interactions"], _vectorize(columns["title"].tolist()))


def _vectorize(titles: Sequence[str]) -> sparse.csr_array:
    """Return TF-IDF vectors of the words of titles, of unit length; zeros without a word."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    vectorizer = TfidfVectorizer(sublinear_tf=True)
    analyze = vectorizer.build_analyzer()
    if not any(analyze(title) for title in titles):
        return sparse.csr_array((len(titles), 1))
    return sparse.csr_array(vectorizer.fit_transform(titles))
