"""``mllm-msr recommend --all-users`` after a kill: what was answered is kept, the rest is asked."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from fake_recommender import wait_for

ROOT = Path(__file__).parents[2]
FEW = 30  # stored responses that show that models are answering
SECONDS = 300


def start(run_folder: Path, folder: Path, name: str) -> subprocess.Popen[str]:
    """Recommend to all users; results and response store get the name."""
    words = ["recommend", "--all-users", "--k", "3", "--candidates", "4", "--explain"]
    store = {"DVC_ROOT": str(folder), "MLLM_MSR_RESPONSES": str(folder / f"{name}.sqlite")}
    return subprocess.Popen(
        [sys.executable, "-m", "mllm_msr.cli", *words, "--out", str(folder / f"{name}.parquet")],
        cwd=run_folder,
        env=os.environ | store | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    written, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    assert "120 recommendations" in written


def stored(path: Path) -> dict[str, tuple[str, float]]:
    """Return text and time of the responses of a store."""
    if not path.exists():
        return {}
    with sqlite3.connect(path) as database:
        try:
            rows = database.execute("SELECT key, text, added FROM answers").fetchall()
        except sqlite3.OperationalError:  # the table is not there yet
            return {}
    return {key: (text, time) for key, text, time in rows}


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(run_folder: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    finish(start(run_folder, tmp_path, "whole"))
    everything = stored(tmp_path / "whole.sqlite")

    process = start(run_folder, tmp_path, "killed")
    wait_for(lambda: len(stored(tmp_path / "killed.sqlite")) >= FEW, SECONDS)
    process.kill()
    process.communicate(timeout=SECONDS)
    kept = stored(tmp_path / "killed.sqlite")
    assert FEW <= len(kept) < len(everything), "it was not killed in the middle"
    assert not killed.exists()

    finish(start(run_folder, tmp_path, "killed"))
    after = stored(tmp_path / "killed.sqlite")
    assert {key: after[key] for key in kept} == kept  # neither asked again nor written again
    assert after.keys() == everything.keys()
    # Temporary files have the name of the file in theirs.
    assert {path.name for path in tmp_path.glob("*killed.parquet*")} == {"killed.parquet"}
    for name in ("p_yes", "log_odds"):  # other prompts share a batch after the kill
        assert column(killed, name) == pytest.approx(column(whole, name), abs=1e-5)
    others = ["user", "rank", "item", "title", "retriever", "retriever_rank", "history"]
    for name in (*others, "preferences"):
        assert column(killed, name) == column(whole, name)


def column(path: Path, name: str) -> list[object]:
    return list(pyarrow.parquet.read_table(path)[name].to_pylist())
