"""The benchmark of a language model on MicroLens: its commands, and a run of a baseline."""

import csv
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bench import text_runs
from bench.text_runs import JOBS, app, prepare, steps
from mllm_msr.core.errors import ParamsError

ROOT = Path(__file__).parents[1]

USERS, ITEMS, LENGTH = 400, 60, 10


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a small release: users with ten interactions each."""
    rng, folder = np.random.default_rng(1), tmp_path / "raw"
    folder.mkdir()
    lines = [
        f"{user}\t{' '.join(map(str, rng.permutation(ITEMS)[:LENGTH]))}" for user in range(USERS)
    ]
    (folder / "MicroLens-0k_pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (folder / "MicroLens-0k_titles.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("item", "title"), *((i, f"Kettle {i}") for i in range(ITEMS))])
    monkeypatch.setattr(text_runs, "RAW", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_commands_name_options_of_their_stages(name: str, tmp_path: Path) -> None:
    text_runs.write_settings(tmp_path, "models/some", [name])

    for command in steps(name, tmp_path):
        _, _, module, *words = command.words
        function = getattr(importlib.import_module(module), module.removeprefix("stages."))
        options = {word.removeprefix("--").replace("-", "_") for word in words if word[:2] == "--"}
        assert options <= set(inspect.signature(function).parameters)
        assert command.writes.is_relative_to(tmp_path)


@pytest.mark.slow
def test_a_job_is_run_once_and_tabulated(raw: Path, tmp_path: Path) -> None:
    assert raw.is_dir()
    runner, work = CliRunner(), str(tmp_path / "runs")
    words = ["run", "ours-item_knn", "--work", work, "--model", "models/some"]

    first = runner.invoke(app, words)
    assert first.exit_code == 0
    assert "ours-item_knn: finished" in first.output
    written = text_runs.scores_of("ours-item_knn", Path(work))
    before = written.stat().st_mtime_ns
    assert runner.invoke(app, words).exit_code == 0
    assert written.stat().st_mtime_ns == before

    output = runner.invoke(app, ["table", "--work", work]).output
    assert "Protocol ours, negatives: uniform" in output
    tables = output.split("Protocol ours")[1:]
    for shown in tables:
        lines = [line for line in shown.splitlines() if line.startswith("| ")]
        rows = {cells[1].strip(): cells for line in lines if (cells := line.split("|"))}
        assert {"Item-kNN", "target popularity", "popularity", "chance"} <= set(rows)
        assert rows["chance"][2].strip() == "0.500 [0.500, 0.500]"
    assert len(tables) == 2


def test_no_step_starts_after_the_time_is_over(raw: Path, tmp_path: Path) -> None:
    assert raw.is_dir()
    words = ["run", "ours-item_knn", "--work", str(tmp_path), "--minutes", "0"]

    assert "not finished" in CliRunner().invoke(app, words).output
    assert not prepare("ours", tmp_path)[0].writes.exists()


def test_an_unknown_job_is_one_line(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "bench.text_runs", "run", "title", "--work", str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "expected jobs among zero-shot, titles" in line


def test_finished_steps_are_not_taken_for_those_of_other_settings(tmp_path: Path) -> None:
    text_runs.write_settings(tmp_path, "models/one", ["titles"])
    text_runs.write_settings(tmp_path, "models/one", ["titles"])
    with pytest.raises(ParamsError, match="expected the settings of the steps that are finished"):
        text_runs.write_settings(tmp_path, "models/other", ["titles"])


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "expected a finished job; got none"), (["--against", "title"], "expected jobs among")],
)
def test_a_table_without_rows_is_an_error(words: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["table", "--work", str(tmp_path), *words])
    assert said in str(result.exception)
