"""Fixtures that read a folder of raw files as the stage preprocess does, without writing tables."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest

from mllm_msr.core.params import PreprocessParams
from mllm_msr.data.sources import SOURCES
from mllm_msr.data.sources.cleaning import IMAGES, INTERACTIONS, ITEMS, clean
from mllm_msr.data.sources.tables import DEFAULT_LAYOUT

Read = Callable[..., SimpleNamespace]

AMAZON = {
    "category": "Small_Things",
    "min_rating": 0.0,
    "verified_only": False,
    "bad_records": "error",
    "text_length": 2000,
    "image_size": "large",
}


TABLES = DEFAULT_LAYOUT.model_dump()


@pytest.fixture
def read() -> Read:
    def read_folder(
        folder: Path,
        source: str = "tables",
        unknown_items: str = "error",
        covers: str = "optional",
        tables: dict[str, Any] | None = None,
        **amazon: Any,
    ) -> SimpleNamespace:
        settings = PreprocessParams.model_validate(
            {
                "source": source,
                "unknown_items": unknown_items,
                "allow_pocket_model": False,
                "microlens": {"covers": covers},
                "amazon": AMAZON | amazon,
                "tables": TABLES | (tables or {}),
            }
        )
        with duckdb.connect() as connection:
            files = SOURCES[source](connection, folder, settings)
            known, unknown = clean(connection, files, unknown_items)
            interactions, items, images = (
                connection.execute(query).fetchall() for query in (INTERACTIONS, ITEMS, IMAGES)
            )
        dropped = files.dropped | unknown
        dropped["repeated_interactions"] = known - len(interactions)
        return SimpleNamespace(
            interactions=interactions, items=items, images=images, dropped=dropped
        )

    return read_folder


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A small folder in the format of the source ``tables``."""
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "interactions.csv").write_text(
        "user,item,timestamp\n"
        "ann,001,1700000003000\n"
        "bob,1,1700000001000\n"
        "ann,1,1700000001000\n"
        "ann,001,1700000002000\n"
    )
    (folder / "items.csv").write_text("item,title\n001,Red kettle\n1,Blue teapot\n")
    return folder
