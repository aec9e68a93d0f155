"""Two ways of the same work take turns under the clock; one line says how they did."""

import contextlib
import gc
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from mllm_msr.core.devices import find_device, find_dtype


class Options(NamedTuple):
    """What the command line says; None: what the case has."""

    model: str | None = None
    sequences: int | None = None
    of_reference: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Run:
    """A piece of work under the clock.

    Attributes:
        seconds: It took so many.
        result: What it gave.
        peak_gb: The peak of the device's memory meanwhile, in 10^9 bytes, or of the process so far
            where that is the CPU.
    """

    seconds: float
    result: Any
    peak_gb: float


@dataclass(frozen=True)
class Measured:
    """What a side did in one turn.

    Attributes:
        run: The run.
        many: Things that it did.
        tokens: Tokens that the language model took, padding and generated ones included; None where
            they are not counted.
        necessary: Tokens that it had to take, were every common beginning taken once.
        results: What came out, by thing.
        notes: Further fields of the side.
    """

    run: Run
    many: int
    tokens: int | None
    necessary: int | None
    results: dict[Any, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Things a second."""
        return self.many / self.run.seconds

    @property
    def waste(self) -> float | None:
        """Tokens taken over tokens that had to be taken."""
        return self.tokens / self.necessary if self.tokens and self.necessary else None


class TokenCount:
    """Counts the tokens that go into a language model.

    Attributes:
        read: In forwards of several tokens a row: prompts, padding included.
        answered: In forwards of one token a row: answers under way.
    """

    def __init__(self, model: Any) -> None:
        """Watch a model."""
        self.read = self.answered = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    @property
    def tokens(self) -> int:
        """Of both kinds."""
        return self.read + self.answered

    def _count(self, _: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].shape[-1] == 1:
            self.answered += inputs[0].numel()
        else:
            self.read += inputs[0].numel()


class Case(NamedTuple):
    """Two sides that do the same.

    Attributes:
        title: Of its line.
        what: The things that are counted.
        ours: Our side.
        reference: The other.
        compare: Sets the results of both beside each other.
        once: Whether turns would only repeat themselves.
    """

    title: str
    what: str
    ours: Callable[[Options], Measured]
    reference: Callable[[Options], Measured]
    compare: Callable[[Any, Any], dict[str, Any]]
    once: bool = False


def race(case: Case, options: Options, turns: int) -> dict[str, Any]:
    """Let both sides take turns, each in a process of its own; gives the line."""
    with own_process() as ours, own_process() as reference:
        measured = [
            (
                ours.submit(measure, case.ours, options).result(),
                reference.submit(measure, case.reference, options).result(),
            )
            for _ in range(turns)
        ]
    ratios = [one.rate / other.rate for one, other in measured]
    (first, other), (of_ours, of_reference) = measured[0], zip(*measured, strict=True)
    return {
        "case": case.title,
        "what": case.what,
        "ours": describe(of_ours),
        "reference": describe(of_reference),
        "ratio": round(median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "repeats": turns,
        **case.compare(first.results, other.results),
        "machine": describe_machine(),
    }


def own_process() -> Executor:
    """Start a process that does one thing after the other."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def measure(side: Callable[[Options], Measured], options: Options) -> Measured:
    """Run a side, and leave the memory to the other, and the standard output to the lines."""
    with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its history
        measured = side(options)
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no CUDA
    return measured


def describe(turns: Sequence[Measured]) -> dict[str, Any]:
    """Give a side's fields: those of its median turn, and the largest peak of memory."""
    middle = sorted(turns, key=lambda turn: turn.run.seconds)[len(turns) // 2]
    return {
        "many": middle.many,
        "seconds": round(middle.run.seconds, 2),
        "per_second": round(middle.rate, 1),
        "tokens": middle.tokens,
        "necessary_tokens": middle.necessary,
        "computed_over_necessary": middle.waste and round(middle.waste, 3),
        "peak_gb": round(max(turn.run.peak_gb for turn in turns), 2),
        **middle.notes,
    }


def describe_machine() -> dict[str, str]:
    """Say what ran where."""
    device = find_device()
    threads = f"{torch.get_num_threads()} threads of a CPU"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        "dtype": str(find_dtype(device)).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def timed(work: Callable[[], Any]) -> Run:
    """Do a piece of work under the clock."""
    gc.collect()
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    if on_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if on_cuda:
        return Run(seconds, result, torch.cuda.max_memory_allocated() / 1e9)
    return Run(seconds, result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
