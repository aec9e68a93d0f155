"""The division of a training among processes: their number does not change what is trained.

An optimizer step has the same batches whatever the number of processes, and its gradient is the
mean over these batches. Processes take different batches of a step or, where there are more
processes than batches, parts of a batch. Where the last step of an epoch has too few, a process
without a share runs a few pairs with the weight 0, because all processes must take part in
every forward and backward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, gcd
from typing import NamedTuple

from torch.utils.data import Dataset, Sampler

from mllm_msr.core.errors import ParamsError
from mllm_msr.method.examples import Example
from mllm_msr.training.schedule import Schedule


class Share(NamedTuple):
    """What one process runs in one forward.

    Attributes:
        examples: Indices of training examples.
        weight: The factor of their mean loss, such that the mean over a step's shares in a process,
            and then over processes, is the mean over the step's batches; 1 in a single process.
    """

    examples: Sequence[int]
    weight: float


@dataclass(frozen=True)
class Division:
    """The division of optimizer steps among processes.

    Attributes:
        processes: Number of processes.
        process: The index of this one.
        batch_size: Examples of a batch.
        accumulation: Batches of an optimizer step.
        unit: Examples that stay together: 1, or the candidates of a sequence.
    """

    processes: int
    process: int
    batch_size: int
    accumulation: int
    unit: int = 1

    def __post_init__(self) -> None:
        """Check that a step can be divided evenly.

        Raises:
            ParamsError: It cannot.
        """
        if self.batch_size % (self.parts * self.unit):
            units = "pairs" if self.unit == 1 else f"sequences of {self.unit} pairs"
            got = f"{self.accumulation} batches of {self.batch_size // self.unit} {units}"
            raise ParamsError(
                expected=f"a step that {self.processes} processes can share evenly",
                got=got,
                where="sft.batch_size and sft.accumulation",
                fix=f"make one a multiple of {self.processes}, or start fewer processes",
            )

    @property
    def parts(self) -> int:
        """The parts of a batch, each for another process."""
        return self.processes // gcd(self.accumulation, self.processes)

    @property
    def forwards(self) -> int:
        """The forwards of a process in a full step."""
        return self.accumulation * self.parts // self.processes

    def count(self, examples: int) -> int:
        """Return the forwards of a process in an epoch."""
        steps, rest = divmod(ceil(examples / self.batch_size), self.accumulation)
        return steps * self.forwards + ceil(rest * self.parts / self.processes)

    def shares(self, order: Sequence[int]) -> Iterator[Share]:
        """Yield the shares of this process in an epoch.

        Args:
            order: The examples of the epoch, in its order.
        """
        size = self.batch_size * self.accumulation
        for start in range(0, len(order), size):
            yield from self._divide(order[start : start + size])

    def _divide(self, step: Sequence[int]) -> Iterator[Share]:
        """Yield this process's shares of a step."""
        size = self.batch_size
        batches = [step[start : start + size] for start in range(0, len(step), size)]
        at_once = self.processes // self.parts  # batches, in one forward of all processes
        first, part = divmod(self.process, self.parts)
        rounds = ceil(len(batches) / at_once)
        for number in range(first, first + rounds * at_once, at_once):
            batch = batches[number] if number < len(batches) else []
            share = self._cut(batch, part)
            if share:
                weight = len(share) / len(batch) * self.processes * rounds / len(batches)
                yield Share(share, weight)
            else:
                yield Share(step[: self.unit], 0.0)

    def _cut(self, batch: Sequence[int], part: int) -> Sequence[int]:
        """Return a part of a batch; the last parts of an incomplete batch may be empty."""
        size = ceil(len(batch) / self.unit / self.parts) * self.unit
        return batch[part * size : (part + 1) * size]


class ShareSampler(Sampler[Share]):
    """Yields a process's shares of a schedule's training, one epoch at each iteration."""

    def __init__(self, schedule: Schedule, division: Division) -> None:
        """Take the schedule, and the division of its steps."""
        super().__init__()
        self._schedule, self._division = schedule, division

    def __len__(self) -> int:
        """Return the number of shares of an epoch."""
        return self._division.count(self._schedule.training_examples)

    def __iter__(self) -> Iterator[Share]:
        """Take the next epoch from the schedule; yield this process's shares of it."""
        yield from self._division.shares(self._schedule.take(trains=True))


class SharedExamples(Dataset[tuple[list[Example], float]]):
    """The examples of shares, with their weights."""

    def __init__(self, examples: Sequence[Example]) -> None:
        """Take all training examples."""
        self._examples = examples

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._examples)

    def __getitem__(self, share: Share) -> tuple[list[Example], float]:
        """Return the examples of a share, and its weight."""
        return [self._examples[index] for index in share.examples], share.weight
