"""Weights in 4 bits for QLoRA (Dettmers et al., 2023), by bitsandbytes.

The frozen language model is kept as 4-bit normal floats with constants quantized twice; what is
computed with it has the dtype of the run, and so do all other layers and the adapter.
"""

from importlib.util import find_spec

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils.quantization_config import BitsAndBytesConfig

from mllm_msr.core.errors import ModelError
from mllm_msr.engines.encoding import Encoder

Family = type[AutoModelForImageTextToText] | type[AutoModelForCausalLM]


def four_bit_language(family: Family, encoder: Encoder, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Say which layers are quantized, and how.

    Args:
        family: What loads the model.
        encoder: Of the model.
        dtype: Of what is computed with the weights.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        fix = "pip install '.[qlora]', or set recommender.four_bit to false"
        raise ModelError(
            expected="the package bitsandbytes",
            got="none",
            where="recommender.four_bit",
            fix=fix,
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_other_layers(family, encoder),  # of 4 bits too, despite its name
    )


def _other_layers(family: Family, encoder: Encoder) -> list[str]:
    """Name all linear layers but the language model's, from the model's shape alone."""
    config = AutoConfig.from_pretrained(
        encoder.name, revision=encoder.revision, trust_remote_code=False
    )
    with torch.device("meta"):
        model = family.from_config(config, trust_remote_code=False)
    language = {id(module) for module in model.get_decoder().modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in language
    ]
