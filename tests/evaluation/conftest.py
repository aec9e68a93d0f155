"""A world of three items, written once."""

import shutil
from pathlib import Path

import pytest
from three_items import write_world


@pytest.fixture(scope="session")
def untouched_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a world; read only."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture
def world(untouched_world: Path, tmp_path: Path) -> Path:
    """Return a copy of the world, to be changed."""
    return Path(shutil.copytree(untouched_world, tmp_path, dirs_exist_ok=True))
