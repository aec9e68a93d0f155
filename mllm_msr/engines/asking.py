"""Puts prompts to a model, each of them once: what the answer store knows is not asked again."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from mllm_msr.engines.answers import Answer, AnswerStore, answer_key
from mllm_msr.engines.local import LocalModel
from mllm_msr.errors import ModelError
from mllm_msr.prompts import Prompt

log = logging.getLogger(__name__)

CutBatches = Callable[[Sequence[Prompt]], Iterable[list[int]]]
AnswerBatch = Callable[[Sequence[Prompt]], list[Answer]]


class Asker:
    """A way to answer prompts, and the store of what it answered.

    Attributes:
        model: The model that is asked.
        limit: The most tokens that a prompt may have.
        asked: How many prompts were put to the model so far, the stored ones left out.
        cut: How many answers so far ended at the largest number of new tokens.
    """

    def __init__(
        self,
        model: LocalModel,
        store: AnswerStore,
        limit: int,
        cut_batches: CutBatches,
        answer_batch: AnswerBatch,
        **settings: str | int,
    ) -> None:
        """Take a model, a store, and how prompts are cut into batches and a batch is answered.

        Args:
            model: The model.
            store: Where answers are kept.
            limit: The most tokens that a prompt may have.
            cut_batches: Cuts prompts into batches, each a list of their numbers.
            answer_batch: Answers such a batch.
            settings: All that an answer depends on besides model, dtype and prompt.
        """
        self.model, self.limit, self.asked, self.cut = model, limit, 0, 0
        self._cut_batches, self._answer_batch = cut_batches, answer_batch
        self._store, self._settings = store, settings

    def ask(self, prompts: Sequence[Prompt], progress: "tqdm[Any]") -> list[str]:
        """Answer prompts, in their order; equal prompts are asked once.

        Every batch is kept as soon as it is answered, so that a killed run loses one batch at most.

        Args:
            prompts: Prompts of at most :attr:`limit` tokens.
            progress: A bar that moves by one for each of the prompts.
        """
        keys = [self._key(prompt) for prompt in prompts]
        times = Counter(keys)
        answers = self._store.find(keys)
        progress.update(sum(times[key] for key in answers))
        waiting = {key: p for key, p in zip(keys, prompts, strict=True) if key not in answers}
        for batch in self._batches(waiting):
            answers_given = self._answer([waiting[key] for key in batch])
            answered = dict(zip(batch, answers_given, strict=True))
            self._store.add(answered, self.model.encoder.name)
            answers |= answered
            self.asked += len(batch)
            progress.update(sum(times[key] for key in batch))
        self.cut += sum(not answers[key].complete for key in keys)
        return [answers[key].text for key in keys]

    def _answer(self, batch: Sequence[Prompt]) -> list[Answer]:
        """Answer a batch; one that memory does not hold, in halves.

        Raises:
            ModelError: A single prompt is too much for the memory.
        """
        try:
            return self._answer_batch(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                remedy = "free memory, or use a smaller model or shorter prompts"
                where = self.model.encoder.name
                came = f"too little on {self.model.device}"
                raise ModelError("memory for one prompt", came, where, remedy) from error
        torch.cuda.empty_cache()  # does nothing where there is no CUDA
        log.warning("out of memory with %d prompts at once; trying halves", len(batch))
        half = len(batch) // 2
        return self._answer(batch[:half]) + self._answer(batch[half:])

    def _batches(self, waiting: dict[str, Prompt]) -> list[list[str]]:
        keys = list(waiting)
        batches = self._cut_batches(list(waiting.values()))
        return [[keys[index] for index in batch] for batch in batches]

    def _key(self, prompt: Prompt) -> str:
        return answer_key(
            model=self.model.encoder.identity,
            dtype=self.model.precision,
            before=prompt.before,
            image=prompt.image.digest if prompt.image else None,
            after=prompt.after,
            **self._settings,
        )


def greedy_asker(model: LocalModel, store: AnswerStore, max_new_tokens: int) -> Asker:
    """Ask for text: greedy decoding of at most ``max_new_tokens`` tokens."""
    return Asker(
        model,
        store,
        model.encoder.context - max_new_tokens,
        model.batches,
        partial(model.generate, max_new_tokens=max_new_tokens),
        decoding="greedy",
        max_new_tokens=max_new_tokens,
    )
