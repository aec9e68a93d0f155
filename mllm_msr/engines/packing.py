"""The shared-prefix forward: prompts that begin alike run as one sequence.

A row holds the common beginning and, one after the other, each prompt's end. The mask lets a token
see what comes before it in the beginning and in its own end, and its position is the one that it
has in its prompt alone; so every prompt's last hidden state is what the prompt alone would give.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from mllm_msr.engines.budgets import Budget
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.image_features import ImageFeatures
from mllm_msr.engines.last_layer import READ_AT, read_places_only
from mllm_msr.engines.prefixes import Row, batch_rows, plan_rows
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import ImageRef

# Families whose forward takes image features that were computed before, and which put tokens at
# positions that a Packer finds; tests/engines/test_packing.py holds each against plain forwards.
# Any other family looks at the pixels of each prompt.
SEE_ONCE = frozenset({"llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm"})
# These, and language models, whose attention is causal over tokens and positions alone. Any other
# family gets batches of whole prompts.
PACKABLE = SEE_ONCE | {"llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3_vl_text"}
# Whose the tokens of a row are: of all prompts, of none; else of a prompt, from 1 on.
BEGINNING, PADDING = 0, -1
PROMPTS_PLANNED = 5_000  # at once; their tokens are in memory then


@dataclass(frozen=True)
class Packed:
    """A batch of rows as a model takes it.

    Attributes:
        inputs: ``input_ids`` (rows, longest), ``position_ids`` (rows, longest), or (3, rows,
            longest) in families with positions of three axes.
        owners: Whose each token is: all prompts', none's, or that of its row's prompt 1, 2, ...;
            (rows, longest). The mask follows from it, where the model is, for it is far larger.
        image_refs: Those shown, in the order of their tokens.
        ends: The places in a row of its prompts' last tokens, (rows, most prompts of a row); what
            is left over repeats the row's last one.
        rows: The row of each prompt, (prompts,).
        numbers: Which of its row's prompts each prompt is, (prompts,).
        shared: How many tokens each prompt shares with its row's others, (prompts,).
        lengths: How many tokens each prompt has, (prompts,).
    """

    inputs: dict[str, torch.Tensor]
    owners: torch.Tensor
    image_refs: list[ImageRef]
    ends: torch.Tensor
    rows: torch.Tensor
    numbers: torch.Tensor
    shared: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Packed":
        """Move the tensors to a device; accelerate calls this too."""
        inputs = {
            name: tensor.to(device, non_blocking=non_blocking)
            for name, tensor in self.inputs.items()
        }
        others = (self.ends, self.rows, self.numbers, self.shared, self.lengths)
        owners, *moved = (
            tensor.to(device, non_blocking=non_blocking) for tensor in (self.owners, *others)
        )
        return Packed(inputs, owners, self.image_refs, *moved)

    def places(self) -> torch.Tensor:
        """Give the place in its row of each prompt's tokens, (prompts, longest prompt).

        What is over a prompt's own length is some place of the row.
        """
        tokens = torch.arange(int(self.lengths.max()), device=self.rows.device)
        ends = self.ends[self.rows, self.numbers]
        own = (ends + 1 - self.lengths)[:, None] + tokens
        places = torch.where(tokens < self.shared[:, None], tokens, own)
        return places.clamp(max=self.inputs["input_ids"].shape[1] - 1)


class Line(NamedTuple):
    """A prompt alone.

    Attributes:
        tokens: Its tokens.
        places: Their positions, (axes, tokens); one axis but for multimodal rotary positions.
        image_refs: The image it shows, if any.
        image: Where the image's tokens begin.
    """

    tokens: list[int]
    places: torch.Tensor
    image_refs: list[ImageRef]
    image: int


def may_pack(encoder: Encoder) -> bool:
    """Tell whether prompts can share rows: the family is known, and no layer sees a window only."""
    text = encoder.config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    whole = set(kinds) == {"full_attention"} if kinds else not getattr(text, "sliding_window", None)
    types = {encoder.config.model_type, text.model_type}
    return types <= PACKABLE and whole


class Packer:
    """Lays prompts out in rows for one model, and runs them.

    Attributes:
        features: Of the images.
        budget: What is computed at once.
        axes: Of a token's position: one, or time, height and width.
    """

    def __init__(
        self, encoder: Encoder, weights: PreTrainedModel, budget: Budget | None = None
    ) -> None:
        """Take a model that may pack.

        Args:
            encoder: The model's encoder.
            weights: The model itself; under an adapter, what is below it.
            budget: What it may compute at once; None: one of its own.
        """
        self.budget = budget or Budget(encoder.config, weights.dtype, weights.device)
        self.features = ImageFeatures(encoder, weights, self.budget)
        read_places_only(weights)
        self._encoder, self._model = encoder, weights.base_model
        self.axes = 3 if hasattr(self._model, "get_rope_index") else 1
        self._width = int(encoder.config.get_text_config().hidden_size)

    def plan(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Part prompts into rows; see :func:`mllm_msr.engines.prefixes.plan_rows`."""
        tokens = [self.distinguish(prompt) for prompt in prompts]
        return plan_rows(tokens, self._width, self.budget.row_tokens)

    def batches(self, prompts: Sequence[Prompt], most: int | None = None) -> Iterator[list[int]]:
        """Cut prompts into batches of whole rows, each of at most so many tokens, one row at least.

        Args:
            prompts: The prompts.
            most: Tokens of a batch; None: what the budget allows.
        """
        most = most or self.budget.tokens
        order = sorted(range(len(prompts)), key=lambda index: _sort_key(prompts[index]))
        for start in range(0, len(order), PROMPTS_PLANNED):
            part = order[start : start + PROMPTS_PLANNED]
            for batch in batch_rows(self.plan([prompts[index] for index in part]), most):
                chosen = [part[index] for row in batch for index in row.prompts]
                shown = [image for index in chosen if (image := prompts[index].image)]
                self.features.expect(shown)
                yield chosen

    def distinguish(self, prompt: Prompt) -> list[int]:
        """Give a prompt's tokens, those of its image as a number of that image alone."""
        tokens = self._encoder.tokens(prompt)
        if prompt.image is None:
            return tokens
        image, own = self._encoder.config.image_token_id, -1 - int(prompt.image.digest[:12], 16)
        return [own if token == image else token for token in tokens]

    def pack(self, prompts: Sequence[Prompt]) -> Packed:
        """Lay a batch of prompts out; all of its rows are one forward."""
        lines = [self.line(prompt) for prompt in prompts]
        rows = self.plan(prompts)
        where = torch.empty(3, len(prompts), dtype=torch.long)
        ends = torch.empty(len(rows), max(len(row.prompts) for row in rows), dtype=torch.long)
        image_refs: list[ImageRef] = []
        for number, row in enumerate(rows):
            image_refs += _image_refs_of(row, lines)
            own = torch.tensor(list(_ends_of(row, lines)))
            ends[number, : len(own)], ends[number, len(own) :] = own, own[-1]
            where[0, row.prompts], where[2, row.prompts] = number, row.shared
            where[1, row.prompts] = torch.arange(len(own))
        owners = pad_sequence([_owners_of(row, lines) for row in rows], True, PADDING)
        places = pad_sequence([_places_of(row, lines) for row in rows], True).movedim(2, 0)
        inputs = {
            "input_ids": pad_sequence([_tokens_of(row, lines) for row in rows], True),
            "position_ids": places if len(places) > 1 else places[0],
        }
        lengths = torch.tensor([len(line.tokens) for line in lines])
        of_prompt, number, shared = where
        return Packed(inputs, owners, image_refs, ends, of_prompt, number, shared, lengths)

    def run(
        self, model: nn.Module, packed: Packed, cache: DynamicCache | None = None
    ) -> torch.Tensor:
        """Give the logits after each prompt's last token, (prompts, outputs).

        Args:
            model: The model with its adapter, perhaps wrapped for several processes.
            packed: Of :meth:`pack`; its tensors on the model's device.
            cache: Gets the keys and values of all tokens; None: they are not kept.
        """
        inputs: dict[str, Any] = packed.inputs | {READ_AT: packed.ends}
        inputs["attention_mask"] = self._mask(packed.owners)
        with contextlib.ExitStack() as stack:
            if packed.image_refs:
                stack.enter_context(self.features.shown(packed.image_refs))
                inputs["pixel_values"] = packed.ends.new_empty(1)  # says that there are images
            inputs |= {"past_key_values": cache, "use_cache": cache is not None}
            logits = model(**inputs).logits  # (rows, most prompts of a row, outputs)
        return cast(torch.Tensor, logits[packed.rows, packed.numbers])

    def line(self, prompt: Prompt) -> Line:
        """Lay a prompt out alone."""
        tokens = self._encoder.tokens(prompt)
        places = self._places(tokens, prompt)
        if prompt.image is None:
            return Line(tokens, places, [], 0)
        image = tokens.index(self._encoder.config.image_token_id)
        return Line(tokens, places, [prompt.image], image)

    def _mask(self, owners: torch.Tensor) -> torch.Tensor:
        """Say who may look where: back, into the beginning and its own.

        Args:
            owners: Whose tokens a row's are, (rows, longest).

        Returns:
            True where a token may look, (rows, 1, longest, longest).
        """
        own = owners[:, :, None] == owners[:, None, :]
        beginning = owners[:, None, :] == BEGINNING
        return (own | beginning).tril()[:, None]

    def _places(self, tokens: Sequence[int], prompt: Prompt) -> torch.Tensor:
        """Give the positions of a prompt's tokens, (axes, tokens)."""
        if prompt.image is None or self.axes == 1:
            return torch.arange(len(tokens)).expand(self.axes, -1)
        ids = torch.tensor(tokens)[None]
        kinds = (ids == self._encoder.config.image_token_id).int()  # 1: an image
        grid = self._encoder.grid(prompt)
        places, _ = self._model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
        return cast(torch.Tensor, places)[:, 0]


class WholePrompts(Packer):
    """Lays prompts out each in a row of its own, for language models that cannot share rows.

    The vision tower still sees each image once.
    """

    def plan(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Give each prompt its row, in the prompts' order."""
        lengths = [len(self._encoder.tokens(prompt)) for prompt in prompts]
        return [Row([index], length, length) for index, length in enumerate(lengths)]

    def _mask(self, owners: torch.Tensor) -> torch.Tensor:
        """Say where tokens are, (rows, longest): padding is on the right, where no prompt looks.

        The model adds its own windows.
        """
        return (owners != PADDING).long()


def find_packer(
    encoder: Encoder, weights: PreTrainedModel, budget: Budget | None = None
) -> Packer | None:
    """Give what lays prompts out as the model's family allows; None: as its processor does.

    Args:
        encoder: The model's encoder.
        weights: The model itself; under an adapter, what is below it.
        budget: What it may compute at once; None: one of its own.
    """
    if may_pack(encoder):
        return Packer(encoder, weights, budget)
    if encoder.config.model_type in SEE_ONCE:
        return WholePrompts(encoder, weights, budget)
    return None


def _sort_key(prompt: Prompt) -> tuple[str, str, str]:
    """Order prompts about as their tokens would, without finding these."""
    return prompt.before, prompt.image.digest if prompt.image else "", prompt.after


def _tokens_of(row: Row, lines: Sequence[Line]) -> torch.Tensor:
    tokens = lines[row.prompts[0]].tokens[: row.shared]
    return torch.tensor(
        tokens + [token for index in row.prompts for token in lines[index].tokens[row.shared :]]
    )


def _places_of(row: Row, lines: Sequence[Line]) -> torch.Tensor:
    """Give the positions of a row's tokens, (tokens, axes)."""
    first = lines[row.prompts[0]].places[:, : row.shared]
    return torch.cat([first, *(lines[i].places[:, row.shared :] for i in row.prompts)], dim=1).T


def _owners_of(row: Row, lines: Sequence[Line]) -> torch.Tensor:
    """Number whose tokens a row's are."""
    lengths = [row.shared, *(len(lines[index].tokens) - row.shared for index in row.prompts)]
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def _ends_of(row: Row, lines: Sequence[Line]) -> Iterator[int]:
    """Give the place of each prompt's last token in a row."""
    length = row.shared
    for index in row.prompts:
        own = len(lines[index].tokens) - row.shared
        length += own
        yield (length if own else row.shared) - 1


def _image_refs_of(row: Row, lines: Sequence[Line]) -> list[ImageRef]:
    """Give a row's images in the order of their tokens; a shared one is there once."""
    first = lines[row.prompts[0]]
    if first.image_refs and first.image < row.shared:
        return first.image_refs
    return [image_ref for index in row.prompts for image_ref in lines[index].image_refs]
