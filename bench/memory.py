"""Estimates of the GPU memory of each preset's models, computed from their shapes.

    python -m bench.memory

Nothing is measured. Prints one JSON line per model and task, in gigabytes (10^9 bytes):

- weights: bfloat16, or 4-bit normal floats for the linear layers of the language model;
- inference (summaries, preferences, scores): one forward of ``max_forward_tokens`` tokens and the
  KV cache of the longest prompt. Slots and image features take a share of the free memory, so
  that they adapt to the GPU;
- sft: a batch of the longest prompts without shared prefixes, activation checkpoints between
  layers, one recomputed layer with its gradients, the adapter with its gradients and AdamW's two
  moments in float32, and the logits of the answers.

A tenth is added for fragmentation, and 0.6 GB for CUDA.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from bench.shapes import llama_config, llava_config, qwen_config
from mllm_msr.core.devices import max_forward_tokens

GIGABYTE = 1e9
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes per weight: 4 bits, double-quantized constants
CUDA = torch.device("cuda")
CARDS = (16, 24, 48, 80)  # gigabytes


class Case(NamedTuple):
    """A model of a preset."""

    name: str
    config: Any
    family: Any
    preset: str
    trained: bool  # whether it is the recommender


CASES = (
    Case("LLaVA-1.6-Mistral-7B", llava_config(), AutoModelForImageTextToText, "microlens", True),
    Case("Llama-3-8B", llama_config(), AutoModelForCausalLM, "microlens", False),
    Case("Qwen3-VL-4B", qwen_config(), AutoModelForImageTextToText, "qwen", True),
)


def main() -> None:
    """Print one JSON line per model and task."""
    for case in CASES:
        for line in compute(case):
            typer.echo(json.dumps(line))


def compute(case: Case) -> Iterator[dict[str, Any]]:
    """Yield the memory estimates of a model's tasks."""
    settings = yaml.safe_load(Path(f"presets/{case.preset}.yaml").read_text(encoding="utf-8"))
    longest = settings["recommender"]["max_prompt_tokens"]
    text = case.config.get_text_config()
    with torch.device("meta"):
        model = case.family.from_config(case.config)
    language, other = count_weights(model)
    full, four_bit = 2 * (language + other), NF4 * language + 2 * other
    yield describe(case, "answers", full, answering(text, longest))
    if case.trained:
        tuning = settings.get("sft", {"batch_size": 4, "lora": {"rank": 8}})
        pairs, rank = tuning["batch_size"], tuning["lora"]["rank"]
        activations = training(text, model, longest, pairs, rank)
        yield describe(case, f"sft, batches of {pairs}", full, activations)
        yield describe(case, f"sft, batches of {pairs}, four_bit", four_bit, activations)
        alone = training(text, model, longest, 1, rank)
        yield describe(case, "sft, batches of 1, four_bit", four_bit, alone)


def count_weights(model: PreTrainedModel) -> tuple[int, int]:
    """Return the number of weights of the language model's linear layers, and of all others."""
    decoder = model.get_decoder()
    linear = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    language = sum(module.weight.numel() for module in linear)
    return language, sum(parameter.numel() for parameter in model.parameters()) - language


def answering(text: Any, longest: int) -> float:
    """Return the bytes of one forward pass and of the KV cache of one prompt."""
    head: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    bytes_per_token: int = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * head
    wide: int = 6 * text.hidden_size + 3 * text.intermediate_size
    return max_forward_tokens(CUDA) * wide * 2 + longest * bytes_per_token + 4 * longest**2


def training(text: Any, model: PreTrainedModel, longest: int, pairs: int, rank: int) -> float:
    """Return the bytes of activation checkpoints, one layer, the adapter and the logits."""
    tokens = pairs * longest
    checkpoints: int = text.num_hidden_layers * tokens * text.hidden_size * 2
    layer: int = tokens * (14 * text.hidden_size + 6 * text.intermediate_size) * 2
    linear = [m for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    adapter = sum(rank * (m.in_features + m.out_features) for m in linear) * 4 * 4
    logits: int = pairs * text.vocab_size * 3 * 4
    return checkpoints + layer + adapter + logits


def describe(case: Case, work: str, weights: float, rest: float) -> dict[str, Any]:
    """Return a line: gigabytes of the weights and in total, and the GPU sizes that hold them."""
    total = 1.1 * (weights + rest) / GIGABYTE + 0.6
    return {
        "model": case.name,
        "work": work,
        "weights_gb": round(weights / GIGABYTE, 1),
        "total_gb": round(total, 1),
        "fits": [card for card in CARDS if total <= card],
    }


if __name__ == "__main__":
    typer.run(main)
