"""The stage report as a command."""

import sys
from pathlib import Path

import pytest
from report_world import write_report_world

from mllm_msr.core.command import run
from stages.report import report

FOLDERS = {
    "dropped": "preprocess/dropped.json",
    "filtered": "filter_sequences",
    "images": "fetch_images/images.parquet",
    "summaries": "summarize_items/summaries.parquet",
    "preferences": "infer_preferences/preferences.parquet",
    "trained": "sft",
    "scores": "score/scores.parquet",
    "evaluated": "evaluate",
    "studies": "studies",
}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command on a small run."""
    write_report_world(tmp_path)
    options = [part for name, path in FOLDERS.items() for part in (f"--{name}", tmp_path / path)]

    def call() -> tuple[int, str, str]:
        arguments = ["report", *map(str, options), "--out", str(tmp_path / "report")]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as end:
            run(report)
        return (end.value.code, *capsys.readouterr())

    return call


def test_it_prints_where_the_page_is(command, tmp_path):
    code, output, _ = command()
    path: Path = tmp_path / "report" / "report.html"
    assert code == 0
    assert output.splitlines() == [
        f"open {path.as_uri()}",
        f"wrote {path}: {path.stat().st_size:,} bytes",
    ]


def test_the_report_of_an_experiment_is_not_linked_to_its_temporary_copy(
    command, tmp_path, monkeypatch
):
    copied = tmp_path / ".dvc/tmp/exps/standalone/tmpabc"
    copied.mkdir(parents=True)
    monkeypatch.setattr("stages.report.Path.cwd", lambda: copied)
    monkeypatch.setenv("DVC_EXP_NAME", "mine")
    code, output, _ = command()
    path = tmp_path / "report" / "report.html"
    assert code == 0
    line = f"the report is the experiment's: dvc exp apply mine, then open {path}"
    assert output.splitlines()[0] == line
    assert "file://" not in output


def test_a_missing_table_is_one_line(command, tmp_path):
    (tmp_path / "score/scores.parquet").unlink()
    code, output, errors = command()
    assert (code, output, errors.count("\n")) == (1, "", 1)
    assert "scores.parquet" in errors
