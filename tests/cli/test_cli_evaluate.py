"""The commands that print tables of an evaluation."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from three_items import evaluate_world, write_world
from typer.testing import CliRunner, Result

from mllm_msr.cli.evaluate import app
from mllm_msr.core.errors import DataError
from mllm_msr.evaluation.results import write_evaluation
from mllm_msr.evaluation.table import format_table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project folder with tables in the folders of the stages; read only."""
    folder = tmp_path_factory.mktemp("project")
    data = folder / "data"
    write_world(data)
    write_evaluation(evaluate_world(data, baselines=["item_knn"]), data / "evaluate")
    (data / "filtered").rename(data / "filter_sequences")
    (data / "pocket_world").mkdir()
    (data / "oracle.parquet").rename(data / "pocket_world" / "oracle.parquet")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["evaluate"] |= {"ks": [1, 2], "bootstrap_samples": 50, "confidence": 0.9, "seed": 0}
    params["baselines"]["models"] = ["item_knn"]
    params["feature_baselines"]["models"] = ["vbpr"]  # without scores
    params["text_baselines"]["models"] = []
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


@pytest.fixture
def project(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the project folder, which is the working directory."""
    folder = Path(shutil.copytree(written, tmp_path / "project"))
    monkeypatch.chdir(folder)
    return folder


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_show_prints_the_table_of_the_last_evaluation(project):
    result = call("show")
    assert result.exit_code == 0
    (project / "data" / "filter_sequences").rename(project / "data" / "filtered")
    (project / "data/pocket_world/oracle.parquet").rename(project / "data/oracle.parquet")
    evaluated = evaluate_world(project / "data", baselines=["item_knn"])
    assert result.output.rstrip("\n") == format_table(evaluated.metrics, evaluated.comparisons)


def test_show_before_any_evaluation_is_an_error(project):
    shutil.rmtree(project / "data" / "evaluate")
    result = call("show")
    assert isinstance(result.exception, DataError)
    assert "run the stage evaluate" in str(result.exception)


def test_baselines_prints_all_but_the_model_and_writes_nothing(project):
    shown = squeezed(call("show").output)
    (project / "data" / "scores.parquet").unlink()
    before = sorted(project.rglob("*"))
    result = call("baselines")
    assert result.exit_code == 0
    assert result.stderr == "without scores: vbpr\n\n"
    model, *others = shown[2:8]
    assert "MLLM-MSR" in model
    assert squeezed(result.stdout)[2:7] == others
    assert "not significantly above" in result.stdout
    assert sorted(project.rglob("*")) == before


def test_show_warns_as_the_run_did_whatever_the_settings_are_now(project):
    path = project / "data/evaluate/metrics.json"
    metrics = json.loads(path.read_text()) | {"warnings": ["not a result: a toy"]}
    path.write_text(json.dumps(metrics))
    assert call("show").output.startswith("not a result: a toy\n\n")


def test_baselines_warns_by_the_settings(project):
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["preprocess"]["source"] = "tables"
    params["recommender"]["model"] = str(ROOT / "mllm_msr/pocket/model")
    path.write_text(yaml.safe_dump(params))
    assert call("baselines").stdout.startswith("not a result: the pocket model")


@pytest.mark.parametrize("command", ["show", "baselines"])
def test_the_help_of_each_command_has_an_example(command):
    shown = " ".join(call(command, "--help").output.split())
    assert f"Example: mllm-msr evaluate {command}" in shown


def test_an_error_is_one_line(tmp_path):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    arguments = [sys.executable, "-m", "mllm_msr.cli.evaluate", "show"]
    environment = {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        arguments, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert "run the stage evaluate" in ended.stderr
