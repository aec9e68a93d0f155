"""How much a model computes at once: found from free memory, and halved when it was too much."""

import torch
from transformers import PretrainedConfig

from mllm_msr.core.devices import free_memory, max_forward_tokens

SHARE_OF_MEMORY = 4  # forwards take one part in four; image features and slots take one each
TOKENS_OF_A_PROMPT = 16  # no prompt in its chat template has fewer; each has one row of logits


class Budget:
    """What one model may compute at once on its device, for a whole run.

    What it gives never grows: after :meth:`halve` all of it stays halved.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Take a model; memory is measured when a budget is first asked for.

        That should be after the weights were loaded, which take most of it.

        Args:
            config: Of the model, vision tower and all.
            dtype: Of what is computed.
            device: Of the model.
        """
        self._text, self._dtype, self._device = config.get_text_config(), dtype, device
        self._free: int | None = None
        self._share = 1.0

    @property
    def tokens(self) -> int:
        """The tokens of one forward that suit the device and fit into its memory."""
        return self.fit(max_forward_tokens(self._device))

    @property
    def row_tokens(self) -> int:
        """The tokens of one row that fit into memory.

        They may be more than suit the device: what a row shares saves more than that costs.
        """
        return self.shrink(self._fitting())

    def fit(self, most: int) -> int:
        """Give the tokens of one forward, at most so many; one at least."""
        return self.shrink(min(most, self._fitting()))

    def shrink(self, number: int) -> int:
        """Give the part of a number that is left after the halvings; one at least."""
        return max(1, int(number * self._share))

    def halve(self) -> None:
        """Halve all that is computed at once, for the rest of the run."""
        self._share /= 2

    def _fitting(self) -> int:
        if self._free is None:
            self._free = free_memory(self._device)
        return self._free // (SHARE_OF_MEMORY * forward_bytes(self._text, self._dtype))


def cache_bytes(text: PretrainedConfig, dtype: torch.dtype) -> int:
    """Count the bytes of one token's keys and values in all layers of a language model."""
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * dtype.itemsize)


def forward_bytes(text: PretrainedConfig, dtype: torch.dtype) -> int:
    """Count the bytes that a forward takes for each token.

    These are its keys and values, the widest moment of a layer (six hidden states, three of the
    feed-forward network), and its part of the logits, which are in float32 too.
    """
    layer = (6 * text.hidden_size + 3 * text.intermediate_size) * dtype.itemsize
    logits = text.vocab_size * (dtype.itemsize + 4) // TOKENS_OF_A_PROMPT
    return int(cache_bytes(text, dtype) + layer + logits)
