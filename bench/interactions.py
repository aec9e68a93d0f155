"""Generator of synthetic interactions: Zipf items, log-normal history lengths, drifting tastes.

    python -m bench.interactions data/raw/tables --millions 1

Writes Parquet files in the format of the source ``tables``, by DuckDB alone, so that a hundred
million rows take minutes. Random numbers are hashes of seed, user and step: the same seed gives the
same rows.
"""

from pathlib import Path
from typing import Annotated

import duckdb
import typer

MEAN_LENGTH = 9  # interactions per user
SPREAD = 0.6  # standard deviation of the logarithm of a user's interactions
ITEMS_PER_MILLION = 20_000
GROUPS = 50  # groups of items, one per taste
LOYALTY = 0.5  # share of interactions with items of the user's group


def uniform(purpose: str) -> str:
    """Return the SQL for a number in [0, 1) that depends on seed, user, step and purpose.

    It is hashed twice: DuckDB combines the last argument by exclusive or only, so that the numbers
    of one step would be correlated.
    """
    return f"((hash(hash(seed, u, step, '{purpose}')) >> 11) / 9007199254740992.0)"


def write_interactions(
    folder: Path,
    rows: int,
    seed: int = 0,
    mean_length: int = MEAN_LENGTH,
    items_per_million: int = ITEMS_PER_MILLION,
) -> tuple[int, int]:
    """Write ``interactions.parquet`` and ``items.parquet``.

    A user prefers one group of items, and another one after half of the interactions. Within a
    group and over all items, the item of rank r has the weight 1/r.

    Args:
        folder: Folder of the two files.
        rows: Approximate number of interactions; some (user, item) pairs repeat.
        seed: Random seed.
        mean_length: Interactions per user.
        items_per_million: Items per million interactions.

    Returns:
        The number of users and of items.
    """
    folder.mkdir(parents=True, exist_ok=True)
    users = rows // mean_length
    items = max(2 * GROUPS, rows * items_per_million // 1_000_000)
    normal = f"sqrt(-2 * ln(1 - {uniform('radius')})) * cos(2 * pi() * {uniform('angle')})"
    length = f"greatest(1, round({mean_length} * exp({SPREAD} * {normal} - {SPREAD**2 / 2})))"
    anywhere = f"floor(pow({items}, {uniform('item')}))"
    inside = f"(floor(pow({items // GROUPS}, {uniform('item')})) - 1) * {GROUPS} + taste + 1"
    with duckdb.connect() as connection:
        connection.execute("SET preserve_insertion_order = false")
        connection.sql(
            f"""
                WITH users AS (SELECT range AS u, {seed} AS seed, 0 AS step FROM range({users})),
                lengths AS (SELECT u, seed, {length}::INTEGER AS length FROM users),
                steps AS (
                    SELECT u, seed, length, unnest(range(length)) AS step FROM lengths
                ),
                tastes AS (
                    SELECT *, hash(seed, u, step * 2 >= length, 'taste') % {GROUPS} AS taste
                    FROM steps
                )
                SELECT 'u' || u AS user,
                    'i' || CAST(CASE WHEN {uniform("loyal")} < {LOYALTY} THEN {inside}
                        ELSE {anywhere} END AS BIGINT) AS item,
                    1600000000000 + (hash(seed, u, 'start') % 100000000000)::BIGINT
                        + step * 86400000 AS timestamp
                FROM tastes"""
        ).write_parquet(str(folder.absolute() / "interactions.parquet"))
        connection.sql(
            "SELECT 'i' || range AS item, 'Item ' || range AS title"
            f" FROM range(1, {items + GROUPS + 1})"
        ).write_parquet(str(folder.absolute() / "items.parquet"))
    return users, items


def main(
    folder: Path,
    millions: Annotated[float, typer.Option(help="Million interactions.")] = 1,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Write synthetic interactions and items."""
    users, items = write_interactions(folder, int(millions * 1_000_000), seed)
    typer.echo(f"wrote {folder}: {users:,} users, {items:,} items")


if __name__ == "__main__":
    typer.run(main)
