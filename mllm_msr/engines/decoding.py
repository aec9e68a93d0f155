"""Greedy decoding by continuous batching: finished sequences free their slots for queued prompts.

Every sequence has a slot of the KV cache, large enough for prompt and longest response, so that a
step copies no keys and values; the slots in use are always the first ones. Prompts are prefilled in
packed rows with shared prefixes, and then each step adds one token to every running sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from mllm_msr.core.devices import free_memory
from mllm_msr.core.errors import ModelError
from mllm_msr.engines.budgets import MEMORY_DIVISOR, Budget, cache_bytes
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.packing import PackedBatch, Packer, TokenizedPrompt
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import Response, StepOutput

# Sequences that run at once, at most; fewer where memory is short. The time per step hardly depends
# on their number on a GPU, and grows less than it on a CPU.
SLOTS = 256
REFILL_DIVISOR = 4  # queued prompts are prefilled once a quarter of the slots is free


@dataclass
class _Sequence:
    """A running sequence.

    Attributes:
        prompt: Index of its prompt.
        length: Tokens that its slot of the KV cache holds.
        position_id: Of its next token, on all axes.
        tokens: Token ids generated so far.
    """

    prompt: int
    length: int
    position_id: int
    tokens: list[int] = field(default_factory=list)


class SlotCache:
    """A KV cache with one slot per running sequence.

    Upstream: stands in for ``transformers.cache_utils.Cache``, transformers>=5.23,<6, of which a
    model's forward and its attention call ``is_compileable``, ``update`` and ``get_seq_length``.
    transformers' own static cache expects every sequence to be of the same length.
    """

    is_compileable = False

    def __init__(self, slots: int, slot_tokens: int) -> None:
        """Take the number of slots and the tokens of each; memory is allocated at first use."""
        self._slots, self._slot_tokens = slots, slot_tokens
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._used = self._token_indices = torch.empty(0, dtype=torch.long)
        self._longest = 0

    def fill(self, first: int, cache: DynamicCache, packed: PackedBatch) -> None:
        """Copy the keys and values of prefilled prompts into the slots from ``first`` on."""
        indices = packed.token_indices
        last, longest = first + len(indices), indices.shape[1]
        for number, layer in enumerate(cache.layers):
            if number not in self._layers:
                _, heads, _, width = layer.keys.shape
                shape = (self._slots, heads, self._slot_tokens, width)
                self._layers[number] = layer.keys.new_zeros(shape), layer.values.new_zeros(shape)
            keys, values = self._layers[number]
            keys[first:last, :, :longest] = layer.keys[0][:, indices].transpose(0, 1)
            values[first:last, :, :longest] = layer.values[0][:, indices].transpose(0, 1)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a slot to another."""
        for keys, values in self._layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def begin_step(self, token_indices: Sequence[int], device: torch.device) -> None:
        """Set the token index of the next token of each slot in use."""
        self._longest = max(token_indices)
        self._token_indices = torch.tensor(token_indices, device=device)
        self._used = torch.arange(len(token_indices), device=device)

    def attention_mask(self) -> torch.Tensor:
        """Return the mask of the next step, (slots in use, 1, 1, tokens): True in the own slot."""
        tokens = torch.arange(self._longest + 1, device=self._token_indices.device)
        return (tokens <= self._token_indices[:, None])[:, None, None]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one token to each slot; return all tokens, (slots in use, heads, tokens, width)."""
        cached_keys, cached_values = self._layers[layer_idx]
        cached_keys[self._used, :, self._token_indices] = keys[:, :, 0]
        cached_values[self._used, :, self._token_indices] = values[:, :, 0]
        used, tokens = len(self._used), self._longest + 1
        return cached_keys[:used, :, :tokens], cached_values[:used, :, :tokens]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the length of the longest slot in use before the step."""
        del layer_idx
        return self._longest


class Decoder:
    """Generates responses greedily, many at once."""

    def __init__(
        self, encoder: Encoder, weights: PreTrainedModel, budget: Budget | None = None
    ) -> None:
        """Take a model that supports packing (:mod:`mllm_msr.engines.families`).

        Args:
            encoder: The model's encoder.
            weights: The model.
            budget: Batch sizes; None: a budget for this decoder alone.
        """
        self._encoder, self._weights = encoder, weights
        self._packer = Packer(encoder, weights, budget)
        eos = weights.generation_config.eos_token_id
        self._eos_token_ids = frozenset(eos if isinstance(eos, list) else [eos])

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[StepOutput]:
        """Generate the response to each prompt.

        Args:
            prompts: Preferably of similar length: all slots have room for the longest.
            max_new_tokens: The longest response in tokens.

        Yields:
            The responses that each step finished: a forward, or a prefill of several prompts.
        """
        tokenized = [self._packer.tokenize(prompt) for prompt in prompts]
        lengths = [len(prompt.tokens) for prompt in tokenized]
        slot_tokens = max(lengths, default=0) + max_new_tokens
        slots = min(self._count_slots(slot_tokens), len(prompts))
        cache, running = SlotCache(slots, slot_tokens), list[_Sequence]()
        queue = sorted(range(len(prompts)), key=lengths.__getitem__)  # taken from the end
        while queue or running:
            free = slots - len(running)
            if queue and free * REFILL_DIVISOR >= slots:
                admitted = [queue.pop() for _ in range(min(free, len(queue)))]
                some = [prompts[index] for index in admitted]
                for batch in self._packer.prefetch(some):
                    indices = [admitted[number] for number in batch]
                    running += self._prefill(indices, prompts, tokenized, cache, len(running))
                tokens = len(admitted)
            else:
                self._step(running, cache)
                tokens = len(running)
            yield StepOutput(self._remove_finished(running, cache, max_new_tokens), tokens)

    def _count_slots(self, slot_tokens: int) -> int:
        """Return how many slots fit into a quarter of the free memory; at least one.

        A further quarter is for image features (:mod:`mllm_msr.engines.image_features`), the rest
        for forwards.
        """
        token_bytes = cache_bytes(self._encoder.config.get_text_config(), self._weights.dtype)
        memory = free_memory(self._weights.device)
        fitting = int(memory // (MEMORY_DIVISOR * token_bytes * slot_tokens))
        return self._packer.budget.scale(min(SLOTS, fitting))

    def _prefill(
        self,
        indices: Sequence[int],
        prompts: Sequence[Prompt],
        tokenized: Sequence[TokenizedPrompt],
        cache: SlotCache,
        first: int,
    ) -> list[_Sequence]:
        """Run some of the prompts; start their sequences in the slots from ``first`` on."""
        packed = cast(PackedBatch, self._packer.pack([prompts[index] for index in indices]))
        packed = packed.to(self._weights.device)
        prefix_cache = DynamicCache()
        logits = self._packer.run(self._weights, packed, prefix_cache)
        cache.fill(first, prefix_cache, packed)
        return [
            _Sequence(
                index,
                length=len(tokenized[index].tokens),
                position_id=int(tokenized[index].position_ids.max()) + 1,
                tokens=[token],
            )
            for index, token in zip(indices, self._choose_tokens(logits), strict=True)
        ]

    def _step(self, running: Sequence[_Sequence], cache: SlotCache) -> None:
        """Add one token to every running sequence."""
        device = self._weights.device
        cache.begin_step([sequence.length for sequence in running], device)
        position_ids = torch.tensor([[sequence.position_id] for sequence in running], device=device)
        axes = self._packer.position_axes
        logits = self._weights(
            input_ids=torch.tensor([sequence.tokens[-1:] for sequence in running], device=device),
            attention_mask=cache.attention_mask(),
            position_ids=position_ids.expand(axes, -1, -1) if axes > 1 else position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        for sequence, token in zip(running, self._choose_tokens(logits), strict=True):
            sequence.tokens.append(token)
            sequence.length += 1
            sequence.position_id += 1

    def _choose_tokens(self, logits: torch.Tensor) -> list[int]:
        """Return the most likely token of each row, (rows, vocabulary).

        Raises:
            ModelError: A logit is not finite.
        """
        check_finite_logits(logits, self._encoder.name)
        tokens: list[int] = logits.float().argmax(-1).tolist()
        return tokens

    def _remove_finished(
        self, running: list[_Sequence], cache: SlotCache, max_new_tokens: int
    ) -> dict[int, Response]:
        """Remove finished sequences; the last slots in use move into those that become free."""
        responses = {}
        for slot in range(len(running) - 1, -1, -1):
            sequence = running[slot]
            ended = sequence.tokens[-1] in self._eos_token_ids
            if not ended and len(sequence.tokens) < max_new_tokens:
                continue
            text = self._encoder.tokenizer.decode(sequence.tokens, skip_special_tokens=True)
            responses[sequence.prompt] = Response(text.strip(), ended)
            last = running.pop()
            if slot < len(running):
                cache.copy_slot(len(running), slot, last.length)
                running[slot] = last
        return responses


def check_finite_logits(logits: torch.Tensor, where: str) -> None:
    """Raise an error if no token can be chosen from logits.

    Args:
        logits: Of any shape.
        where: The model, for the error.

    Raises:
        ModelError: A logit is infinite or NaN.
    """
    if not torch.isfinite(logits).all():
        fix = "use another dtype (MLLM_MSR_DTYPE), or check the model's files"
        raise ModelError(expected="finite logits", got="inf or nan", where=where, fix=fix)
