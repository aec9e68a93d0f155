"""GGUF files of small models, written as llama.cpp converts a model folder."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
NORMAL, CONTROL = 1, 3  # types of tokens


def write_gguf(
    path: Path,
    folder: Path,
    architecture: str,
    kind: GGMLQuantizationType = F32,
    fields: dict[str, str] | None = None,
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """Write a model folder with a byte-level tokenizer as a GGUF file.

    Args:
        path: The file.
        folder: Of a causal language model.
        architecture: As GGUF names it.
        kind: Type of the matrices; vectors are always F32.
        fields: Strings of the metadata, added or in place of others; an empty one leaves a field
            out.
        extra: Tensors to add.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    writer = GGUFWriter(path, architecture)
    _add_settings(writer, model.config)
    strings = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.chat_template": tokenizer.chat_template,
    } | (fields or {})
    for key, text in strings.items():
        if text:
            writer.add_string(key, text)
    _add_tokens(writer, tokenizer)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
        model.config.num_hidden_layers,
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _interleave(values, model.config.head_dim)
        stem, suffix = name.rsplit(".", 1)
        _add_tensor(writer, f"{names.get_name(stem)}.{suffix}", values, kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_settings(writer: GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    width = getattr(config, "head_dim", None)
    if width:
        writer.add_key_length(width)
        writer.add_value_length(width)


def _add_tokens(writer: GGUFWriter, tokenizer: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.added_tokens_decoder)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if i in special else NORMAL for i in range(len(tokens))])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


def _interleave(values: np.ndarray[Any, Any], width: int) -> np.ndarray[Any, Any]:
    """Return rows in the order in which llama.cpp rotates a head: its halves interleaved."""
    heads = values.shape[0] // width
    halves = values.reshape(heads, 2, width // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _add_tensor(
    writer: GGUFWriter, name: str, values: np.ndarray[Any, Any], kind: GGMLQuantizationType
) -> None:
    if values.ndim < 2 or kind == F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
