"""Puts prompts to a model, each of them once: what the response store knows is not asked again."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from mllm_msr.core.devices import is_out_of_memory, release_cached_memory
from mllm_msr.core.errors import ModelError, ParamsError
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.responses import Response, ResponseStore, response_key

log = logging.getLogger(__name__)

CutBatches = Callable[[Sequence[Prompt]], Iterable[list[int]]]
AnswerBatch = Callable[[Sequence[Prompt]], list[Response]]


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
        store: ResponseStore,
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
        What another run answers meanwhile is taken from the store.

        Args:
            prompts: Prompts of at most :attr:`limit` tokens.
            progress: A bar that moves by one for each of the prompts.

        Raises:
            ModelError: A single prompt is too much for the memory.
        """
        keys = [self._key(prompt) for prompt in prompts]
        times = Counter(keys)
        answers: dict[str, Response] = {}
        for known in self._answers(dict(zip(keys, prompts, strict=True))):
            answers |= known
            progress.update(sum(times[key] for key in known))
        self.cut += sum(not answers[key].complete for key in keys)
        return [answers[key].text for key in keys]

    def _answers(self, asked: Mapping[str, Prompt]) -> Iterator[dict[str, Response]]:
        """Give the answers of prompts by their keys, some at a time, the stored ones first."""
        known = self._store.find(asked)
        yield known
        waiting = {key: prompt for key, prompt in asked.items() if key not in known}
        self._store.refuse_read_only(len(waiting))
        batches = self._cut(waiting)
        while batches:
            batch = batches.pop()
            known = self._store.find(batch)  # another run may have been there
            yield known
            missing = [key for key in batch if key not in known]
            given = self._try([waiting[key] for key in missing])
            if given is None:
                self._compute_less(len(missing))
                half = len(missing) // 2
                later = {key: waiting[key] for others in batches[::-1] for key in others}
                batches = [*self._cut(later), missing[half:], missing[:half]]
                continue
            answers = dict(zip(missing, given, strict=True))
            self.asked += len(answers)
            if self._store.add(answers, self.model.encoder.name) < len(answers):
                random.shuffle(batches)  # another run asks the same in the same order: part from it
            yield answers

    def _cut(self, waiting: Mapping[str, Prompt]) -> list[list[str]]:
        """Cut prompts into batches, the first of them last in the list."""
        keys = list(waiting)
        batches = self._cut_batches(list(waiting.values()))
        return [[keys[index] for index in batch] for batch in batches][::-1]

    def _try(self, batch: Sequence[Prompt]) -> list[Response] | None:
        """Answer a batch; None where memory does not hold it.

        Raises:
            ModelError: It is a single prompt.
        """
        if not batch:
            return []
        try:
            return self._answer_batch(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                fix = "free memory, or use a smaller model, smaller images or shorter prompts"
                where = self.model.encoder.name
                got = f"too little on {self.model.device}"
                raise ModelError(
                    expected="memory for one prompt", got=got, where=where, fix=fix
                ) from error
        return None  # outside: the error holds what was computed

    def _compute_less(self, prompts: int) -> None:
        """Halve what is computed at once, for the rest of the run."""
        release_cached_memory(self.model.device)
        self.model.budget.halve()
        log.warning("out of memory with %d prompts at once; going on with half as much", prompts)

    def _key(self, prompt: Prompt) -> str:
        return response_key(
            model=self.model.encoder.identity,
            dtype=self.model.precision,
            before=prompt.before,
            image=prompt.image.digest if prompt.image else None,
            after=prompt.after,
            **self._settings,
        )


def greedy_asker(model: LocalModel, store: ResponseStore, max_new_tokens: int) -> Asker:
    """Ask for text: greedy decoding of at most ``max_new_tokens`` tokens.

    Raises:
        ParamsError: They leave no room for a prompt in the model's context.
    """
    context, name = model.encoder.context, model.encoder.name
    if max_new_tokens >= context:
        expected = f"fewer new tokens than the {context:,} of the model's context"
        fix = "lower it, or use a model with a longer context"
        raise ParamsError(
            expected=expected,
            got=f"{max_new_tokens:,}",
            where=f"max_new_tokens, {name}",
            fix=fix,
        )
    return Asker(
        model,
        store,
        model.encoder.context - max_new_tokens,
        model.batches,
        partial(model.generate, max_new_tokens=max_new_tokens),
        decoding="greedy",
        max_new_tokens=max_new_tokens,
    )
