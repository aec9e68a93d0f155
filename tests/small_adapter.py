"""Small adapters with seeded weights."""

from pathlib import Path

import torch
from torch import nn

from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import load_weights
from mllm_msr.method.adapters import add_adapter


def save_adapter(encoder: Encoder, folder: Path, strength: float) -> Path:
    """Write an adapter of a model; with strength 0 it changes nothing."""
    torch.manual_seed(0)
    bare = load_weights(encoder, torch.float32)
    adapted = add_adapter(bare, 2, 4, 0.0, ["q_proj", "down_proj"])
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name and strength:
            nn.init.normal_(parameter, std=strength)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder
