"""The files of a fine-tuning: its report, and placeholders for adapter and curves."""

import json
from pathlib import Path

from mllm_msr.core.files import atomic_write

# Metrics by their names in Trainer's history: the files of their curves, as DVCLive names them.
CURVES = {"loss": "train/loss", "eval_loss": "valid/loss", "eval_auc": "valid/auc"}


def write_empty_curves(folder: Path) -> None:
    """Write curves without points, since ``dvc plots show`` fails on missing files."""
    with atomic_write(folder) as temporary:
        for name in CURVES.values():
            file = temporary / "plots" / "metrics" / f"{name}.tsv"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"step\t{file.stem}\n", encoding="utf-8")


def write_no_training(folder: Path) -> None:
    """Write the outputs of a run without a recommender.

    Args:
        folder: Receives ``adapter`` with a note, ``curves`` without points, and ``training.json``.
    """
    with atomic_write(folder / "adapter") as adapter:
        adapter.mkdir()
        note = "recommender.model is null: there is no adapter.\n"
        (adapter / "README.md").write_text(note, encoding="utf-8")
    write_empty_curves(folder / "curves")
    write_report(folder, steps=0, epoch=0, valid_auc=None, valid_loss=None, model=None)


def write_report(folder: Path, **content: object) -> None:
    """Write ``training.json``: the fields of ``TrainingReport``, and the record of the adapter."""
    with atomic_write(folder / "training.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
