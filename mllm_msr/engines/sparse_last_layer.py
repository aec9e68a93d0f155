"""A sparse last decoder layer: it computes only the tokens whose logits are read.

Keys and values are needed of every token, but queries, attention output and the feed-forward
network only of the tokens whose hidden state reaches the output layer. Results are the same. With
four layers this saves a sixth of the work, with thirty-two about a fiftieth.

Upstream: this module relies on the forward of a decoder layer as ``LlamaDecoderLayer`` of
``transformers.models.llama.modeling_llama`` and its siblings have it, transformers>=5.17,<6:

- the keyword arguments ``hidden_states``, ``position_embeddings``, ``attention_mask`` and
  ``past_key_values``, and unknown ones passed from the model's forward down to the layer;
- the parts ``input_layernorm`` and ``self_attn`` with ``k_proj``, ``v_proj``, ``k_norm``,
  ``head_dim`` and ``layer_idx``, and the module's function ``apply_rotary_pos_emb``;
- ``_can_checkpoint_with_cache`` of ``transformers.modeling_layers.GradientCheckpointingLayer``.

There is no public way to restrict a layer to some tokens; ``logits_to_keep`` only restricts the
output layer, and to the same tokens in every row.
"""

import functools
import sys
from typing import Any

import torch
from transformers import PreTrainedModel

LOGIT_INDICES = "logit_indices"  # the argument of a model's forward with the tokens to read


class _FixedCache:
    """A cache that returns the keys and values of all tokens, whatever is added to it."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take keys and values, each (rows, heads, tokens, width of a head)."""
        self._keys_and_values = keys, values

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values; the arguments are ignored."""
        return self._keys_and_values


def install_sparse_last_layer(weights: PreTrainedModel, key_norm: bool) -> None:
    """Let a model's forward take ``logit_indices`` and return the logits of these tokens only.

    ``logit_indices`` are token indices, (rows, tokens to read). A forward without it is unchanged.

    Args:
        weights: The model of a declared family; under an adapter, the model below it.
        key_norm: Whether the attention normalises keys (``ModelFamily.key_norm``).
    """
    layer = weights.get_decoder().layers[-1]
    if not getattr(layer, "_has_sparse_forward", False):
        select = functools.partial(_select_tokens, key_norm)
        layer.register_forward_pre_hook(select, with_kwargs=True)
        layer._has_sparse_forward = True
        layer._can_checkpoint_with_cache = True  # else checkpointing drops the fixed cache


def _select_tokens(
    key_norm: bool, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Restrict the arguments of the layer's forward to the tokens that are read."""
    indices = kwargs.pop(LOGIT_INDICES, None)
    if indices is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    cos, sin = kwargs["position_embeddings"]  # (rows, tokens, width of a head) each
    attention: Any = layer.self_attn
    normed = layer.input_layernorm(hidden)
    keys, values = _compute_keys_and_values(attention, normed, cos, sin, key_norm)
    if kwargs.get("past_key_values") is not None:
        keys, values = kwargs["past_key_values"].update(keys, values, attention.layer_idx)
    selected = {
        "hidden_states": _gather(hidden, indices),
        "position_embeddings": (_gather(cos, indices), _gather(sin, indices)),
        "attention_mask": _gather_mask(kwargs["attention_mask"], indices, keys.shape[2]),
        "past_key_values": _FixedCache(keys, values),
    }
    return (), kwargs | selected


def _compute_keys_and_values(
    attention: Any, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, key_norm: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute keys and values of all tokens as the attention does, (rows, heads, tokens, width)."""
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(normed).view(shape)
    if key_norm:
        keys = attention.k_norm(keys)
    keys, values = keys.transpose(1, 2), attention.v_proj(normed).view(shape).transpose(1, 2)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(keys[:, :0], keys, cos, sin)[1], values


def _gather(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Select tokens by index, (rows or 1, tokens, width) -> (rows, selected tokens, width)."""
    rows = torch.arange(len(indices), device=indices.device)[:, None]
    return states.expand(len(indices), -1, -1)[rows, indices]


def _gather_mask(mask: torch.Tensor | None, indices: torch.Tensor, tokens: int) -> torch.Tensor:
    """Select rows of an attention mask, (rows, 1, selected tokens, tokens); None means causal."""
    if mask is None:
        return (torch.arange(tokens, device=indices.device) <= indices[:, :, None])[:, None]
    return _gather(mask[:, 0], indices)[:, None]
