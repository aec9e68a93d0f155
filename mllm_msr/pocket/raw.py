"""Output of a pocket world: raw files in the format of the source ``tables``, and the oracle.

The oracle, each user's true utility of each item, is a separate table that only the evaluation
reads.
"""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as arrow

from mllm_msr.core import schemas, tables
from mllm_msr.core.files import atomic_write
from mllm_msr.pocket.empty import INTERACTION_COLUMNS, ITEM_COLUMNS, write_csv
from mllm_msr.pocket.world import World


def write_raw(world: World, folder: Path) -> int:
    """Write interactions, items and images atomically; return the number of interactions."""
    interactions = sorted(
        (timestamp, user.user, world.items[number].item)
        for user in world.users
        for number, timestamp in zip(user.items, user.timestamps, strict=True)
    )
    with atomic_write(folder) as temporary:
        (temporary / "images").mkdir(parents=True)
        for item in world.items:
            item.draw().save(temporary / "images" / f"{item.item}.png")
        write_csv(
            temporary / "items.csv",
            ITEM_COLUMNS,
            ((i.item, i.title, i.description or "", f"images/{i.item}.png") for i in world.items),
        )
        write_csv(
            temporary / "interactions.csv",
            INTERACTION_COLUMNS,
            ((user, item, timestamp) for timestamp, user, item in interactions),
        )
    return len(interactions)


def write_oracle(world: World, path: Path) -> int:
    """Write each item's log choice weight for each user's final taste; return how many."""
    users = np.repeat([user.user for user in world.users], len(world.items))
    items = np.tile([item.item for item in world.items], len(world.users))
    utility = np.concatenate([user.utility for user in world.users])
    with duckdb.connect() as connection:
        rows = {"user": users, "item": items, "utility": utility}
        connection.register("truth", arrow.table(rows))
        query = 'SELECT "user", item, utility FROM truth ORDER BY "user", item'
        return tables.write_query(schemas.Oracle, connection, query, path)
