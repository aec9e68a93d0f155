"""Synthetic interactions of any size: Zipf items, log-normal lengths, tastes that drift.

    python -m bench.interactions data/raw/tables --millions 1

Written in the form of one's own tables, as Parquet, by DuckDB alone, so that a hundred million rows
are a matter of minutes. Chance is a hash of seed, user and step: the same seed gives the same rows.
"""

from pathlib import Path
from typing import Annotated

import duckdb
import typer

MEAN_LENGTH = 9  # interactions of a user
SPREAD = 0.6  # of the logarithm of a user's length
ITEMS_PER_MILLION = 20_000
GROUPS = 50  # of items that please the same taste
LOYALTY = 0.5  # share of interactions with items of the user's group


def chance(what: str) -> str:
    """Write SQL for a number in [0, 1) that depends on seed, user, step and what it is for.

    Hashed twice: DuckDB mixes the last argument in by a mere exclusive or, and two numbers of one
    step that are for different things would hang together.
    """
    return f"((hash(hash(seed, u, step, '{what}')) >> 11) / 9007199254740992.0)"


def write_interactions(folder: Path, rows: int, seed: int = 0) -> tuple[int, int]:
    """Write ``interactions.parquet`` and ``items.parquet``.

    A user likes one group of items, and after half of the interactions another one. Within a group
    and over all, the item of rank r is taken with a weight of 1/r.

    Args:
        folder: Where the two files go.
        rows: How many interactions, about; some pairs of user and item repeat.
        seed: Of everything.

    Returns:
        How many users and items there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    users, items = rows // MEAN_LENGTH, max(2 * GROUPS, rows * ITEMS_PER_MILLION // 1_000_000)
    normal = f"sqrt(-2 * ln(1 - {chance('radius')})) * cos(2 * pi() * {chance('angle')})"
    length = f"greatest(1, round({MEAN_LENGTH} * exp({SPREAD} * {normal} - {SPREAD**2 / 2})))"
    anywhere = f"floor(pow({items}, {chance('item')}))"
    inside = f"(floor(pow({items // GROUPS}, {chance('item')})) - 1) * {GROUPS} + taste + 1"
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
                    'i' || CAST(CASE WHEN {chance("loyal")} < {LOYALTY} THEN {inside}
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
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
) -> None:
    """Write synthetic interactions and items."""
    users, items = write_interactions(folder, int(millions * 1_000_000), seed)
    typer.echo(f"wrote {folder}: {users:,} users, {items:,} items")


if __name__ == "__main__":
    typer.run(main)
