"""LoRA adapters: which layers they may touch, and loading them without a key too few or too many.

peft itself only warns when an adapter's keys do not fit, and then scores are those of the bare
model; here that is an error.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from mllm_msr.errors import ModelError
from mllm_msr.files import file_digest


def language_layers(model: PreTrainedModel, layers: Sequence[str]) -> str:
    """Give the pattern of the language model's linear layers of these names.

    Neither the vision tower nor the projector is ever matched, whatever their layers are called.

    Raises:
        ModelError: A name matches no linear layer of the language model.
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    linear = {
        name.rpartition(".")[2]
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear)
    }
    unknown = sorted(set(layers) - linear)
    if unknown or not layers:
        came = ", ".join(unknown) or "none"
        remedy = "correct sft.lora.layers"
        raise ModelError(f"layers among {', '.join(sorted(linear))}", came, "sft.lora", remedy)
    return rf"{re.escape(prefix)}\..*\.({'|'.join(map(re.escape, layers))})"


def add_adapter(
    model: PreTrainedModel, rank: int, alpha: int, dropout: float, layers: Sequence[str]
) -> PeftModel:
    """Put a fresh adapter on the language layers; it changes nothing until it is trained."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=language_layers(model, layers),
    )
    return _adapt(model, config)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load an adapter; every key must fit.

    Raises:
        ModelError: The folder holds no safetensors adapter, or one of another model.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        remedy = "run the stage sft"
        raise ModelError("an adapter in safetensors", "no such file", str(folder), remedy)
    try:
        config = LoraConfig.from_pretrained(str(folder))
        adapted = _adapt(model, config)
        weights = load_peft_weights(str(folder), device="cpu")
        _compare_keys(set(get_peft_model_state_dict(adapted)), set(weights), folder)
        set_peft_model_state_dict(adapted, weights)
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise _foreign(str(error), folder) from error
    return adapted


def adapter_identity(folder: Path) -> str:
    """What an adapter is: the SHA-256 of its files."""
    return file_digest(folder)


def _adapt(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Put an adapter on a model, without peft's use of a property that transformers renames."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return get_peft_model(model, config)


def _compare_keys(expected: set[str], came: set[str], folder: Path) -> None:
    missing, unexpected = sorted(expected - came), sorted(came - expected)
    if missing or unexpected:
        report = (
            f"{len(missing)} missing ({', '.join(missing[:2])}) and"
            f" {len(unexpected)} unexpected ({', '.join(unexpected[:2])})"
        )
        raise _foreign(report, folder)


def _foreign(came: str, folder: Path) -> ModelError:
    remedy = "it was trained for another model; run the stage sft for this one"
    return ModelError("an adapter whose every key fits the model", came, str(folder), remedy)
