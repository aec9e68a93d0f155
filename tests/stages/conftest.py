"""Run a stage by its command line."""

import resource
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from mllm_msr.core import command

PROJECT = Path(__file__).parents[2]

Ended = subprocess.CompletedProcess[str]


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a stage in this process, which saves the imports of a new one; give the exit code."""

    def run(stage: str, *words: object) -> int:
        monkeypatch.setattr(sys, "argv", [stage, *map(str, words)])
        with pytest.raises(SystemExit) as ending:
            command.run(getattr(import_module(f"stages.{stage}"), stage))
        return int(ending.value.code or 0)

    return run


@pytest.fixture
def run_stage(
    run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run a stage in this process; give what it printed too."""

    def run(stage: str, *options: object) -> Ended:
        capsys.readouterr()  # drop what was printed before
        code = run_command(stage, *options)
        return subprocess.CompletedProcess([stage, *map(str, options)], code, *capsys.readouterr())

    return run


@pytest.fixture
def run_stage_on_a_full_disk() -> Callable[..., Ended]:
    """Run a stage in a process that cannot write files of more than some bytes."""

    def run(stage: str, *options: object, limit: int) -> Ended:
        return subprocess.run(
            [sys.executable, "-m", f"stages.{stage}", *map(str, options)],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )

    return run
