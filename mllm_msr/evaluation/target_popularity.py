"""Target popularity: how often an item is the target of a training sequence."""

from pathlib import Path

import duckdb

from mllm_msr.core.schemas import Popularity, Sequences
from mllm_msr.core.tables import read_table


def count_target_popularity(
    connection: duckdb.DuckDBPyConnection, filtered: Path, only_used: bool
) -> None:
    """Make the table ``target_popularity``: training targets per item, plus popularity below 1.

    Args:
        connection: A database; the views ``sequences`` and ``popularity`` are made too.
        filtered: Folder of ``filter_sequences``.
        only_used: Whether used training sequences only are counted.

    Raises:
        DataError: A table is missing or breaks its model.
    """
    read_table(Sequences, connection, filtered / "sequences.parquet", "sequences")
    read_table(Popularity, connection, filtered / "popularity.parquet", "popularity")
    connection.execute(
        f"""
        CREATE TABLE target_popularity AS
        WITH counts AS (
            SELECT target AS item, count(*) AS targets FROM sequences
            WHERE split = 'train' {"AND used" if only_used else ""} GROUP BY target
        )
        SELECT item, coalesce(targets, 0)
            + interactions / (max(interactions) OVER () + 1) AS target_popularity
        FROM popularity LEFT JOIN counts USING (item)
        """
    )
