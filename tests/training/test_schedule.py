"""A training and a dry run follow one schedule, from any checkpoint on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_msr.training.batching import GroupSampler
from mllm_msr.training.schedule import Pass, Schedule, count_validations


def schedule(epochs: int, training: int = 7, validation: int = 3) -> Schedule:
    order = GroupSampler(["a", "b", None, "a", "b", "a", None][:training], [1] * training, 2, 2, 5)
    return Schedule(epochs, order, validation)


def test_validations_come_before_the_first_epoch_and_after_each() -> None:
    assert [one.trains for one in schedule(2)] == [False, True, False, True, False]
    assert list(schedule(0)) == []
    for epochs in range(4):
        assert count_validations(epochs) == sum(not one.trains for one in schedule(epochs))


@given(st.integers(1, 4))
def test_an_epoch_has_each_example_once_in_an_order_of_its_own(epochs: int) -> None:
    orders = [tuple(one.examples) for one in schedule(epochs) if one.trains]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(orders)) == epochs


@given(st.integers(1, 4), st.data())
def test_a_training_takes_from_a_checkpoint_on_what_is_left(
    epochs: int, data: st.DataObject
) -> None:
    done = data.draw(st.integers(0, 2 * epochs))
    resumed, every = schedule(epochs), list(schedule(epochs))
    assert resumed.start(done // 2, validated=bool(done % 2)) == (done % 2 == 0)
    taken = [Pass(one.trains, resumed.take(one.trains)) for one in every[done:]]
    assert taken == every[done:]
    assert resumed.is_done()


def test_a_checkpoint_within_an_epoch_goes_on_in_it() -> None:
    resumed, every = schedule(2), list(schedule(2))
    assert not resumed.start(1.25, validated=False)
    assert resumed.take(trains=True) == every[3].examples


def test_a_training_that_does_not_follow_the_schedule_is_refused() -> None:
    with pytest.raises(AssertionError, match="does not follow"):
        schedule(1).take(trains=True)
    with pytest.raises(AssertionError, match="after the end"):
        schedule(0).take(trains=False)
    assert not schedule(1).is_done()
    assert schedule(0).is_done()
