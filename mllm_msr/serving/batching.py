"""One thread that owns the recommender, and a bounded queue before it.

Tables, models and the response store belong to the thread that opened them. While it answers, new
queries wait; those that wait together are answered together and share forwards. A query whose
client has gone leaves the queue.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from mllm_msr.core.errors import UserError
from mllm_msr.recommendation.catalogue import Catalogue
from mllm_msr.recommendation.recommender import Query, Recommendations

log = logging.getLogger(__name__)

LARGEST_BATCH = 16  # queries that are answered together
SECONDS_TO_REPEAT = 10  # a batch that failed within them is answered query by query


class QueueFullError(Exception):
    """Too many queries wait already."""


class NotReadyError(Exception):
    """The recommender is still being loaded, or the service is stopping."""


class Answering(Protocol):
    """What the thread needs of a recommender."""

    @property
    def catalogue(self) -> Catalogue:
        """The items."""

    def load_weights(self) -> None:
        """Load the models' weights."""

    def answer(self, queries: Sequence[Query]) -> list[Recommendations | UserError]:
        """Answer queries together."""

    def users(self) -> list[str]:
        """Return the ids of all users, sorted."""


class Batch(NamedTuple):
    """What was answered together.

    Attributes:
        queries: How many.
        seconds: How long that took.
    """

    queries: int
    seconds: float


class _Waiting(NamedTuple):
    """A query in the queue."""

    query: Query
    answer: Future[Recommendations]


class Batcher:
    """Answers queries in a thread of its own.

    Attributes:
        failure: Why the thread ended, if not because the service stops.
    """

    def __init__(
        self,
        load: Callable[[], AbstractContextManager[Answering]],
        *,
        longest_queue: int,
        on_loaded: Callable[[Answering], None],
        on_failure: Callable[[], None],
        on_batch: Callable[[Batch], None],
    ) -> None:
        """Take what the thread runs; :meth:`start` starts it.

        Args:
            load: Opens the recommender, in the thread.
            longest_queue: The most queries that may wait.
            on_loaded: Is called in the thread with the recommender, before the first query.
            on_failure: Is called in the thread when it cannot go on.
            on_batch: Is called in the thread after every batch.
        """
        self.failure: BaseException | None = None
        self._load, self._on_loaded = load, on_loaded
        self._on_failure, self._on_batch = on_failure, on_batch
        self._longest_queue = longest_queue
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._loaded = self._closed = False
        # A daemon: while a large model loads, Ctrl-C ends the process.
        self._thread = threading.Thread(target=self._run, name="recommender", daemon=True)

    def start(self) -> None:
        """Start the thread, which loads the recommender."""
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Answer what waits, close the recommender and end the thread.

        Args:
            seconds: How long to wait for that.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    @property
    def is_ready(self) -> bool:
        """Whether queries are answered."""
        return self._loaded and not self._closed

    @property
    def queue_length(self) -> int:
        """How many queries wait, without those whose clients have gone."""
        with self._changed:
            return sum(not each.answer.cancelled() for each in self._waiting)

    def submit(self, query: Query) -> Future[Recommendations]:
        """Put a query into the queue; cancelling its future takes it out.

        Raises:
            NotReadyError: The recommender is not loaded, or the service is stopping.
            QueueFullError: Too many queries wait.
        """
        with self._changed:
            if not self.is_ready:
                raise NotReadyError
            if len(self._waiting) >= self._longest_queue:
                self._waiting = deque(each for each in self._waiting if not each.answer.cancelled())
            if len(self._waiting) >= self._longest_queue:
                raise QueueFullError
            waiting = _Waiting(query, Future())
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting.answer

    def _run(self) -> None:
        """Load the recommender and answer until the service stops."""
        try:
            with self._load() as recommender:
                recommender.load_weights()
                self._on_loaded(recommender)
                self._loaded = True
                while batch := self._next_batch():
                    self._answer(recommender, batch)
        except BaseException as error:
            self.failure = error
            self._loaded = False
            while self._waiting:
                self._waiting.popleft().answer.cancel()
            self._on_failure()

    def _next_batch(self) -> list[_Waiting]:
        """Wait for queries and take those that wait; none when the service stops."""
        batch: list[_Waiting] = []
        while not batch:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return []
                taken = [
                    self._waiting.popleft() for _ in range(min(LARGEST_BATCH, len(self._waiting)))
                ]
            batch = [each for each in taken if each.answer.set_running_or_notify_cancel()]
        return batch

    def _answer(self, recommender: Answering, batch: Sequence[_Waiting]) -> None:
        start = time.perf_counter()
        try:
            answers = recommender.answer([each.query for each in batch])
        except Exception as error:
            # Those that did not cause it are answered, unless it took so long that the next would
            # not be in time either, as where a model's server is away.
            if len(batch) > 1 and time.perf_counter() - start < SECONDS_TO_REPEAT:
                for each in batch:
                    self._answer(recommender, [each])
                return
            for each in batch:
                each.answer.set_exception(error)
            return
        for each, answer in zip(batch, answers, strict=True):
            if isinstance(answer, UserError):
                each.answer.set_exception(answer)
            else:
                each.answer.set_result(answer)
        self._on_batch(Batch(len(batch), time.perf_counter() - start))
