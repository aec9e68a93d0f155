"""Join the candidates with the scores of each scorer.

Joins drop nothing: a candidate without exactly one score is an error, and so is a score without a
candidate.
"""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt

from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import (
    PARTIAL_SAMPLINGS,
    SAMPLINGS,
    SPLITS,
    AnyTable,
    Candidates,
    Oracle,
    Popularity,
    Scores,
    Sequences,
)
from mllm_msr.core.tables import read_table
from mllm_msr.evaluation.scorers import BASELINES, MODEL, SCORERS
from mllm_msr.evaluation.target_popularity import count_target_popularity

EVALUATED = ("valid", "test")

Key = tuple[str, str, str]  # sampling, scorer, split


class Source(NamedTuple):
    """Where a scorer's score of a candidate comes from."""

    table: AnyTable | None  # the table to read, if any
    name: str  # of that table in the queries
    score: str  # the column, or an expression
    join: str  # of the table to the candidates; an inner join would drop candidates


class ScoredCandidates(NamedTuple):
    """The candidates of a sampling and split with one scorer's scores, shape [rows] each."""

    sequences: Integers
    scores: Floats
    labels: npt.NDArray[np.bool_]


def _table_of_scores(name: str) -> Source:
    """Return the source of a scorer with a table Scores, which queries call ``name``."""
    return Source(Scores, name, "log_odds", f"LEFT JOIN {name} USING (split, sequence, item)")


SOURCES = {  # of each of SCORERS
    MODEL: _table_of_scores("scores"),
    "oracle": Source(
        Oracle,
        "oracle",
        "utility",
        'LEFT JOIN sequences USING (split, sequence) LEFT JOIN oracle USING ("user", item)',
    ),
    **{name: _table_of_scores(name) for name in BASELINES},
    "target_popularity": Source(
        None, "", "target_popularity", "LEFT JOIN target_popularity USING (item)"
    ),
    "popularity": Source(
        Popularity, "popularity", "interactions", "LEFT JOIN popularity USING (item)"
    ),
    "chance": Source(None, "", "0", ""),
}


def score_candidates(
    paths: Mapping[str, Path | None], filtered: Path, *, only_used: bool = False
) -> dict[Key, ScoredCandidates]:
    """Score the candidates of valid and test by each scorer.

    Args:
        paths: By scorer the file of its scores, which errors name; None leaves the scorer out.
        filtered: Folder of ``filter_sequences``.
        only_used: Whether the popularity of targets counts used training sequences only.

    Returns:
        By sampling, scorer and split, in the order of ``SCORERS``; without splits that have no
        candidates.

    Raises:
        DataError: A table is missing or breaks its model; a candidate has no score, NaN or
            several; a score has no candidate; a sequence lacks candidates, a negative or its
            one target.
    """
    scored: dict[Key, ScoredCandidates] = {}
    with duckdb.connect() as connection:
        _open_candidates(connection, filtered, only_used)
        found = connection.execute("SELECT DISTINCT sampling FROM candidates").fetchall()
        samplings = [sampling for sampling in SAMPLINGS if (sampling,) in found]
        for scorer in SCORERS:
            if (path := paths.get(scorer)) is None:
                continue
            _join_scores(connection, scorer, path)
            for sampling, split in product(samplings, EVALUATED):
                rows = _fetch(connection, sampling, split)
                if len(rows.sequences):
                    scored[sampling, scorer, split] = rows
    return scored


def has_scores(path: Path) -> bool:
    """Return whether a table Scores has a row.

    Raises:
        DataError: It is missing or breaks its model.
    """
    with duckdb.connect() as connection:
        read_table(Scores, connection, path, "scores")
        return bool(connection.execute("FROM scores LIMIT 1").fetchall())


def find_limited_splits(filtered: Path) -> dict[str, dict[str, int]]:
    """Return the number of sequences, used and all, of each split that a budget limits.

    Args:
        filtered: Folder of ``filter_sequences``.
    """
    with duckdb.connect() as connection:
        read_table(Sequences, connection, filtered / "sequences.parquet", "sequences")
        counts = connection.execute(
            "SELECT split, count(*) FILTER (used), count(*) FROM sequences GROUP BY split"
        ).fetchall()
    found = {split: {"used": used, "sequences": total} for split, used, total in counts}
    return {
        split: found[split]
        for split in SPLITS
        if split in found and found[split]["used"] < found[split]["sequences"]
    }


def _open_candidates(
    connection: duckdb.DuckDBPyConnection, filtered: Path, only_used: bool
) -> None:
    """Make the table ``candidates`` of valid and test; refuse sequences without a ranking."""
    count_target_popularity(connection, filtered, only_used)
    for split in EVALUATED:
        path = filtered / f"{split}_candidates.parquet"
        read_table(Candidates, connection, path, f"{split}_candidates")
    parts = (f"SELECT '{split}' AS split, * FROM {split}_candidates" for split in EVALUATED)
    connection.execute(f"CREATE TABLE candidates AS {' UNION ALL BY NAME '.join(parts)}")
    _refuse(
        connection,
        "SELECT 1 AS none WHERE NOT EXISTS (FROM candidates WHERE split = 'test')",
        "candidates of test",
        "splits without any",
        filtered / "test_candidates.parquet",
        "raise filter_sequences.test_share and run the stage filter_sequences again",
    )
    # Partial samplings leave out sequences with too few items (mllm_msr/data/candidates.py).
    _refuse(
        connection,
        "SELECT split, sequence FROM (FROM sequences WHERE used) FULL JOIN"
        " (SELECT DISTINCT split, sequence, true AS listed FROM candidates)"
        " USING (split, sequence) WHERE split != 'train' AND"
        " (target IS NULL OR listed IS NULL AND EXISTS (FROM candidates WHERE sampling NOT IN"
        f" {PARTIAL_SAMPLINGS}))",
        "candidates for exactly the used sequences of valid and test",
        "sequences without counterpart",
        filtered,
        "run the stage filter_sequences again",
    )
    _refuse(
        connection,
        "SELECT split, sequence, count(*) FILTER (label) AS targets, count(*) AS candidates"
        " FROM candidates GROUP BY split, sampling, sequence HAVING targets != 1 OR candidates < 2",
        "one target and at least one negative per sequence",
        "other sequences",
        filtered,
        "run the stage filter_sequences again",
    )


def _join_scores(connection: duckdb.DuckDBPyConnection, scorer: str, path: Path) -> None:
    """Make the table ``scored``: every candidate with the scorer's one score."""
    table, name, score, join = SOURCES[scorer]
    if table:
        read_table(table, connection, path, name)
    if table is Scores:
        _refuse_other_scores(connection, name, path)
    connection.execute(
        "CREATE OR REPLACE TABLE scored AS SELECT sampling, split, sequence, item, label,"
        f" {score}::DOUBLE AS score FROM candidates {join}"
    )
    # NaN is refused here because the check of the table may miss it: DuckDB 2.0 answers isnan() on
    # a Parquet file from its minimum and maximum, which leave NaN out.
    for problem, rows in (
        ("candidates without a score", "FROM scored WHERE score IS NULL"),
        ("candidates with the score NaN", "FROM scored WHERE isnan(score)"),
        (
            "candidates with several scores",
            "FROM scored GROUP BY sampling, split, sequence, item HAVING count(*) > 1",
        ),
    ):
        select = f"SELECT DISTINCT split, sequence, item {rows}"
        fix = "run the stage that writes it again on these candidates"
        _refuse(connection, select, "one number per candidate", problem, path, fix)


def _refuse_other_scores(connection: duckdb.DuckDBPyConnection, name: str, path: Path) -> None:
    """Refuse scores of anything but the candidates."""
    _refuse(
        connection,
        f"SELECT split, sequence, item FROM {name}"
        " ANTI JOIN candidates USING (split, sequence, item)",
        "scores of the candidates of valid and test only",
        "scores without a candidate",
        path,
        "run the stage that writes it again on these candidates, or leave a baseline out of models",
    )


def _refuse(
    connection: duckdb.DuckDBPyConnection,
    query: str,
    expected: str,
    problem: str,
    where: Path,
    fix: str,
) -> None:
    """Raise a DataError with the number of a query's rows and the first of them, if any."""
    result = connection.execute(f"SELECT count(*) OVER (), * FROM ({query}) ORDER BY ALL LIMIT 1")
    names = [column[0] for column in result.description or ()]
    for row in result.fetchall():
        first = ", ".join(f"{name} {value}" for name, value in zip(names[1:], row[1:], strict=True))
        raise DataError(
            expected=expected,
            got=f"{row[0]:,} {problem}, first: {first}",
            where=str(where),
            fix=fix,
        )


def _fetch(connection: duckdb.DuckDBPyConnection, sampling: str, split: str) -> ScoredCandidates:
    """Fetch the scored candidates of a sampling and split."""
    query = (
        "SELECT sequence, score, label FROM scored WHERE sampling = ? AND split = ?"
        " ORDER BY sequence, item"
    )
    columns = connection.execute(query, [sampling, split]).fetchnumpy()
    return ScoredCandidates(columns["sequence"], columns["score"], columns["label"])
