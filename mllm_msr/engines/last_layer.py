"""The last decoder layer computes only what is read: the places where answers begin.

Its keys and values are needed of every token, but queries, attention's output and the feed-forward
part only of the tokens whose hidden state is read. What is read is the same; with four layers it
spares a sixth of the work, with thirty-two about a fiftieth.
"""

import sys
from typing import Any

import torch
from transformers import PreTrainedModel

READ_AT = "read_at"  # the argument of a model's forward that says which places are read


class _Known:
    """Stands in for a cache: gives the keys and values of all tokens, whatever is added."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take both, (rows, heads, tokens, width)."""
        self._both = keys, values

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Give both."""
        return self._both


def read_places_only(weights: PreTrainedModel) -> None:
    """Let a model's forward take ``read_at``, (rows, places), and give the hidden states there.

    A forward without it is as before. Only for families of
    :data:`mllm_msr.engines.packing.PACKABLE`, whose layers all have the parts of Llama's.

    Args:
        weights: The model; under an adapter, what is below it.
    """
    layer = weights.get_decoder().layers[-1]
    if not getattr(layer, "_reads_places_only", False):
        layer.register_forward_pre_hook(_choose_places, with_kwargs=True)
        layer._reads_places_only = True
        layer._can_checkpoint_with_cache = True  # else checkpointing drops the stand-in cache


def _choose_places(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Turn the arguments of the layer's forward into those for the places that are read."""
    places = kwargs.pop(READ_AT, None)
    if places is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    cos, sin = kwargs["position_embeddings"]  # (rows, tokens, width of a head) each
    attention: Any = layer.self_attn
    keys, values = _compute_keys(attention, layer.input_layernorm(hidden), cos, sin)
    if kwargs.get("past_key_values") is not None:
        keys, values = kwargs["past_key_values"].update(keys, values, attention.layer_idx)
    chosen = {
        "hidden_states": _take(hidden, places),
        "position_embeddings": (_take(cos, places), _take(sin, places)),
        "attention_mask": _take_mask(kwargs["attention_mask"], places, keys.shape[2]),
        "past_key_values": _Known(keys, values),
    }
    return (), kwargs | chosen


def _compute_keys(
    attention: Any, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give keys and values of all tokens, (rows, heads, tokens, width), as the attention does."""
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(normed).view(shape)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    keys, values = keys.transpose(1, 2), attention.v_proj(normed).view(shape).transpose(1, 2)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(keys[:, :0], keys, cos, sin)[1], values


def _take(of_tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Give what stands at places, (rows or 1, tokens, width) -> (rows, places, width)."""
    rows = torch.arange(len(places), device=places.device)[:, None]
    return of_tokens.expand(len(places), -1, -1)[rows, places]


def _take_mask(mask: torch.Tensor | None, places: torch.Tensor, tokens: int) -> torch.Tensor:
    """Give what the places see, (rows, 1, places, tokens); without a mask, what is before them."""
    if mask is None:
        return (torch.arange(tokens, device=places.device) <= places[:, :, None])[:, None]
    return _take(mask[:, 0], places)[:, None]
