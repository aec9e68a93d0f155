"""Processes share each optimizer step such that its batches and gradient stay the same."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mllm_msr.core.errors import ParamsError
from mllm_msr.training.batching import GroupSampler
from mllm_msr.training.processes import Division, Share, ShareSampler
from mllm_msr.training.schedule import Schedule


def divide(processes: int, batch: int, accumulation: int, unit: int = 1) -> list[Division]:
    return [Division(processes, n, batch, accumulation, unit) for n in range(processes)]


def steps(shares: list[Share], forwards: int) -> list[list[Share]]:
    """Cut a process's shares of an epoch into optimizer steps, as Trainer does."""
    return [shares[start : start + forwards] for start in range(0, len(shares), forwards)]


def gradient(step: list[Share], values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
    """Return the mean over a process's shares, each of which stands for its mean loss."""
    means = [share.weight * values[list(share.examples)].mean() for share in step]
    return float(np.mean(means))


@given(
    st.integers(1, 8), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 60)
)
def test_each_step_has_the_gradient_of_a_single_process(
    processes: int, units: int, accumulation: int, unit: int, examples: int
) -> None:
    batch, total = units * unit, examples * unit
    try:
        divisions = divide(processes, batch, accumulation, unit)
    except ParamsError:
        assume(False)
    values = np.random.default_rng(total).normal(size=total)
    order = list(np.random.default_rng(1).permutation(total))
    (single,) = divide(1, batch, accumulation, unit)
    alone = steps(list(single.shares(order)), accumulation)
    assert [index for step in alone for share in step for index in share.examples] == order
    assert {share.weight for step in alone for share in step} == {1.0}
    shared = [steps(list(one.shares(order)), one.forwards) for one in divisions]
    assert {len(one) for one in shared} == {len(alone)}
    for division, one in zip(divisions, shared, strict=True):
        assert sum(map(len, one)) == division.count(total)
    for whole, *parts in zip(alone, *shared, strict=True):
        assert len({len(part) for part in parts}) == 1  # all processes run as many forwards
        seen = [index for part in parts for share in part if share.weight for index in share[0]]
        assert sorted(seen) == sorted(index for share in whole for index in share.examples)
        together = np.mean([gradient(part, values) for part in parts])
        assert together == pytest.approx(gradient(whole, values))


def test_processes_take_different_batches_before_parts_of_one() -> None:
    shares = [[list(one.examples) for one in each.shares(range(16))] for each in divide(2, 4, 2)]
    assert shares == [[[0, 1, 2, 3], [8, 9, 10, 11]], [[4, 5, 6, 7], [12, 13, 14, 15]]]
    parts = [[list(one.examples) for one in each.shares(range(8))] for each in divide(2, 4, 1)]
    assert parts == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@given(st.integers(1, 4), st.integers(2, 4))
def test_the_candidates_of_a_sequence_stay_together(processes: int, unit: int) -> None:
    order = list(range(7 * unit))
    for division in divide(processes, processes * unit, 1, unit):
        for share in division.shares(order):
            assert len(share.examples) % unit == 0
            assert share.examples[0] % unit == 0


def test_a_step_that_cannot_be_shared_evenly_is_an_error_that_says_so() -> None:
    with pytest.raises(ParamsError) as raised:
        Division(4, 0, 6, 1)
    assert str(raised.value) == (
        "sft.batch_size and sft.accumulation: expected a step that 4 processes can share evenly;"
        " got 1 batches of 6 pairs; make one a multiple of 4, or start fewer processes"
    )
    with pytest.raises(ParamsError, match="got 3 batches of 2 sequences of 5 pairs"):
        Division(4, 0, 10, 3, unit=5)


def test_an_epoch_is_taken_from_the_schedule_at_each_iteration() -> None:
    def schedule() -> Schedule:
        return Schedule(2, GroupSampler(range(6), [1] * 6, 1, 2, seed=3), 0)

    passes = [each.examples for each in schedule() if each.trains]
    taken = schedule()
    sampler = ShareSampler(taken, Division(1, 0, 2, 1))
    taken.take(trains=False)
    for examples in passes:
        shares = list(sampler)
        assert len(shares) == len(sampler) == 3
        assert list(itertools.chain(*(share.examples for share in shares))) == list(examples)
        taken.take(trains=False)
