"""Greedy decoding of many prompts at once: who is done leaves, who waits comes in.

Every answer under way has a slot with room for its keys and values, so that a step copies none of
them; the slots in use are the first ones. Prompts' own tokens run once, those that begin alike in
one row, and then each step gives one token to every answer under way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from mllm_msr.core.devices import free_memory
from mllm_msr.core.errors import ModelError
from mllm_msr.engines.budgets import Budget, cache_bytes
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.packing import Line, Packed, Packer
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.responses import Response

SLOTS = 64  # answers under way at once, at most; fewer where memory is short
REFILL_SHARE = 4  # new prompts come in when one slot in four is free


@dataclass
class _Answering:
    """An answer under way.

    Attributes:
        index: Of its prompt.
        length: Tokens whose keys and values its slot has.
        place: Position of its next token.
        tokens: What was answered so far.
    """

    index: int
    length: int
    place: int
    tokens: list[int] = field(default_factory=list)


class Slots:
    """Keys and values of the answers under way; what a model's layers take for their cache."""

    is_compileable = False

    def __init__(self, slots: int, room: int) -> None:
        """Make slots with room for so many tokens each; memory is taken when it is first used."""
        self._slots, self._room = slots, room
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._slots_used = self._places = torch.empty(0, dtype=torch.long)
        self._longest = 0

    def fill(self, first: int, cache: DynamicCache, packed: Packed) -> None:
        """Copy prompts' keys and values into the slots from ``first`` on."""
        rows, places = packed.rows[:, None], packed.places()
        last, longest = first + len(places), places.shape[1]
        for number, layer in enumerate(cache.layers):
            if number not in self._layers:
                _, heads, _, width = layer.keys.shape
                shape = (self._slots, heads, self._room, width)
                self._layers[number] = layer.keys.new_zeros(shape), layer.values.new_zeros(shape)
            keys, values = self._layers[number]
            # (prompts, tokens, heads, width), since an index stands on both sides of the heads
            keys[first:last, :, :longest] = layer.keys[rows, :, places].transpose(1, 2)
            values[first:last, :, :longest] = layer.values[rows, :, places].transpose(1, 2)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot onto another."""
        for keys, values in self._layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def expect(self, places: Sequence[int], device: torch.device) -> None:
        """Say where the next step's tokens go, a place for each slot in use."""
        self._longest = max(places)
        self._places = torch.tensor(places, device=device)
        self._slots_used = torch.arange(len(places), device=device)

    def mask(self) -> torch.Tensor:
        """Say what the next step's tokens see, (slots in use, 1, 1, tokens): their own slot."""
        tokens = torch.arange(self._longest + 1, device=self._places.device)
        return (tokens <= self._places[:, None])[:, None, None]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one token to each slot in use; gives all of theirs, (slots, heads, tokens, width)."""
        kept_keys, kept_values = self._layers[layer_idx]
        kept_keys[self._slots_used, :, self._places] = keys[:, :, 0]
        kept_values[self._slots_used, :, self._places] = values[:, :, 0]
        used, tokens = len(self._slots_used), self._longest + 1
        return kept_keys[:used, :, :tokens], kept_values[:used, :, :tokens]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Give the length that the longest slot in use has before the step."""
        del layer_idx
        return self._longest


class Decoder:
    """Answers prompts greedily, many at once."""

    def __init__(
        self, encoder: Encoder, weights: PreTrainedModel, budget: Budget | None = None
    ) -> None:
        """Take a model that may pack (:func:`mllm_msr.engines.packing.may_pack`).

        Args:
            encoder: The model's encoder.
            weights: The model.
            budget: What it may compute at once; None: one of its own.
        """
        self._encoder, self._weights = encoder, weights
        self._packer = Packer(encoder, weights, budget)
        ends = weights.generation_config.eos_token_id
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Response]:
        """Answer prompts.

        Args:
            prompts: Best of like length.
            max_new_tokens: The longest answer, in tokens.
        """
        lines = [self._packer.line(prompt) for prompt in prompts]
        room = max((len(line.tokens) for line in lines), default=0) + max_new_tokens
        count = min(self._count_slots(room), len(lines))
        slots, under_way = Slots(count, room), list[_Answering]()
        waiting = sorted(range(len(lines)), key=lambda index: len(lines[index].tokens))
        answers: dict[int, Response] = {}
        while len(answers) < len(lines):
            free = count - len(under_way)
            if waiting and free * REFILL_SHARE >= count:
                chosen = [waiting.pop() for _ in range(min(free, len(waiting)))]
                for batch in self._packer.batches([prompts[index] for index in chosen]):
                    read = [chosen[number] for number in batch]
                    under_way += self._read(read, prompts, lines, slots, len(under_way))
            else:
                self._step(under_way, slots)
            answers |= self._leave(under_way, slots, max_new_tokens)
        return [answers[index] for index in range(len(lines))]

    def _count_slots(self, room: int) -> int:
        """Count the slots that fit into a quarter of the memory that is free; one at least.

        A quarter is for image features (:mod:`mllm_msr.engines.image_features`), the rest for
        forwards.
        """
        of_a_token = cache_bytes(self._encoder.config.get_text_config(), self._weights.dtype)
        fit = int(free_memory(self._weights.device) // (4 * of_a_token * room))
        return self._packer.budget.shrink(min(SLOTS, fit))

    def _read(
        self,
        batch: Sequence[int],
        prompts: Sequence[Prompt],
        lines: Sequence[Line],
        slots: Slots,
        first: int,
    ) -> list[_Answering]:
        """Run prompts' own tokens, and begin their answers in the slots from ``first`` on."""
        packed = self._packer.pack([prompts[index] for index in batch]).to(self._weights.device)
        cache = DynamicCache()
        logits = self._packer.run(self._weights, packed, cache)
        slots.fill(first, cache, packed)
        begun = zip(batch, self._choose(logits), strict=True)
        return [
            _Answering(n, len(lines[n].tokens), int(lines[n].places.max()) + 1, [token])
            for n, token in begun
        ]

    def _step(self, under_way: Sequence[_Answering], slots: Slots) -> None:
        """Give one token to every answer under way."""
        device = self._weights.device
        slots.expect([answering.length for answering in under_way], device)
        places = torch.tensor([[answering.place] for answering in under_way], device=device)
        seen = slots.mask()
        logits = self._weights(
            input_ids=torch.tensor(
                [answering.tokens[-1:] for answering in under_way], device=device
            ),
            attention_mask=seen,
            position_ids=places.expand(3, -1, -1) if self._packer.axes > 1 else places,
            past_key_values=slots,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        for answering, token in zip(under_way, self._choose(logits), strict=True):
            answering.tokens.append(token)
            answering.length += 1
            answering.place += 1

    def _choose(self, logits: torch.Tensor) -> list[int]:
        """Choose the most likely token of each row, (rows, vocabulary).

        Raises:
            ModelError: A logit is not finite.
        """
        refuse_non_finite_logits(logits, self._encoder.name)
        chosen: list[int] = logits.float().argmax(-1).tolist()
        return chosen

    def _leave(
        self, under_way: list[_Answering], slots: Slots, max_new_tokens: int
    ) -> dict[int, Response]:
        """Take finished answers out; the last slots in use move into those that come free."""
        done = {}
        for slot in range(len(under_way) - 1, -1, -1):
            answering = under_way[slot]
            ended = answering.tokens[-1] in self._ends
            if not ended and len(answering.tokens) < max_new_tokens:
                continue
            text = self._encoder.tokenizer.decode(answering.tokens, skip_special_tokens=True)
            done[answering.index] = Response(text.strip(), ended)
            last = under_way.pop()
            if slot < len(under_way):
                slots.move(len(under_way), slot, last.length)
                under_way[slot] = last
        return done


def refuse_non_finite_logits(logits: torch.Tensor, where: str) -> None:
    """Refuse logits from which no token can be chosen.

    Args:
        logits: Of any shape.
        where: Model, for the error.

    Raises:
        ModelError: One is infinite or none.
    """
    if not torch.isfinite(logits).all():
        fix = "use another dtype (MLLM_MSR_DTYPE), or check the model's files"
        raise ModelError(expected="finite logits", got="inf or nan", where=where, fix=fix)
