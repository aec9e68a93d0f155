"""The engine behind the response store: puts prompts to a model, each once."""

import logging
import random
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

from tqdm import tqdm

from mllm_msr.core.devices import release_cached_memory
from mllm_msr.core.errors import ModelError, is_out_of_memory
from mllm_msr.engines.budgets import Budget
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import (
    Response,
    ResponseStore,
    StepOutput,
    response_key,
)

log = logging.getLogger(__name__)

BatchPrompts = Callable[[Sequence[Prompt]], Iterable[list[int]]]
RunBatch = Callable[[Sequence[Prompt]], Iterable[StepOutput]]
# Yields one prompt after another and is sent the response to each, on which the next may depend.
Conversation = Generator[Prompt, str, None]


class Engine(Protocol):
    """What the steps of the method need of inference."""

    @property
    def encoder(self) -> Encoder:
        """The model's encoder."""

    @property
    def limit(self) -> int:
        """The most tokens of a prompt."""

    def respond(self, prompts: Sequence[Prompt], progress: "tqdm[Any]") -> list[str]:
        """Return the text of the response to each prompt, in the prompts' order.

        Args:
            prompts: Prompts of at most :attr:`limit` tokens.
            progress: A progress bar, which advances by one for each prompt.
        """

    def converse(self, conversations: Iterable[Conversation], progress: "tqdm[Any]") -> None:
        """Respond to all prompts of some conversations.

        Args:
            conversations: With prompts of at most :attr:`limit` tokens.
            progress: A progress bar, which advances by one for each prompt.
        """


class Model(Protocol):
    """What an engine needs to know of the model that it runs, here or behind a server."""

    @property
    def encoder(self) -> Encoder:
        """Tokenizer and chat template."""

    @property
    def identity(self) -> str:
        """The model in response keys."""

    @property
    def precision(self) -> str:
        """The precision of the computation, in response keys."""

    @property
    def budget(self) -> Budget | None:
        """Batch sizes, which are halved where memory runs out; None: that cannot happen here."""


class GeneratingModel(Model, Protocol):
    """A model that generates texts."""

    def batches(self, prompts: Sequence[Prompt]) -> Iterable[list[int]]:
        """Group prompts into batches of their indices."""

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterable[StepOutput]:
        """Yield greedy responses to a batch as they finish."""


class StoringEngine(ABC):
    """An engine with a response store.

    Attributes:
        model: The model.
        encoder: The model's encoder.
        limit: The most tokens of a prompt.
        computed: How many prompts were put to the model so far, without stored ones.
        truncated: How many responses so far ended at the maximum number of new tokens, with stored
            ones.
    """

    def __init__(
        self, model: Model, store: ResponseStore, limit: int, **settings: str | int
    ) -> None:
        """Take a model and a store.

        Args:
            model: The model.
            store: The response store.
            limit: The most tokens of a prompt.
            settings: Everything that a response depends on besides model, precision and prompt;
                part of the response key.
        """
        self.model, self.encoder, self.limit = model, model.encoder, limit
        self.computed = self.truncated = 0
        self.store, self._settings = store, settings

    @abstractmethod
    def respond(self, prompts: Sequence[Prompt], progress: "tqdm[Any]") -> list[str]:
        """Return the text of the response to each prompt; see :class:`Engine`."""

    def converse(self, conversations: Iterable[Conversation], progress: "tqdm[Any]") -> None:
        """Respond to all prompts of some conversations; the t-th of each run together."""
        converse_in_rounds(self.respond, conversations, progress)

    def find_stored(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return the stored response to each prompt, None where there is none."""
        keys = [self.key(prompt) for prompt in prompts]
        stored = self.store.find(keys)
        return [stored[key].text if key in stored else None for key in keys]

    def key(self, prompt: Prompt) -> str:
        """Return the response key of a prompt."""
        return response_key(
            model=self.model.identity,
            dtype=self.model.precision,
            before=prompt.before,
            image=prompt.image.digest if prompt.image else None,
            after=prompt.after,
            **self._settings,
        )


class CachedEngine(StoringEngine):
    """Computes responses in batches, and stores each response as soon as it is finished.

    Attributes:
        tokens: How many were generated so far.
    """

    def __init__(
        self,
        model: Model,
        store: ResponseStore,
        limit: int,
        batch_prompts: BatchPrompts,
        run_batch: RunBatch,
        **settings: str | int,
    ) -> None:
        """Take a model, a store, and the functions that run the model.

        Args:
            model: The model.
            store: The response store.
            limit: The most tokens of a prompt.
            batch_prompts: Groups prompts into batches of their indices.
            run_batch: Runs a batch; yields responses as they finish.
            settings: As :class:`StoringEngine`.
        """
        super().__init__(model, store, limit, **settings)
        self._batch_prompts, self._run_batch = batch_prompts, run_batch
        self.tokens, self._seconds = 0, 0.0

    def respond(self, prompts: Sequence[Prompt], progress: "tqdm[Any]") -> list[str]:
        """Return the text of the response to each prompt; equal prompts are computed once.

        The responses that a step finishes are stored before the next step, so a killed run loses
        only unfinished ones. Responses that another process stores meanwhile are used too.

        Args:
            prompts: Prompts of at most :attr:`limit` tokens.
            progress: A progress bar, which advances by one for each prompt.

        Raises:
            ModelError: Memory does not suffice for a single prompt.
        """
        keys = [self.key(prompt) for prompt in prompts]
        counts = Counter(keys)
        responses: dict[str, Response] = {}
        for some in self.respond_by_key(dict(zip(keys, prompts, strict=True))):
            responses |= some
            if self.tokens:
                rate = self.tokens / self._seconds
                progress.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            progress.update(sum(counts[key] for key in some))
        self.truncated += sum(not responses[key].complete for key in keys)
        return [responses[key].text for key in keys]

    def respond_by_key(self, prompts: Mapping[str, Prompt]) -> Iterator[dict[str, Response]]:
        """Yield the responses to prompts by key, some at a time, the stored ones first."""
        stored = self.store.find(prompts)
        yield stored
        missing = {key: prompt for key, prompt in prompts.items() if key not in stored}
        self.store.check_writable(len(missing))
        batches = self._batches(missing)
        while (batch := next(batches, None)) is not None:
            stored = self.store.find(batch)  # another process may have computed them
            yield stored
            left = {key: missing[key] for key in batch if key not in stored}
            is_shared = yield from self._compute(left)
            if left:
                self._halve_budget(len(left))
                keys, half = list(left), len(left) // 2
                later = {key: missing[key] for others in batches for key in others}
                batches = chain([keys[:half], keys[half:]], self._batches(later))
            elif is_shared:  # another process computes the same, in the same order
                others = list(batches)
                random.shuffle(others)
                batches = iter(others)

    def _batches(self, prompts: Mapping[str, Prompt]) -> Iterator[list[str]]:
        """Group prompts into batches of keys, as they are needed: a large plan takes minutes."""
        keys = list(prompts)
        for batch in self._batch_prompts(list(prompts.values())):
            yield [keys[index] for index in batch]

    def _compute(self, left: dict[str, Prompt]) -> Generator[dict[str, Response], None, bool]:
        """Compute and store the responses to a batch.

        Args:
            left: The prompts by key. Those with a response are removed: all, unless memory does not
                suffice.

        Yields:
            The responses that each step finished, by key.

        Returns:
            Whether another process had stored some of them meanwhile.
        """
        keys, is_shared = list(left), False
        for finished in self._run(list(left.values())):
            responses = {keys[index]: response for index, response in finished.items()}
            self.computed += len(responses)
            is_shared |= self.store.add(responses, self.encoder.name) < len(responses)
            for key in responses:
                del left[key]
            yield responses
        return is_shared

    def _run(self, prompts: Sequence[Prompt]) -> Iterator[dict[int, Response]]:
        """Run a batch of prompts, as far as memory suffices.

        Yields:
            The responses that each step finished, by index of their prompt.

        Raises:
            ModelError: The batch is a single prompt, and memory does not suffice.
        """
        if not prompts:
            return
        start = time.perf_counter()
        try:
            for finished, tokens in self._run_batch(prompts):
                self._seconds += time.perf_counter() - start
                self.tokens += tokens
                if finished:
                    yield finished
                start = time.perf_counter()
        except Exception as error:
            if self.model.budget is None or not is_out_of_memory(error):
                raise
            if len(prompts) == 1:
                fix = "free memory, or use a smaller model, smaller images or shorter prompts"
                got = f"too little on {self.model.budget.device}"
                raise ModelError(
                    expected="memory for one prompt", got=got, where=self.encoder.name, fix=fix
                ) from error

    def _halve_budget(self, prompts: int) -> None:
        """Halve the batch sizes for the rest of the run."""
        assert self.model.budget, "memory ran out here"
        release_cached_memory(self.model.budget.device)
        self.model.budget.halve()
        log.warning("out of memory with %d prompts at once; going on with half as much", prompts)


def in_one_step(run: Callable[[Sequence[Prompt]], Sequence[Response]]) -> RunBatch:
    """Return a function that finishes all responses of a batch in one step, without new tokens.

    Args:
        run: Returns the responses to a batch.
    """

    def run_batch(prompts: Sequence[Prompt]) -> Iterator[StepOutput]:
        yield StepOutput(dict(enumerate(run(prompts))), tokens=0)

    return run_batch


def converse_in_rounds(
    respond: Callable[[Sequence[Prompt], "tqdm[Any]"], Sequence[str]],
    conversations: Iterable[Conversation],
    progress: "tqdm[Any]",
) -> None:
    """Respond to the first prompt of all conversations, then to the second, and so on.

    Args:
        respond: :meth:`Engine.respond`.
        conversations: The conversations.
        progress: A progress bar, which advances by one for each prompt.
    """
    asked = [(one, prompt) for one in conversations if (prompt := next(one, None))]
    while asked:
        responses = respond([prompt for _, prompt in asked], progress)
        followed = [(one, send(one, text)) for (one, _), text in zip(asked, responses, strict=True)]
        asked = [(one, prompt) for one, prompt in followed if prompt]


def send(conversation: Conversation, response: str) -> Prompt | None:
    """Send a response to a conversation; return its next prompt, None at its end."""
    try:
        return conversation.send(response)
    except StopIteration:
        return None
