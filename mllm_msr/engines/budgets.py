"""Batch-size budgets: how many tokens fit into free memory; halved after running out of memory."""

import torch
from transformers import PretrainedConfig

from mllm_msr.core.devices import free_memory, max_forward_tokens

# Of the free memory a forward takes a quarter; image features and the KV cache take one each.
MEMORY_DIVISOR = 4
SHORTEST_PROMPT = 16  # tokens of a prompt in its chat template; each prompt has one row of logits


class Budget:
    """What one model may compute at once on its device.

    A budget never grows: after :meth:`halve` it stays halved for the rest of the run.

    Attributes:
        device: Of the model.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Take a model; free memory is measured when a budget is first asked for.

        That should be after the weights were loaded, which take most of the memory.

        Args:
            config: Of the whole model.
            dtype: Of the computation.
            device: Of the model.
        """
        self.device = device
        self._text, self._dtype = config.get_text_config(), dtype
        self._free: int | None = None
        self._factor = 1.0

    @property
    def tokens(self) -> int:
        """The tokens of one forward that fit into memory and that the device is efficient with."""
        return self.limit_tokens(max_forward_tokens(self.device))

    @property
    def row_tokens(self) -> int:
        """The tokens of one packed row that fit into memory.

        These may be more than the device is efficient with: sharing a prefix saves more than a
        large forward costs.
        """
        return self.scale(self._fitting_tokens())

    def limit_tokens(self, maximum: int) -> int:
        """Return the tokens of one forward: at most ``maximum``, at least one."""
        return self.scale(min(maximum, self._fitting_tokens()))

    def scale(self, number: int) -> int:
        """Return a number halved as often as the budget was; at least one."""
        return max(1, int(number * self._factor))

    def halve(self) -> None:
        """Halve the budget for the rest of the run."""
        self._factor /= 2

    def _fitting_tokens(self) -> int:
        if self._free is None:
            self._free = free_memory(self.device)
        return self._free // (MEMORY_DIVISOR * forward_bytes(self._text, self._dtype))


def cache_bytes(text: PretrainedConfig, dtype: torch.dtype) -> int:
    """Return the size of one token in the KV cache of all layers, in bytes."""
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * dtype.itemsize)


def forward_bytes(text: PretrainedConfig, dtype: torch.dtype) -> int:
    """Return the memory that a forward takes for each token, in bytes.

    It is the token's part of the KV cache, the peak within one layer (six hidden states and three
    of the feed-forward network), and its share of the logits, which exist in float32 too.
    """
    layer = (6 * text.hidden_size + 3 * text.intermediate_size) * dtype.itemsize
    logits = text.vocab_size * (dtype.itemsize + 4) // SHORTEST_PROMPT
    return int(cache_bytes(text, dtype) + layer + logits)
