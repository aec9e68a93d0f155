"""Base model and adapter as one model folder, for inference servers."""

import json
import shutil
from pathlib import Path

import torch

from mllm_msr.engines.encoding import IDENTIFYING_FILES, PROVENANCE, Encoder, model_folder
from mllm_msr.engines.local import load_weights
from mllm_msr.method.adapters import load_adapter

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
# How `transformers serve` answers with probabilities: it reads the answers' logits where the chat
# template opens the assistant's turn, after a user's turn that is the state of the request.
DECISION_CONFIG, DECISION_TEMPLATE = "decision.json", "decision_template.jinja"


def write_merged_model(
    encoder: Encoder, adapter: Path, answers: tuple[str, str], folder: Path
) -> None:
    """Write a model whose weights are those of the base model and the adapter together.

    They are added up in float32 and written in the base model's own dtype. Where that has a lower
    precision, log-odds differ from those of the separate adapter in its last digits.

    Args:
        encoder: Of the base model.
        adapter: The adapter's folder, in PEFT's format.
        answers: Yes and no, one token each.
        folder: A new folder.

    Raises:
        ModelError: Model or adapter cannot be loaded, or do not fit together.
    """
    weights = load_weights(encoder, torch.float32)
    merged = load_adapter(weights, adapter).merge_and_unload()
    dtype = encoder.config.dtype or torch.float32
    merged.to(dtype).save_pretrained(folder, safe_serialization=True)
    source = model_folder(encoder)
    left_out = {PROVENANCE, *(file.name for name in WEIGHTS for file in source.glob(name))}
    for pattern in IDENTIFYING_FILES:
        for file in source.glob(pattern):
            if file.name not in left_out:
                shutil.copyfile(file, folder / file.name)
    _write_decisions(encoder, answers, folder)


def _write_decisions(encoder: Encoder, answers: tuple[str, str], folder: Path) -> None:
    """Write the files by which ``transformers serve`` answers with probabilities."""
    # Texts of the catalogue are neutralised where prompts are built.
    config = {"labels": {"choice": list(answers)}, "sanitize_control_tokens": False}
    (folder / DECISION_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    content = "state"
    if encoder.takes_images:
        content = "state if state is not string else [{'type': 'text', 'text': state}]"
    turn = f"{{'role': 'user', 'content': {content}}}"
    if encoder.system_message is not None:
        text = json.dumps(encoder.system_message)
        parts = text if encoder.system_as_text else f"[{{'type': 'text', 'text': {text}}}]"
        turn = f"{{'role': 'system', 'content': {parts}}}, {turn}"
    template = f"{{%- set messages = [{turn}] -%}}{encoder.chat_template}"
    (folder / DECISION_TEMPLATE).write_text(template, encoding="utf-8")
