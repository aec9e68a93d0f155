"""The first items of a catalogue, and what a retriever proposes where it knows little."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_msr.baselines.task import Candidates, Known, Training
from mllm_msr.recommendation.catalogue import Catalogue
from mllm_msr.recommendation.full_catalogue import find_first
from mllm_msr.recommendation.retrieval import (
    Asked,
    BaselineRetriever,
    PopularityRetriever,
    retrieve,
)

COUNTS = {"a": 1, "b": 1, "c": 3, "d": 1, "e": 0}  # known interactions


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30),
    st.sets(st.integers(0, 29)),
    st.integers(0, 40),
)
def test_the_first_items_are_those_of_a_stable_sort(
    pairs: list[tuple[int, int]], left_out: set[int], number: int
) -> None:
    scores, ties = (np.array([pair[part] for pair in pairs], float) for part in (0, 1))
    excluded = np.array(sorted(index for index in left_out if index < len(pairs)), int)
    for second in (None, ties):
        order = sorted(
            range(len(pairs)),
            key=lambda index: (-scores[index], 0 if second is None else -ties[index]),
        )
        expected = [index for index in order if index not in left_out][:number]
        assert find_first(scores, excluded, number, second).tolist() == expected


class Neighbours:
    """A baseline in which the first item has the fourth for a neighbour, and no other has any."""

    def score_items(self, user: int | None, history: np.ndarray) -> np.ndarray:
        del user
        return np.array([0, 0, 0, float(0 in history), 0])


@pytest.fixture
def retriever() -> BaselineRetriever:
    items = np.repeat(np.arange(5), list(COUNTS.values()))
    none = np.array([], int)
    training = Training(
        items=list(COUNTS),
        users=["u"],
        known=Known(np.zeros_like(items), items, None),
        longest=9,
        histories=[],
        selection=Candidates(none, none, none),
    )
    return BaselineRetriever("neighbours", Neighbours(), training)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("history", "excluded", "used", "found"),
    [
        (["a"], ["a"], "neighbours", ["d", "c", "b"]),  # of equal scores the most popular first
        (["b"], [], "neighbours", ["c", "a", "b"]),
        (["e"], ["e"], "popularity", ["c", "a", "b"]),  # nothing was learned of it
        (["new"], [], "popularity", ["c", "a", "b"]),
        ([], [], "popularity", ["c", "a", "b"]),
        (["e", "a"], ["e", "a"], "neighbours", ["d", "c", "b"]),
    ],
)
def test_where_a_retriever_knows_little_popular_items_follow(
    retriever: BaselineRetriever,
    history: list[str],
    excluded: list[str],
    used: str,
    found: list[str],
) -> None:
    popular = PopularityRetriever(Catalogue(dict.fromkeys(COUNTS), {}, COUNTS))
    asked = Asked(None, history, set(excluded))
    assert retrieve(retriever, popular, asked, 3) == (used, found)
