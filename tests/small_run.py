"""A finished run of a small pocket world, made by the stages in this process."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "mllm_msr/pocket/model")
SMALL: dict[str, dict[str, Any]] = {
    "pocket_world": {"users": 40, "items": 60},
    "filter_sequences": {
        "min_user_interactions": 3,
        "valid_negatives": 5,
        "test_negatives": 5,
        "valid_share": 0.2,
        "test_share": 0.2,
        "evaluation_sampling": ["uniform"],
    },
    "sft": {"epochs": 1, "batch_size": 32},
}


@contextlib.contextmanager
def work_in(folder: Path, store: Path | None = None) -> Iterator[None]:
    """Work in a run's folder, with a state directory of its own.

    Args:
        folder: The run's.
        store: The response store becomes this copy of the run's, which stays as it is.
    """
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLLM_MSR_RESPONSES", raising=False)
        if store is not None:
            shutil.copy(folder / ".mllm_msr/responses.sqlite", store)
            patch.setenv("MLLM_MSR_RESPONSES", str(store))
        patch.setattr("stages.sft.launch_processes", lambda _: None)
        yield


def make_run(folder: Path) -> None:
    """Make a run in a folder."""
    shutil.copy(ROOT / "prompts.yaml", folder)
    settings = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, changes in SMALL.items():
        settings[section] |= changes
    for section in ("summarize_items", "encode_items", "infer_preferences", "recommender"):
        settings[section]["model"] = MODEL
    (folder / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with work_in(folder):
        _run_stages()


def _run_stages() -> None:
    import torch

    from stages.fetch_images import fetch_images
    from stages.filter_sequences import filter_sequences
    from stages.infer_preferences import infer_preferences
    from stages.pocket_world import pocket_world
    from stages.preprocess import preprocess
    from stages.score import score
    from stages.sft import sft
    from stages.summarize_items import summarize_items

    torch.set_num_threads(1)
    steps = (pocket_world, preprocess, filter_sequences, fetch_images, summarize_items)
    for stage in (*steps, infer_preferences, sft, score):
        stage()
