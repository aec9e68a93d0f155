"""The stage pocket_world writes the pocket world, or empty tables for other sources."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mllm_msr.core.schemas import Oracle
from mllm_msr.core.tables import arrow_schema, read_rows, write_rows
from mllm_msr.pocket.empty import ORACLE_SCHEMA, write_empty_world
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


def test_the_oracle_without_rows_is_the_table_oracle_without_rows(tmp_path: Path) -> None:
    write_empty_world(tmp_path / "raw", tmp_path / "oracle.parquet")
    write_rows(Oracle, [], tmp_path / "table.parquet")
    assert arrow_schema(Oracle) == ORACLE_SCHEMA
    assert (tmp_path / "oracle.parquet").read_bytes() == (tmp_path / "table.parquet").read_bytes()


def test_another_source_waits_for_no_package_that_it_does_not_need(
    params: Path, tmp_path: Path
) -> None:
    choose(params, "tables")
    paths = f"params=Path({str(params)!r}), raw=Path('raw'), oracle=Path('oracle.parquet')"
    slow = {"duckdb", "ibis", "pandas", "pandera", "PIL", "scipy", "sklearn", "torch"}
    code = (
        "import sys; from pathlib import Path; from stages.pocket_world import pocket_world;"
        f"pocket_world({paths}); print(sorted(sys.modules.keys() & {slow}))"
    )
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(Path.cwd())}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == "[]"
