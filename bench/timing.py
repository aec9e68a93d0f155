"""Timing of two implementations of the same task, which run alternately."""

import contextlib
import functools
import gc
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from torch import nn

from mllm_msr.core.devices import find_device, find_dtype
from mllm_msr.core.params import RecommenderParams, load_params
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel, count_parameters

Measurement = TypeVar("Measurement")


class Options(NamedTuple):
    """Options of a case.

    Attributes:
        model: Folder of a model that replaces all models; None: those of the settings.
        sequences: Sequences, or items, of our side; None: the default of the case.
        reference_count: The same for the reference.
        batch_size: Of fine-tuning; None: that of the settings.
        seconds: After which the timed work is cut off; None: no limit.
    """

    model: str | None = None
    sequences: int | None = None
    reference_count: int | None = None
    batch_size: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Run:
    """A timed function call.

    Attributes:
        seconds: Elapsed seconds.
        result: The function's result.
        peak_gb: Peak memory of the GPU during the call, or of the process so far on a CPU, in
            10^9 bytes.
    """

    seconds: float
    result: Any
    peak_gb: float


@dataclass(frozen=True)
class Measured:
    """The measurement of one side in one run.

    Attributes:
        run: The timed call.
        count: Number of processed units, such as pairs.
        asked: Number of units to process, of which a side that is cut off leaves some.
        prompt_tokens: Tokens of the prompts of the processed units, nothing shared; None if not
            counted.
        tokens: Input tokens of the language model, padding and generated ones included; None if not
            counted.
        necessary: Tokens that are needed if each shared prefix is computed once.
        results: The results, by unit.
        notes: Additional fields of the side's output.
    """

    run: Run
    count: int
    asked: int
    prompt_tokens: int | None
    tokens: int | None
    necessary: int | None
    results: dict[Any, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.count / self.run.seconds

    @property
    def waste(self) -> float | None:
        """Computed tokens over necessary tokens."""
        return self.tokens / self.necessary if self.tokens and self.necessary else None


class TokenCount:
    """Counter of the input tokens of a language model.

    Attributes:
        read: Tokens in forward passes of several tokens per row: prompts, padding included.
        generated: Tokens in forward passes of one token per row: generation.
    """

    def __init__(self, model: Any) -> None:
        """Hook into a model's input embeddings."""
        self.read = self.generated = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    @property
    def tokens(self) -> int:
        """Tokens of both kinds."""
        return self.read + self.generated

    def _count(self, _: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].shape[-1] == 1:
            self.generated += inputs[0].numel()
        else:
            self.read += inputs[0].numel()


class Case(NamedTuple):
    """A benchmark of two implementations of the same task.

    Attributes:
        title: Title of the output line.
        what: Name of the processed units.
        ours: Our implementation.
        reference: The reference implementation.
        compare: Compares the results of both and returns additional fields.
        once: Run only once, because repeated runs give the same result.
    """

    title: str
    what: str
    ours: Callable[[Options], Measured]
    reference: Callable[[Options], Measured]
    compare: Callable[[Any, Any], dict[str, Any]]
    once: bool = False


def run_case(case: Case, options: Options, turns: int) -> dict[str, Any]:
    """Run both sides alternately, each in a process of its own, and return the output line."""
    with start_process() as ours, start_process() as reference:
        measured = [
            (
                ours.submit(measure, case.ours, options).result(),
                reference.submit(measure, case.reference, options).result(),
            )
            for _ in range(turns)
        ]
    ratios = [one.rate / other.rate for one, other in measured]
    (first, other), (of_ours, reference_count) = measured[0], zip(*measured, strict=True)
    return {
        "case": case.title,
        "what": case.what,
        "ours": describe(of_ours),
        "reference": describe(reference_count),
        "ratio": round(median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "repeats": turns,
        **case.compare(first.results, other.results),
        "machine": describe_machine(options.model),
    }


def start_process() -> Executor:
    """Start a worker process."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def measure(side: Callable[[Options], Measurement], options: Options) -> Measurement:
    """Run a side, then free its memory; its output goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its history
        measured = side(options)
    release_memory()
    return measured


def release_memory() -> None:
    """Free the memory of models that are no longer used."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no CUDA


def describe(turns: Sequence[Measured]) -> dict[str, Any]:
    """Return a side's fields: those of its median run, and the maximum peak memory."""
    middle = sorted(turns, key=lambda turn: turn.run.seconds)[len(turns) // 2]
    return {
        "count": middle.count,
        "of": middle.asked,
        "seconds": round(middle.run.seconds, 2),
        "per_second": float(f"{middle.rate:.3g}"),
        "prompt_tokens": middle.prompt_tokens,
        "tokens": middle.tokens,
        "tokens_per_second": middle.tokens and round(middle.tokens / middle.run.seconds),
        "necessary_tokens": middle.necessary,
        "computed_over_necessary": middle.waste and round(middle.waste, 3),
        "peak_gb": round(max(turn.run.peak_gb for turn in turns), 2),
        **middle.notes,
    }


def describe_machine(model: str | None) -> dict[str, str]:
    """Return the device, versions and the dtype of a model; None: the recommender's."""
    device = find_device()
    name = model or str(load_params(RecommenderParams).model)
    dtype = find_dtype(device, count_parameters(Encoder(name, None, None)))
    threads = f"{torch.get_num_threads()} threads of a CPU"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def timed(work: Callable[[], Any]) -> Run:
    """Time a function call."""
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
    return Run(seconds, result, read_peak())


def read_peak() -> float:
    """Return the peak memory of the GPU since it was reset, or of the process, in 10^9 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def share_of_matrix_rate(
    model: LocalModel, layers: nn.Module, tokens: int, seconds: float, passes: int = 1
) -> dict[str, float]:
    """Return the field with the share of the measured rate of matrix products.

    Args:
        model: The model.
        layers: Its layers that process the tokens.
        tokens: How many.
        seconds: Elapsed seconds.
        passes: Through the layers for each token.
    """
    rate = 2 * linear_weights(layers) * tokens * passes / seconds
    return {"share_of_matrix_rate": float(f"{rate / matrix_rate(model.device, model.dtype):.2g}")}


def decoder_layers(model: Any) -> nn.Module:
    """Return the layers of a language model, or of the one within a multimodal model."""
    layers: nn.Module = model.get_decoder().layers
    return layers


def linear_weights(layers: nn.Module) -> int:
    """Return the number of weights of all linear layers but the adapter's.

    They determine the operations per token, except those of the adapter (merged or small) and of
    attention.
    """
    return sum(
        module.in_features * module.out_features
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    )


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the measured operations per second of a matrix product on a device."""
    side = 8_192 if device.type == "cuda" else 2_048
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
    return float(2 * side**3 / min(timed(lambda: one @ other).seconds for _ in range(5)))
