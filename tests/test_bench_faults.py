"""Stages killed at random moments end as undisturbed ones; writers of one store lose nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.store_stress import stress

ROOT = Path(__file__).parents[1]
SCORING = ("score", "rerank")  # log-odds depend on the batch in their last digits
SLOTS = 8  # of decoding in the benchmark


@pytest.mark.slow
def test_writers_at_once_lose_no_response_nor_do_backups_meanwhile(tmp_path: Path) -> None:
    found = stress(tmp_path, seconds=3, writers=4)
    assert found["acknowledged"] > found["rows"] > 0  # some batches are of all writers
    kinds = ("lost", "wrong", "too_many", "lost_in_backups", "wrong_in_backups")
    assert {kind: found[kind] for kind in kinds} == dict.fromkeys(kinds, 0)


def kill(*options: str) -> list[dict[str, object]]:
    """Run the benchmark and return its lines."""
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "bench.faults", *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def check(line: dict[str, object], kills: int) -> None:
    """Prove that all reruns of a stage ended as an undisturbed run."""
    assert line["kills"] == line["equal_but_for_last_digits"] == kills, line
    assert not line["half_files"], line
    assert not line["leftovers"], line
    assert line["stored_but_asked_again"] == 0, line
    assert str(line["stage"]).startswith(SCORING) or line["equal"] == kills, line


@pytest.mark.slow
def test_stages_without_a_model_survive_kills() -> None:
    stages = ("preprocess", "filter_sequences")
    options = [word for stage in stages for word in ("--stage", stage)]
    lines = kill("--kills", "2", "--until", stages[-1], *options)
    assert [line["stage"] for line in lines] == list(stages)
    for line in lines:
        check(line, kills=2)


@pytest.mark.slow
def test_every_stage_survives_kills() -> None:
    lines = {str(line["stage"]): line for line in kill("--kills", "2")}
    assert len(lines) == 17
    for line in lines.values():
        check(line, kills=2)
    for stage in ("summarize_items", "infer_preferences"):
        assert int(str(lines[stage]["asked_twice_at_most"])) <= SLOTS
