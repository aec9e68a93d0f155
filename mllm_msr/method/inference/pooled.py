"""Inference on a pool of workers: the engine in the driver, and what its workers do."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import IN_MEMORY, Response, ResponseStore
from mllm_msr.method.inference.cached import (
    CachedEngine,
    Conversation,
    StoringEngine,
    send,
)
from mllm_msr.method.inference.workers import Description, Output, Work, WorkerPool, chunk_size

SMALLEST_CHUNK, LARGEST_CHUNK = 16, 512  # prompts
SECONDS_PER_OUTPUT = 0.2  # a worker sends what it has finished meanwhile in one message

Order = Callable[[Prompt], Any]


class PooledModel:
    """The model that the workers of a pool hold.

    Attributes:
        encoder: The model's encoder.
        budget: None: memory is the workers' own concern.
    """

    budget = None

    def __init__(self, encoder: Encoder, pool: WorkerPool) -> None:
        """Take the encoder of this process and the pool."""
        self.encoder, self._pool = encoder, pool

    @property
    def identity(self) -> str:
        """The model in response keys."""
        return self.encoder.identity

    @property
    def precision(self) -> str:
        """The precision of the workers' computation, in response keys."""
        return self._pool.describe().precision


class PooledEngine(StoringEngine):
    """Spreads prompts over the workers of a pool, and stores each response as it arrives.

    A conversation's next prompt is queued as soon as its last is answered, so that no worker waits
    for the slowest conversation.

    Attributes:
        pool: The workers.
    """

    def __init__(
        self,
        model: PooledModel,
        pool: WorkerPool,
        store: ResponseStore,
        limit: int,
        order: Order,
        **settings: str | int,
    ) -> None:
        """Take a pool and a store.

        Args:
            model: The model that the workers hold.
            pool: The workers, which run chunks of prompts by response key.
            store: The response store.
            limit: The most tokens of a prompt.
            order: Sorts prompts, so that a chunk has those that run well together.
            settings: As :class:`StoringEngine`.
        """
        super().__init__(model, store, limit, **settings)
        self.pool, self._order = pool, order

    def respond(self, prompts: Sequence[Prompt], progress: "tqdm[Any]") -> list[str]:
        """Return the text of the response to each prompt; equal prompts are computed once."""
        texts = [""] * len(prompts)
        self.converse(
            [_ask_once(prompt, texts, index) for index, prompt in enumerate(prompts)], progress
        )
        return texts

    def converse(self, conversations: Iterable[Conversation], progress: "tqdm[Any]") -> None:
        """Respond to all prompts of conversations, each as soon as its last is answered.

        Raises:
            ModelError: Workers die again and again, or cannot run the model.
        """
        queue = _Queue(self, conversations, progress)
        begun, tokens = time.perf_counter(), 0
        for output in self.pool.run(queue.take):
            tokens += output.tokens
            if tokens:
                rate = tokens / (time.perf_counter() - begun)
                progress.set_postfix_str(
                    f"{rate:,.0f} tokens/s, {self.pool.share.workers} workers", refresh=False
                )
            self.computed += len(output.results)
            self.store.add(output.results, self.encoder.name)
            queue.answer(output.results)

    def sort(self, prompts: Mapping[str, Prompt]) -> list[str]:
        """Return the keys of prompts, in the order in which they run."""
        return sorted(prompts, key=lambda key: self._order(prompts[key]))


class _Queue:
    """The prompts of conversations that wait for a worker, and the conversations behind them."""

    def __init__(
        self,
        engine: PooledEngine,
        conversations: Iterable[Conversation],
        progress: "tqdm[Any]",
    ) -> None:
        self._engine, self._progress = engine, progress
        self._waiting: dict[str, list[Conversation]] = {}  # by key of the prompt that they asked
        self._prompts: dict[str, Prompt] = {}
        self._queue: deque[str] = deque()  # keys of the prompts that no worker has yet
        asked = [(one, prompt) for one in conversations if (prompt := next(one, None))]
        self.answer(self._queue_missing(asked))

    def take(self, workers: int) -> dict[str, Prompt]:
        """Return the next chunk."""
        while self._queue:
            size = chunk_size(len(self._queue), workers, LARGEST_CHUNK, SMALLEST_CHUNK)
            keys = [self._queue.popleft() for _ in range(size)]
            stored = self._engine.store.find(keys)  # another process may have computed them
            self.answer(stored)
            if left := {key: self._prompts[key] for key in keys if key not in stored}:
                return left
        return {}

    def answer(self, responses: Mapping[str, Response]) -> None:
        """Send responses to the conversations that wait for them, and queue what they ask next."""
        while followed := self._send(responses):
            responses = self._queue_missing(followed)

    def _send(self, responses: Mapping[str, Response]) -> list[tuple[Conversation, Prompt]]:
        """Send responses to the conversations that wait for them; return what they ask next."""
        followed = []
        for key, response in responses.items():
            del self._prompts[key]
            for one in self._waiting.pop(key):
                self._engine.truncated += not response.complete
                self._progress.update()
                if prompt := send(one, response.text):
                    followed.append((one, prompt))
        return followed

    def _queue_missing(self, asked: Iterable[tuple[Conversation, Prompt]]) -> dict[str, Response]:
        """Queue prompts that are not stored; return the responses to the others."""
        new: dict[str, Prompt] = {}
        for one, prompt in asked:
            key = self._engine.key(prompt)
            self._waiting.setdefault(key, []).append(one)
            if key not in self._prompts:
                new[key] = self._prompts[key] = prompt
        stored = self._engine.store.find(new)
        missing = {key: prompt for key, prompt in new.items() if key not in stored}
        self._engine.store.check_writable(len(missing))
        self._queue.extend(self._engine.sort(missing))
        return stored


def _ask_once(prompt: Prompt, texts: list[str], index: int) -> Conversation:
    texts[index] = yield prompt


class PromptWork(Work):
    """Runs prompts by an engine of the worker's own, with a store in memory."""

    def __init__(self, engine: CachedEngine) -> None:
        """Take the engine."""
        self._engine = engine

    def describe(self) -> Description:
        """Return the description of the model."""
        return Description(self._engine.model.identity, self._engine.model.precision)

    def run(self, chunk: Mapping[str, Prompt]) -> Iterator[Output]:
        """Yield the responses to prompts by key, those of some tenths of a second together."""
        # One for each chunk, since a worker's results are the driver's to keep.
        self._engine.store = ResponseStore(IN_MEMORY)
        finished: dict[str, Response] = {}
        sent, tokens = time.monotonic(), self._engine.tokens
        for responses in self._engine.respond_by_key(chunk):
            finished |= responses
            if finished and time.monotonic() - sent > SECONDS_PER_OUTPUT:
                yield Output(finished, self._engine.tokens - tokens)
                finished, sent, tokens = {}, time.monotonic(), self._engine.tokens
        if finished:
            yield Output(finished, self._engine.tokens - tokens)


def pooled_engine(
    encoder: Encoder,
    open_engine: Callable[..., StoringEngine],
    store: ResponseStore,
    limit: int,
    order: Order,
    **settings: str | int,
) -> PooledEngine:
    """Return the engine that spreads prompts over the cluster of the environment.

    Args:
        encoder: The model's encoder.
        open_engine: Opens a worker's own engine, given ``store``; it is pickled.
        store: The response store.
        limit: The most tokens of a prompt.
        order: Sorts prompts, so that a chunk has those that run well together.
        settings: As :class:`StoringEngine`.
    """
    pool = WorkerPool(partial(_open_prompt_work, open_engine), encoder.name)
    return PooledEngine(PooledModel(encoder, pool), pool, store, limit, order, **settings)


def _open_prompt_work(open_engine: Callable[..., StoringEngine]) -> PromptWork:
    """Open the work in a worker's process, where no cluster is to be joined again."""
    engine = open_engine(store=ResponseStore(IN_MEMORY))
    assert isinstance(engine, CachedEngine), "a worker runs its model itself"
    return PromptWork(engine)
