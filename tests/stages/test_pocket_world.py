"""The stage pocket_world writes the pocket world, or empty tables for other sources."""

from pathlib import Path

import pytest
import yaml

from mllm_msr.core.schemas import Oracle
from mllm_msr.core.tables import read_rows
from stages.pocket_world import pocket_world


@pytest.fixture
def params(tmp_path: Path) -> Path:
    settings = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    settings["pocket_world"] |= {"users": 10, "items": 50}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def choose(params: Path, source: str) -> None:
    settings = yaml.safe_load(params.read_text(encoding="utf-8"))
    settings["preprocess"]["source"] = source
    params.write_text(yaml.safe_dump(settings), encoding="utf-8")


def test_another_source_writes_empty_tables(
    params: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, oracle = tmp_path / "raw", tmp_path / "oracle.parquet"
    pocket_world(params=params, raw=raw, oracle=oracle)
    assert len(list((raw / "images").iterdir())) == 50
    assert len(list(read_rows(Oracle, oracle, "1"))) == 500
    capsys.readouterr()
    choose(params, "tables")
    pocket_world(params=params, raw=raw, oracle=oracle)
    said = f"preprocess.source is tables: wrote {raw} and {oracle} without rows\n"
    assert capsys.readouterr().out == said
    assert list((raw / "images").iterdir()) == []
    assert (raw / "interactions.csv").read_text(encoding="utf-8") == "user,item,timestamp\n"
    assert list(read_rows(Oracle, oracle, "1")) == []
