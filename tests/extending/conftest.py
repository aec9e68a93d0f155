"""A copy of the project, to be extended."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Copy the code and the settings, without weights."""
    for name in ("mllm_msr", "stages"):
        ignored = shutil.ignore_patterns("*.safetensors", "__pycache__")
        shutil.copytree(name, tmp_path / name, ignore=ignored)
    shutil.copy("params.yaml", tmp_path)
    return tmp_path
