"""Work that is cut off after some seconds, so that a benchmark keeps its time."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

from tqdm import tqdm

from bench.timing import TokenCount, read_peak
from mllm_msr.engines.prompt import Prompt
from mllm_msr.method.inference import Conversation, StoringEngine, converse_in_rounds

Unit = TypeVar("Unit")


class OutOfTime(Exception):  # noqa: N818  # no error: the benchmark goes on
    """The seconds of some work have passed."""


class Watch:
    """A progress bar that raises :class:`OutOfTime` once some seconds have passed.

    Attributes:
        done: How many units are finished.
    """

    def __init__(self, seconds: float | None, progress: "tqdm[Any] | None" = None) -> None:
        """Start the clock.

        Args:
            seconds: None: there is no limit.
            progress: The progress bar that is shown, if any.
        """
        self.done = 0
        self._progress = progress
        self._seconds, self._start = seconds, time.perf_counter()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Show a text after the progress bar."""
        if self._progress is not None:
            self._progress.set_postfix_str(text, refresh=refresh)

    def update(self, units: int = 1) -> None:
        """Count finished units.

        Raises:
            OutOfTime: The seconds have passed.
        """
        self.done += units
        if self._progress is not None:
            self._progress.update(units)
        passed = time.perf_counter() - self._start
        if units and self._seconds is not None and passed > self._seconds:
            raise OutOfTime


class Round(NamedTuple):
    """One call of :meth:`LimitedEngine.respond`.

    Attributes:
        finished: The prompts that have responses.
        asked: How many prompts there were.
        seconds: Elapsed seconds.
        tokens: Tokens that the language model processed.
        generated: Those of them that are generated ones.
        peak_gb: Peak memory so far.
    """

    finished: list[Prompt]
    asked: int
    seconds: float
    tokens: int
    generated: int
    peak_gb: float


class LimitedEngine:
    """An engine that gives up after some seconds; the prompts left get a fixed response.

    Attributes:
        encoder: The engine's encoder.
        limit: The most tokens of a prompt.
        rounds: One entry per call of :meth:`respond`.
    """

    def __init__(
        self, engine: StoringEngine, count: TokenCount, seconds: float | None, response: str
    ) -> None:
        """Take an engine.

        Args:
            engine: The engine.
            count: Counts the tokens of its model.
            seconds: The time of each call of :meth:`respond`; None: no limit.
            response: The response to prompts that are left.
        """
        self.encoder, self.limit = engine.encoder, engine.limit
        self.rounds: list[Round] = []
        self._engine, self._count = engine, count
        self._seconds, self._response = seconds, response

    @property
    def finished(self) -> list[Prompt]:
        """The prompts of all rounds that have responses."""
        return [prompt for one in self.rounds for prompt in one.finished]

    def respond(self, prompts: Sequence[Prompt], progress: "tqdm[Any]") -> list[str]:
        """Return the text of the response to each prompt."""
        start, tokens, generated = time.perf_counter(), self._count.tokens, self._count.generated
        watch = cast("tqdm[Any]", Watch(self._seconds, progress))
        found: Sequence[str | None]
        try:
            found = self._engine.respond(prompts, watch)
        except OutOfTime:
            found = self._engine.find_stored(prompts)
        finished = [prompt for prompt, text in zip(prompts, found, strict=True) if text is not None]
        self.rounds.append(
            Round(
                finished,
                len(prompts),
                time.perf_counter() - start,
                self._count.tokens - tokens,
                self._count.generated - generated,
                read_peak(),
            )
        )
        return [self._response if text is None else text for text in found]

    def converse(self, conversations: Iterable[Conversation], progress: "tqdm[Any]") -> None:
        """Respond to all prompts of some conversations, as the engine does."""
        converse_in_rounds(self.respond, conversations, progress)


def until(units: Iterable[Unit], seconds: float | None) -> Iterator[Unit]:
    """Yield units, at least one, until the seconds have passed; None: all of them."""
    watch = Watch(seconds)
    with contextlib.suppress(OutOfTime):
        for unit in units:
            yield unit
            watch.update()
