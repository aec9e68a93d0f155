"""Benchmarks of the data stages: the synthetic data, and agreement with the reference."""

import csv
import json
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pytest

from bench.data import CORE, compare
from bench.images import compare_decoding, measure, write_images
from bench.interactions import ITEMS_PER_MILLION, MEAN_LENGTH, SPREAD, write_interactions

ROWS = 90_000


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> duckdb.DuckDBPyConnection:
    """Synthetic interactions as the table ``log``."""
    folder = tmp_path_factory.mktemp("log")
    write_interactions(folder, ROWS, seed=3)
    connection = duckdb.connect()
    connection.execute(f"CREATE TABLE log AS FROM '{folder}/interactions.parquet'")
    connection.execute(f"CREATE TABLE items AS FROM '{folder}/items.parquet'")
    return connection


def column(log: duckdb.DuckDBPyConnection, query: str) -> np.ndarray:
    return next(iter(log.execute(query).fetchnumpy().values()))


def rows(folder: Path, seed: int) -> list[tuple[object, ...]]:
    write_interactions(folder, 2_000, seed)
    return duckdb.sql(f"FROM '{folder}/interactions.parquet' ORDER BY ALL").fetchall()


def test_interactions_depend_on_the_seed_only(tmp_path: Path) -> None:
    first = rows(tmp_path / "a", 1)
    assert first == rows(tmp_path / "b", 1)
    assert first != rows(tmp_path / "c", 2)


def test_the_number_of_interactions_is_about_as_requested(log: duckdb.DuckDBPyConnection) -> None:
    assert column(log, "SELECT count(*) FROM log")[0] == pytest.approx(ROWS, rel=0.03)


def test_every_interaction_is_with_an_item_of_the_catalogue(
    log: duckdb.DuckDBPyConnection,
) -> None:
    assert column(log, "SELECT count(*) FROM log ANTI JOIN items USING (item)")[0] == 0


def test_item_counts_follow_zipfs_law(log: duckdb.DuckDBPyConnection) -> None:
    counts = column(log, "SELECT count(*) AS n FROM log GROUP BY item ORDER BY n DESC")
    assert len(counts) > 0.8 * ROWS * ITEMS_PER_MILLION / 1_000_000
    ranks = np.arange(1, len(counts) + 1)
    middle = slice(50, len(counts) // 2)  # the first of each group have about one rank
    slope, _ = np.polyfit(np.log(ranks[middle]), np.log(counts[middle]), 1)
    assert slope == pytest.approx(-1, abs=0.25)


def test_history_lengths_are_log_normal(log: duckdb.DuckDBPyConnection) -> None:
    lengths = column(log, 'SELECT count(*) AS n FROM log GROUP BY "user"')
    assert lengths.mean() == pytest.approx(MEAN_LENGTH, rel=0.05)
    logarithms = np.log(lengths)
    assert logarithms.std() == pytest.approx(SPREAD, abs=0.05)
    assert np.median(lengths) == pytest.approx(MEAN_LENGTH * np.exp(-(SPREAD**2) / 2), abs=1)


def test_tastes_drift_after_half_of_the_interactions(log: duckdb.DuckDBPyConnection) -> None:
    """Two items of the same half share a group far more often than items of different halves."""
    log.execute(
        """CREATE OR REPLACE TABLE halves AS
        SELECT "user", (substr(item, 2)::BIGINT - 1) % 50 AS taste,
            2 * row_number() OVER (PARTITION BY "user" ORDER BY timestamp)
                <= count(*) OVER (PARTITION BY "user") AS early
        FROM log"""
    )
    same, other = column(
        log,
        """SELECT avg((a.taste = b.taste)::INTEGER) AS share
        FROM halves AS a JOIN halves AS b USING ("user")
        WHERE a.rowid < b.rowid GROUP BY a.early = b.early ORDER BY a.early = b.early DESC""",
    )
    assert same > 3 * other


def test_both_implementations_find_the_same_k_core(tmp_path: Path) -> None:
    """``compare`` itself refuses different k-cores."""
    lists = duckdb.sql(
        f"""SELECT substr("user", 2) AS "user",
            string_agg(DISTINCT substr(item, 2), ' ' ORDER BY substr(item, 2)) AS items
        FROM '{write_log(tmp_path / "log")}' GROUP BY 1"""
    ).fetchall()
    items = {item for _, taken in lists for item in taken.split()}
    (tmp_path / "MicroLens-0k_pairs.tsv").write_text("".join(f"{u}\t{i}\n" for u, i in lists))
    with (tmp_path / "MicroLens-0k_titles.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("item", "title"), *((item, "x") for item in items)])
    found = compare(tmp_path)
    kept = reference_core({(user, item) for user, taken in lists for item in taken.split()})
    assert (found["users_kept"], found["items_kept"]) == tuple(map(len, kept))
    assert 0 < found["users_kept"] < len(lists)


def write_log(folder: Path) -> Path:
    write_interactions(folder, 6_000)
    return folder / "interactions.parquet"


def reference_core(pairs: set[tuple[str, str]]) -> tuple[set[str], set[str]]:
    """Remove users and items with too few interactions until nothing changes."""
    while True:
        users = Counter(user for user, _ in pairs)
        items = Counter(item for _, item in pairs)
        kept = {
            (user, item)
            for user, item in pairs
            if users[user] >= CORE["min_user_interactions"]
            and items[item] >= CORE["min_item_interactions"]
        }
        if kept == pairs:
            return set(users), set(items)
        pairs = kept


def test_decoding_at_a_lower_scale_is_compared_with_a_full_decode(tmp_path: Path) -> None:
    write_images(tmp_path, images=2)
    found = compare_decoding(sorted((tmp_path / "drawn").iterdir()), side=336)
    assert 0 < found["full_difference"] < found["difference"] < 1.5 * found["full_difference"]
    unscaled = compare_decoding(sorted((tmp_path / "drawn").iterdir()), side=672)
    assert unscaled["full_difference"] == unscaled["difference"]


def test_the_image_benchmark_runs(tmp_path: Path) -> None:
    size = write_images(tmp_path, images=3)
    found = measure(tmp_path, images=3, side=64)
    assert json.loads(json.dumps(found)) == found
    assert 0 < found["bytes_per_image"] < size
