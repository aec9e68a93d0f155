"""4-bit weights for QLoRA (Dettmers et al., 2023), by bitsandbytes.

The frozen language model is stored as 4-bit NormalFloat with double quantization. Computation, all
other layers and the adapter use the dtype of the run.
"""

from importlib.util import find_spec

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils.quantization_config import BitsAndBytesConfig

from mllm_msr.core.errors import ModelError, install_command
from mllm_msr.engines.encoding import Encoder

AutoModelClass = type[AutoModelForImageTextToText] | type[AutoModelForCausalLM]


def quantize_language_model(
    auto_class: AutoModelClass, encoder: Encoder, dtype: torch.dtype
) -> BitsAndBytesConfig:
    """Return the configuration that quantizes the language model's linear layers only.

    Args:
        auto_class: The class that loads the model.
        encoder: The model's encoder.
        dtype: Of the computation.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        fix = f"{install_command('qlora')}, or set recommender.four_bit to false"
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
        llm_int8_skip_modules=_other_layers(auto_class, encoder),  # applies to 4 bits too
    )


def _other_layers(auto_class: AutoModelClass, encoder: Encoder) -> list[str]:
    """Return the names of all linear layers outside the language model, without any weights."""
    config = AutoConfig.from_pretrained(
        encoder.name, revision=encoder.revision, trust_remote_code=False
    )
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=False)
    language = {id(module) for module in model.get_decoder().modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in language
    ]
