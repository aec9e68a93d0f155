"""A training runs as one process per GPU, or as the user has configured it."""

import os
import sys
from pathlib import Path

import pytest
import torch

from mllm_msr.training import launching

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
REST = ["-m", "stages.sft", "--dry-run"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[list[str], set[str]]]:
    """Record the command lines that would replace this process, with their variables."""
    found: list[tuple[list[str], set[str]]] = []
    monkeypatch.setattr(os, "execve", lambda _, words, given: found.append((words, set(given))))
    monkeypatch.setattr(sys, "argv", ["sft", "--dry-run"])
    for name in launching.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MLLM_MSR_DEVICE", raising=False)
    monkeypatch.setenv("DVC_STAGE", "sft")
    use_configuration(monkeypatch, tmp_path / "none.yaml")
    return found


def use_configuration(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    module = "accelerate.commands.config.config_args.default_config_file"
    monkeypatch.setattr(module, str(path))


@pytest.mark.parametrize("gpus", [0, 1])
def test_one_device_needs_no_launcher(
    started: list[object], monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    launching.launch_processes("stages.sft")
    assert started == []


def test_several_gpus_get_a_process_each_and_explicit_options(
    started: list[tuple[list[str], set[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    launching.launch_processes("stages.sft")
    ((words, given),) = started
    spelled = ["--multi_gpu", "--num_processes=4", "--num_machines=1"]
    assert words == [*LAUNCH, *spelled, "--mixed_precision=no", "--dynamo_backend=no", *REST]
    assert "DVC_STAGE" not in given


@pytest.mark.parametrize(("device", "launches"), [("cpu", 0), ("cuda:1", 0), ("cuda", 1)])
def test_a_device_of_the_environment_needs_no_process_per_gpu(
    started: list[object], monkeypatch: pytest.MonkeyPatch, device: str, launches: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("MLLM_MSR_DEVICE", device)
    launching.launch_processes("stages.sft")
    assert len(started) == launches


def test_the_users_configuration_is_used_unchanged(
    started: list[tuple[list[str], set[str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("num_processes: 2\n", encoding="utf-8")
    use_configuration(monkeypatch, tmp_path / "mine.yaml")
    launching.launch_processes("stages.sft")
    assert started[0][0] == [*LAUNCH, *REST]


@pytest.mark.parametrize("name", launching.LAUNCHED)
def test_a_process_that_was_launched_launches_no_more(
    started: list[object], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv(name, "0")
    launching.launch_processes("stages.sft")
    assert started == []
