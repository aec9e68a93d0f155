"""The first items of a catalogue are those of a stable sort, whatever the ties."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mllm_msr.recommendation.full_catalogue import find_first


@given(st.lists(st.integers(0, 4), max_size=30), st.sets(st.integers(0, 29)), st.integers(0, 40))
def test_the_first_items_are_those_of_a_stable_sort(
    scores: list[int], left_out: set[int], number: int
) -> None:
    excluded = sorted(index for index in left_out if index < len(scores))
    found = find_first(np.array(scores, float), np.array(excluded, int), number)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    assert found.tolist() == [index for index in order if index not in left_out][:number]
