"""Packed forwards: prompts with a shared prefix run in one row.

A packed row holds the shared prefix and, one after the other, each prompt's suffix. Rows follow
each other in one sequence without padding. A token attends to earlier tokens of its row's prefix
and of its own suffix (:mod:`mllm_msr.engines.packed_attention`), and its position id is the one
that it has in its prompt alone. Every prompt's last hidden state is therefore the one that the
prompt alone would give.
"""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, cast

import torch
from accelerate.utils import send_to_device
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
from mllm_msr.engines.image_features import IMAGES_PER_BATCH, ImageFeatureCache
from mllm_msr.engines.packed_attention import ATTENTION, LAYOUT, lay_out
from mllm_msr.engines.prefixes import Row, batch_rows, plan_rows
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import ImageRef

PROMPTS_PLANNED = 5_000  # at once, since their tokens are in memory meanwhile


@dataclass(frozen=True)
class Batch:
    """A batch of prompts, as a model takes it.

    Attributes:
        inputs: Arguments of the model's forward, by name. ``logits_to_keep`` restricts the logits
            to those after each prompt's last token.
        image_refs: The images, in the order of their tokens.
    """

    inputs: dict[str, Any]
    image_refs: list[ImageRef]

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Move the tensors to a device; accelerate calls this too."""
        return replace(self, inputs=send_to_device(self.inputs, device, non_blocking))


@dataclass(frozen=True)
class PackedBatch(Batch):
    """A batch of packed rows: ``input_ids`` are (1, tokens of all rows).

    Attributes:
        token_indices: Of the tokens of each prompt, (prompts, longest prompt). Beyond a prompt's
            own length the entries are arbitrary.
    """

    token_indices: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Move the tensors to a device."""
        token_indices = self.token_indices.to(device, non_blocking=non_blocking)
        return replace(super().to(device, non_blocking), token_indices=token_indices)


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
        padded: Whether the rows of a batch are padded to the longest.
    """

    padded = False

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
        family = find_family(encoder.config)
        if family is None or not is_declared(encoder.config):
            raise ModelError(
                expected="a model of a declared family",
                got=f"model type {encoder.config.model_type}",
                where=encoder.name,
                fix="declare it in mllm_msr/engines/families.py",
            )
        self.budget = budget or Budget(encoder.config, weights.dtype, weights.device)
        self.image_features = ImageFeatureCache(encoder, weights, family, self.budget)
        weights.set_attn_implementation(ATTENTION)
        self._encoder, self._model = encoder, weights.base_model
        self.position_axes = family.position_axes
        self._width = int(encoder.config.get_text_config().hidden_size)

    def plan(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Group prompts into rows; see :func:`mllm_msr.engines.prefixes.plan_rows`."""
        tokens = [self.distinct_tokens(prompt) for prompt in prompts]
        return plan_rows(tokens, self._width, self.budget.row_tokens)

    def batches(self, prompts: Sequence[Prompt], most: int | None = None) -> Iterator[list[int]]:
        """Group prompts into batches of whole rows, planned as they are needed.

        Args:
            prompts: The prompts.
            most: Tokens of a batch, unless it has only one row; None: what the budget allows.

        Yields:
            Indices of the prompts of a batch.
        """
        most = most or self.budget.tokens
        order = sorted(range(len(prompts)), key=lambda index: sort_key(prompts[index]))
        for start in range(0, len(order), PROMPTS_PLANNED):
            part = order[start : start + PROMPTS_PLANNED]
            rows = self.plan([prompts[index] for index in part])
            for batch in batch_rows(rows, most, self.padded):
                yield [part[index] for row in batch for index in row.prompts]

    def enqueue(self, prompts: Iterable[Prompt]) -> None:
        """Queue the images of prompts that will run in this order."""
        self.image_features.enqueue(prompt.image for prompt in prompts if prompt.image)

    def prefetch(self, prompts: Sequence[Prompt], most: int | None = None) -> Iterator[list[int]]:
        """Yield :meth:`batches` in the order they run in; queue the images of those that follow."""
        ahead = deque[list[int]]()
        for batch in self.batches(prompts, most):
            self.enqueue(prompts[index] for index in batch)
            ahead.append(batch)
            if len(ahead) > IMAGES_PER_BATCH:  # enough to fill a batch of the vision tower
                yield ahead.popleft()
        yield from ahead

    def distinct_tokens(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens, with image tokens replaced by a negative id of the image.

        Only prompts with the same image then have a common prefix beyond its first token.
        """
        tokens = self._encoder.tokens(prompt)
        if prompt.image is None:
            return tokens
        image_token, image_id = self._encoder.image_token_id, -1 - int(prompt.image.digest[:12], 16)
        return [image_id if token == image_token else token for token in tokens]

    def pack(self, prompts: Sequence[Prompt]) -> Batch:
        """Pack a batch of prompts; all of its rows are one forward."""
        tokenized = [self.tokenize(prompt) for prompt in prompts]
        rows = self.plan(prompts)
        found = dict(_token_indices(rows, tokenized))
        indices = [found[number] for number in range(len(prompts))]
        position_ids = torch.cat([_position_ids(row, tokenized) for row in rows], dim=1)[:, None]
        inputs = {
            "input_ids": torch.cat([_tokens(row, tokenized) for row in rows])[None],
            "position_ids": position_ids if self.position_axes > 1 else position_ids[0],
            "logits_to_keep": torch.stack([of_prompt[-1] for of_prompt in indices]),
            LAYOUT: lay_out([_segment_lengths(row, tokenized) for row in rows]),
            # Not read, but with a mask of four axes transformers builds none of its own.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        }
        image_refs = [image_ref for row in rows for image_ref in _image_refs(row, tokenized)]
        return PackedBatch(inputs, image_refs, pad_sequence(indices, batch_first=True))

    def run(
        self, model: nn.Module, batch: Batch, cache: DynamicCache | None = None
    ) -> torch.Tensor:
        """Return the logits after each prompt's last token, (prompts, outputs).

        Args:
            model: The model with its adapter, possibly wrapped for several processes.
            batch: The output of :meth:`pack`, on the model's device.
            cache: A KV cache to fill with all tokens of the rows; None: no cache.
        """
        inputs = batch.inputs | {"past_key_values": cache, "use_cache": cache is not None}
        with contextlib.ExitStack() as stack:
            if batch.image_refs:
                stack.enter_context(self.image_features.injected(batch.image_refs))
                # Not read, but without pixel values the model would expect no images.
                inputs["pixel_values"] = inputs["input_ids"].new_empty(1)
            return cast(torch.Tensor, model(**inputs).logits.flatten(0, 1))

    def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        """Tokenize a single prompt."""
        tokens = self._encoder.tokens(prompt)
        position_ids = self._prompt_position_ids(tokens, prompt)
        if prompt.image is None:
            return TokenizedPrompt(tokens, position_ids, [], 0)
        image_start = tokens.index(self._encoder.image_token_id)
        return TokenizedPrompt(tokens, position_ids, [prompt.image], image_start)

    def _prompt_position_ids(self, tokens: Sequence[int], prompt: Prompt) -> torch.Tensor:
        """Return the position ids of a single prompt, (axes, tokens)."""
        if prompt.image is None or self.position_axes == 1:
            return torch.arange(len(tokens)).expand(self.position_axes, -1)
        token_ids = torch.tensor(tokens)
        is_image = token_ids == self._encoder.image_token_id
        return mrope_position_ids(self._model, token_ids, is_image, self._encoder.grid(prompt))


class WholePrompts(Packer):
    """A packer without packing: one padded row per prompt, for models with sliding windows.

    The vision tower still computes each image once.
    """

    padded = True

    def plan(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Return one row per prompt, in the prompts' order."""
        lengths = [len(self._encoder.tokens(prompt)) for prompt in prompts]
        return [Row([index], length, length) for index, length in enumerate(lengths)]

    def pack(self, prompts: Sequence[Prompt]) -> Batch:
        """Pad a batch of prompts on the left."""
        tokenized = [self.tokenize(prompt) for prompt in prompts]
        tokens = [torch.tensor(prompt.tokens) for prompt in tokenized]
        position_ids = _pad_left([prompt.position_ids.T for prompt in tokenized]).movedim(2, 0)
        inputs = {
            "input_ids": _pad_left(tokens),
            "position_ids": position_ids if self.position_axes > 1 else position_ids[0],
            "attention_mask": _pad_left([torch.ones_like(of_prompt) for of_prompt in tokens]),
            "logits_to_keep": 1,
        }
        return Batch(inputs, [ref for prompt in tokenized for ref in prompt.image_refs])


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


def sort_key(prompt: Prompt) -> tuple[str, str, str]:
    """Order prompts roughly as their tokens would be ordered, without tokenizing them.

    Prompts with a shared prefix are then next to each other.
    """
    return prompt.before, prompt.image.digest if prompt.image else "", prompt.after


def _tokens(row: Row, prompts: Sequence[TokenizedPrompt]) -> torch.Tensor:
    """Return the token ids of a row, (tokens,)."""
    length = row.prefix_length
    prefix = prompts[row.prompts[0]].tokens[:length]
    suffixes = [token for index in row.prompts for token in prompts[index].tokens[length:]]
    return torch.tensor(prefix + suffixes)


def _position_ids(row: Row, prompts: Sequence[TokenizedPrompt]) -> torch.Tensor:
    """Return the position ids of a row, (axes, tokens)."""
    length = row.prefix_length
    prefix = prompts[row.prompts[0]].position_ids[:, :length]
    suffixes = (prompts[index].position_ids[:, length:] for index in row.prompts)
    return torch.cat([prefix, *suffixes], dim=1)


def _segment_lengths(row: Row, prompts: Sequence[TokenizedPrompt]) -> tuple[int, list[int]]:
    """Return the length of a row's prefix and those of its suffixes."""
    length = row.prefix_length
    return length, [len(prompts[index].tokens) - length for index in row.prompts]


def _token_indices(
    rows: Sequence[Row], prompts: Sequence[TokenizedPrompt]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each prompt and its token indices, (tokens of the prompt,)."""
    start = 0
    for row in rows:
        prefix = torch.arange(start, start + row.prefix_length)
        start += row.prefix_length
        for index in row.prompts:
            end = start + len(prompts[index].tokens) - row.prefix_length
            yield index, torch.cat([prefix, torch.arange(start, end)])
            start = end


def _image_refs(row: Row, prompts: Sequence[TokenizedPrompt]) -> list[ImageRef]:
    """Return the images of a row in the order of their tokens; one in the prefix occurs once."""
    first = prompts[row.prompts[0]]
    if first.image_refs and first.image_start < row.prefix_length:
        return first.image_refs
    return [image_ref for index in row.prompts for image_ref in prompts[index].image_refs]


def _pad_left(sequences: list[torch.Tensor]) -> torch.Tensor:
    """Pad sequences with zeros on the left, (tokens, ...) each -> (sequences, longest, ...)."""
    return pad_sequence(sequences, batch_first=True, padding_side="left")
