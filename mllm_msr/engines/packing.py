"""Packed forwards: prompts with a shared prefix run in one row.

A packed row holds the shared prefix and, one after the other, each prompt's suffix. The attention
mask lets a token attend to earlier tokens of the prefix and of its own segment, and its position id
is the one that it has in its prompt alone. Every prompt's last hidden state is therefore the one
that the prompt alone would give.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from mllm_msr.core.errors import ModelError
from mllm_msr.engines.budgets import Budget
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.families import (
    find_family,
    is_declared,
    mrope_position_ids,
    supports_packing,
)
from mllm_msr.engines.image_features import ImageFeatureCache
from mllm_msr.engines.prefixes import Row, batch_rows, plan_rows
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.sparse_last_layer import LOGIT_INDICES, install_sparse_last_layer
from mllm_msr.images.gallery import ImageRef

# Segment ids of the tokens of a row: shared prefix, padding, else the row's prompt 1, 2, ...
SHARED, PADDING = 0, -1
PROMPTS_PLANNED = 5_000  # at once, since their tokens are in memory meanwhile


@dataclass(frozen=True)
class PackedBatch:
    """A batch of packed rows, as a model takes it.

    Attributes:
        inputs: ``input_ids`` (rows, longest row) and ``position_ids``, (rows, longest row) or, in
            families with M-RoPE, (3, rows, longest row).
        segment_ids: Of each token, (rows, longest row): 0 in the shared prefix, -1 in the padding,
            n in the suffix of the row's n-th prompt. The attention mask follows from them; it is
            built on the model's device, since it is far larger.
        image_refs: The images, in the order of their tokens.
        last_indices: Token index in the row of each prompt's last token, (rows, most prompts in a
            row); rows with fewer prompts repeat their last one.
        rows: The row of each prompt, (prompts,).
        numbers: The number of each prompt within its row, from 0, (prompts,).
        prefix_lengths: Tokens of each prompt that lie in its row's shared prefix, (prompts,).
        lengths: Tokens of each prompt, (prompts,).
    """

    inputs: dict[str, torch.Tensor]
    segment_ids: torch.Tensor
    image_refs: list[ImageRef]
    last_indices: torch.Tensor
    rows: torch.Tensor
    numbers: torch.Tensor
    prefix_lengths: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "PackedBatch":
        """Move the tensors to a device; accelerate calls this too."""
        inputs = {
            name: tensor.to(device, non_blocking=non_blocking)
            for name, tensor in self.inputs.items()
        }
        others = (self.last_indices, self.rows, self.numbers, self.prefix_lengths, self.lengths)
        segment_ids, *moved = (
            tensor.to(device, non_blocking=non_blocking) for tensor in (self.segment_ids, *others)
        )
        return PackedBatch(inputs, segment_ids, self.image_refs, *moved)

    def token_indices(self) -> torch.Tensor:
        """Return the token index in its row of each prompt's tokens, (prompts, longest prompt).

        Beyond a prompt's own length the entries are arbitrary indices of the row.
        """
        tokens = torch.arange(int(self.lengths.max()), device=self.rows.device)
        last = self.last_indices[self.rows, self.numbers]
        in_suffix = (last + 1 - self.lengths)[:, None] + tokens
        indices = torch.where(tokens < self.prefix_lengths[:, None], tokens, in_suffix)
        return indices.clamp(max=self.inputs["input_ids"].shape[1] - 1)


class TokenizedPrompt(NamedTuple):
    """A single prompt as the model takes it.

    Attributes:
        tokens: Token ids.
        position_ids: Of the tokens, (axes, tokens).
        image_refs: The prompt's image, if it has one.
        image_start: Index of the image's first token; 0 without an image.
    """

    tokens: list[int]
    position_ids: torch.Tensor
    image_refs: list[ImageRef]
    image_start: int


class Packer:
    """Packs prompts into rows for one model, and runs them.

    Attributes:
        image_features: The cache of image features.
        budget: Batch sizes.
        position_axes: The number of axes of a position id: 1, or 3 with M-RoPE.
    """

    def __init__(
        self, encoder: Encoder, weights: PreTrainedModel, budget: Budget | None = None
    ) -> None:
        """Take a model that supports packing (:mod:`mllm_msr.engines.families`).

        Args:
            encoder: The model's encoder.
            weights: The model itself; under an adapter, the model below it.
            budget: Batch sizes; None: a budget for this packer alone.

        Raises:
            ModelError: The family of the model or of its language model is not declared.
        """
        family, text_family = map(find_family, (encoder.config, encoder.config.get_text_config()))
        if family is None or text_family is None:
            raise ModelError(
                expected="a model of a declared family",
                got=f"model type {encoder.config.model_type}",
                where=encoder.name,
                fix="declare it in mllm_msr/engines/families.py",
            )
        self.budget = budget or Budget(encoder.config, weights.dtype, weights.device)
        self.image_features = ImageFeatureCache(encoder, weights, family, self.budget)
        install_sparse_last_layer(weights, text_family.key_norm)
        self._encoder, self._model = encoder, weights.base_model
        self.position_axes = family.position_axes
        self._width = int(encoder.config.get_text_config().hidden_size)

    def plan(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Group prompts into rows; see :func:`mllm_msr.engines.prefixes.plan_rows`."""
        tokens = [self.distinct_tokens(prompt) for prompt in prompts]
        return plan_rows(tokens, self._width, self.budget.row_tokens)

    def batches(self, prompts: Sequence[Prompt], most: int | None = None) -> Iterator[list[int]]:
        """Group prompts into batches of whole rows.

        Args:
            prompts: The prompts.
            most: Tokens of a batch, unless it has only one row; None: what the budget allows.

        Yields:
            Indices of the prompts of a batch.
        """
        most = most or self.budget.tokens
        order = sorted(range(len(prompts)), key=lambda index: _sort_key(prompts[index]))
        for start in range(0, len(order), PROMPTS_PLANNED):
            part = order[start : start + PROMPTS_PLANNED]
            for batch in batch_rows(self.plan([prompts[index] for index in part]), most):
                indices = [part[index] for row in batch for index in row.prompts]
                images = [image for index in indices if (image := prompts[index].image)]
                self.image_features.enqueue(images)
                yield indices

    def distinct_tokens(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens, with image tokens replaced by a negative id of the image.

        Only prompts with the same image then have a common prefix beyond its first token.
        """
        tokens = self._encoder.tokens(prompt)
        if prompt.image is None:
            return tokens
        image_token, image_id = self._encoder.image_token_id, -1 - int(prompt.image.digest[:12], 16)
        return [image_id if token == image_token else token for token in tokens]

    def pack(self, prompts: Sequence[Prompt]) -> PackedBatch:
        """Pack a batch of prompts; all of its rows are one forward."""
        tokenized = [self.tokenize(prompt) for prompt in prompts]
        rows = self.plan(prompts)
        numbers, row_of, prefix_lengths = torch.empty(3, len(prompts), dtype=torch.long)
        last_indices = torch.empty(
            len(rows), max(len(row.prompts) for row in rows), dtype=torch.long
        )
        image_refs: list[ImageRef] = []
        for number, row in enumerate(rows):
            image_refs += _image_refs(row, tokenized)
            last = torch.tensor(list(_last_indices(row, tokenized)))
            last_indices[number, : len(last)], last_indices[number, len(last) :] = last, last[-1]
            row_of[row.prompts], prefix_lengths[row.prompts] = number, row.prefix_length
            numbers[row.prompts] = torch.arange(len(last))
        segment_ids = pad_sequence([_segment_ids(row, tokenized) for row in rows], True, PADDING)
        position_ids = pad_sequence([_position_ids(row, tokenized) for row in rows], True)
        position_ids = position_ids.movedim(2, 0)
        inputs = {
            "input_ids": pad_sequence([_tokens(row, tokenized) for row in rows], True),
            "position_ids": position_ids if len(position_ids) > 1 else position_ids[0],
        }
        lengths = torch.tensor([len(prompt.tokens) for prompt in tokenized])
        return PackedBatch(
            inputs, segment_ids, image_refs, last_indices, row_of, numbers, prefix_lengths, lengths
        )

    def run(
        self, model: nn.Module, packed: PackedBatch, cache: DynamicCache | None = None
    ) -> torch.Tensor:
        """Return the logits after each prompt's last token, (prompts, outputs).

        Args:
            model: The model with its adapter, possibly wrapped for several processes.
            packed: The output of :meth:`pack`, on the model's device.
            cache: A KV cache to fill with all tokens of the rows; None: no cache.
        """
        inputs: dict[str, Any] = packed.inputs | {LOGIT_INDICES: packed.last_indices}
        inputs["attention_mask"] = self._attention_mask(packed.segment_ids)
        with contextlib.ExitStack() as stack:
            if packed.image_refs:
                stack.enter_context(self.image_features.injected(packed.image_refs))
                # Not read, but without pixel values the model would expect no images.
                inputs["pixel_values"] = packed.last_indices.new_empty(1)
            inputs |= {"past_key_values": cache, "use_cache": cache is not None}
            logits = model(**inputs).logits  # (rows, most prompts in a row, outputs)
        return cast(torch.Tensor, logits[packed.rows, packed.numbers])

    def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        """Tokenize a single prompt."""
        tokens = self._encoder.tokens(prompt)
        position_ids = self._prompt_position_ids(tokens, prompt)
        if prompt.image is None:
            return TokenizedPrompt(tokens, position_ids, [], 0)
        image_start = tokens.index(self._encoder.image_token_id)
        return TokenizedPrompt(tokens, position_ids, [prompt.image], image_start)

    def _attention_mask(self, segment_ids: torch.Tensor) -> torch.Tensor:
        """Build the attention mask: causal, within the shared prefix and the token's own segment.

        Args:
            segment_ids: Of the tokens, (rows, longest row).

        Returns:
            True where a token attends, (rows, 1, longest row, longest row).
        """
        same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
        shared = segment_ids[:, None, :] == SHARED
        return (same_segment | shared).tril()[:, None]

    def _prompt_position_ids(self, tokens: Sequence[int], prompt: Prompt) -> torch.Tensor:
        """Return the position ids of a single prompt, (axes, tokens)."""
        if prompt.image is None or self.position_axes == 1:
            return torch.arange(len(tokens)).expand(self.position_axes, -1)
        token_ids = torch.tensor(tokens)
        is_image = token_ids == self._encoder.image_token_id
        return mrope_position_ids(self._model, token_ids, is_image, self._encoder.grid(prompt))


class WholePrompts(Packer):
    """A packer without packing: one row per prompt, for models with sliding-window attention.

    The vision tower still computes each image once.
    """

    def plan(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Return one row per prompt, in the prompts' order."""
        lengths = [len(self._encoder.tokens(prompt)) for prompt in prompts]
        return [Row([index], length, length) for index, length in enumerate(lengths)]

    def _attention_mask(self, segment_ids: torch.Tensor) -> torch.Tensor:
        """Build the padding mask, (rows, longest row); the model adds causality and its windows."""
        return (segment_ids != PADDING).long()


def make_packer(
    encoder: Encoder, weights: PreTrainedModel, budget: Budget | None = None
) -> Packer | None:
    """Return the packer for a model's family.

    Args:
        encoder: The model's encoder.
        weights: The model itself; under an adapter, the model below it.
        budget: Batch sizes; None: a budget for this packer alone.

    Returns:
        A :class:`Packer` where prompts can share rows, :class:`WholePrompts` where at least image
        features can be computed once, or None: prompts run padded, as the processor prepares them.
    """
    if supports_packing(encoder.config):
        return Packer(encoder, weights, budget)
    family = find_family(encoder.config)
    if family and family.takes_images and is_declared(encoder.config):
        return WholePrompts(encoder, weights, budget)
    return None


def _sort_key(prompt: Prompt) -> tuple[str, str, str]:
    """Order prompts roughly as their tokens would be ordered, without tokenizing them."""
    return prompt.before, prompt.image.digest if prompt.image else "", prompt.after


def _tokens(row: Row, prompts: Sequence[TokenizedPrompt]) -> torch.Tensor:
    """Return the token ids of a row, (tokens,)."""
    length = row.prefix_length
    prefix = prompts[row.prompts[0]].tokens[:length]
    suffixes = [token for index in row.prompts for token in prompts[index].tokens[length:]]
    return torch.tensor(prefix + suffixes)


def _position_ids(row: Row, prompts: Sequence[TokenizedPrompt]) -> torch.Tensor:
    """Return the position ids of a row, (tokens, axes)."""
    length = row.prefix_length
    prefix = prompts[row.prompts[0]].position_ids[:, :length]
    suffixes = (prompts[index].position_ids[:, length:] for index in row.prompts)
    return torch.cat([prefix, *suffixes], dim=1).T


def _segment_ids(row: Row, prompts: Sequence[TokenizedPrompt]) -> torch.Tensor:
    """Return the segment ids of a row, (tokens,)."""
    suffixes = (len(prompts[index].tokens) - row.prefix_length for index in row.prompts)
    lengths = [row.prefix_length, *suffixes]
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def _last_indices(row: Row, prompts: Sequence[TokenizedPrompt]) -> Iterator[int]:
    """Yield the token index of each prompt's last token; in the prefix if it has no suffix."""
    length = row.prefix_length
    for index in row.prompts:
        suffix = len(prompts[index].tokens) - row.prefix_length
        length += suffix
        yield (length if suffix else row.prefix_length) - 1


def _image_refs(row: Row, prompts: Sequence[TokenizedPrompt]) -> list[ImageRef]:
    """Return the images of a row in the order of their tokens; one in the prefix occurs once."""
    first = prompts[row.prompts[0]]
    if first.image_refs and first.image_start < row.prefix_length:
        return first.image_refs
    return [image_ref for index in row.prompts for image_ref in prompts[index].image_refs]
