"""The order of training has every example once per epoch, pairs of an image together."""

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mllm_msr.training.batching import GroupSampler

images = st.lists(st.none() | st.integers(0, 5), max_size=60)


@given(images, st.integers(1, 9), st.integers(0, 3))
def test_every_example_occurs_once(shown: list[int | None], size: int, epoch: int) -> None:
    sampler = GroupSampler(shown, [9] * len(shown), 4, size, seed=1)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(shown))) == list(range(len(sampler)))


def test_the_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = GroupSampler([n % 7 for n in range(50)], [9] * 50, 4, 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_a_batch_has_several_images_with_several_pairs_each() -> None:
    shown = [n % 100 for n in range(400)]
    order = list(GroupSampler(shown, [9] * len(shown), 4, 16, seed=3))
    batches = [Counter(shown[i] for i in order[s : s + 16]) for s in range(0, 400, 16)]
    assert all(len(batch) == 4 for batch in batches)
    assert all(set(batch.values()) == {4} for batch in batches)


def test_batches_have_groups_of_similar_size() -> None:
    # Half of the images have one pair, half have four.
    shown = [n if n < 100 else 100 + n % 25 for n in range(200)]
    order = list(GroupSampler(shown, [9] * len(shown), 4, 16, seed=3))
    batches = [Counter(shown[i] for i in order[s : s + 16]) for s in range(0, 192, 16)]
    mixed = sum(len(set(batch.values())) > 1 for batch in batches)
    assert mixed <= 1


def test_batches_have_examples_of_similar_length() -> None:
    lengths = [100 + 300 * (n % 2) for n in range(512)]
    order = list(GroupSampler(range(512), lengths, 4, 16, seed=3))
    batches = [{lengths[i] for i in order[s : s + 16]} for s in range(0, 512, 16)]
    assert sum(len(batch) > 1 for batch in batches) <= len(batches) // 4


def test_groups_may_be_larger_than_the_batches_that_are_sorted_together() -> None:
    order = GroupSampler([n // 21 for n in range(63)], list(range(63)), 21, 1, seed=3)
    assert sorted(order) == list(range(63))


def test_batches_of_one_pair_have_an_image_in_a_row() -> None:
    shown = [n % 100 for n in range(400)]
    order = [shown[i] for i in GroupSampler(shown, [9] * 400, 4, 1, seed=3)]
    neighbours = sum(one == other for one, other in pairwise(order))
    assert neighbours == 300  # three of four follow a pair of their image
