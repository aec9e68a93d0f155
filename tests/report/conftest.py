"""A finished run, written once for the tests of the report."""

import shutil
from pathlib import Path

import pytest
from report_world import write_report_world

from mllm_msr.report.inputs import Inputs


def inputs_in(folder: Path) -> Inputs:
    """Return the inputs of a copy of the finished run."""
    return Inputs(
        dropped=folder / "preprocess" / "dropped.json",
        filtered=folder / "filter_sequences",
        images=folder / "fetch_images" / "images.parquet",
        summaries=folder / "summarize_items" / "summaries.parquet",
        preferences=folder / "infer_preferences" / "preferences.parquet",
        trained=folder / "sft",
        scores=folder / "score" / "scores.parquet",
        evaluated=folder / "evaluate",
        studies=folder / "studies",
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Return a finished run; read only."""
    return write_report_world(tmp_path_factory.mktemp("run"))


@pytest.fixture
def copy(finished: Inputs, tmp_path: Path) -> Inputs:
    """Return a copy of the finished run, to be changed."""
    shutil.copytree(finished.filtered.parent, tmp_path / "run")
    return inputs_in(tmp_path / "run")
