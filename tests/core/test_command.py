"""Running a stage as a command: its progress line under DVC, and Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mllm_msr.core import command
from mllm_msr.core.pipeline import name_stages

PIPELINE = {
    "stages": {
        "first": {"cmd": "true"},
        "crossed": {"cmd": "true", "matrix": {"one": "${a.ones}", "two": "${a.twos}"}},
        "last": {"cmd": "true"},
    }
}


def write_pipeline(folder: Path, **lists: list[object]) -> tuple[Path, Path]:
    files = folder / "dvc.yaml", folder / "params.yaml"
    for file, content in zip(files, (PIPELINE, {"a": lists}), strict=True):
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return files


def test_a_matrix_stage_counts_once_per_item(tmp_path: Path) -> None:
    files = write_pipeline(tmp_path, ones=["x", "y"], twos=[1])
    assert list(name_stages(*files)) == ["first", "crossed@x-1", "crossed@y-1", "last"]


def test_an_empty_matrix_yields_no_stage(tmp_path: Path) -> None:
    files = write_pipeline(tmp_path, ones=[], twos=[1])
    assert list(name_stages(*files)) == ["first", "last"]


def test_stage_names_match_dvc() -> None:
    listed = [sys.executable, "-m", "dvc", "stage", "list", "--name-only"]
    said = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    assert list(name_stages(Path("dvc.yaml"), Path("params.yaml"))) == said.split()


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ("last", "stage 3 of 3: last\n"),
        ("crossed@x-1", "stage 2 of 3: crossed@x-1\n"),
        ("elsewhere/dvc.yaml:last", ""),  # of another pipeline
        (None, ""),
    ],
)
def test_a_stage_prints_its_number_under_dvc(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str | None,
    line: str,
) -> None:
    write_pipeline(tmp_path, ones=["x"], twos=[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stage"])
    monkeypatch.delenv("DVC_STAGE", raising=False)
    if stage:
        monkeypatch.setenv("DVC_STAGE", stage)
    with pytest.raises(SystemExit, match="0"):
        command.run(lambda: print("work"))
    assert capsys.readouterr().out == f"{line}work\n"


def interrupt() -> None:
    raise KeyboardInterrupt


def test_ctrl_c_prints_one_line_and_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["stage"])
    with pytest.raises(SystemExit, match="130"):
        command.run(interrupt)
    assert capsys.readouterr().err == "interrupted; run again to continue\n"


def test_ctrl_c_during_imports_prints_one_line(tmp_path: Path) -> None:
    # A fake Typer blocks while mllm_msr.core.command, which every stage imports, imports it.
    (tmp_path / "typer.py").write_text("print('here', flush=True)\nimport time\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.evaluate"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "here\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors == "interrupted; run again to continue\n"
    assert process.returncode in {130, -signal.SIGINT}
