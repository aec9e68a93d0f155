"""The load benchmark of the service counts wrong answers."""

import pytest

from bench.serving import is_right

EXPECTED = {"a": 0.9, "b": 0.5, "c": 0.2}


def answer(items: str) -> dict[str, list[dict[str, object]]]:
    return {"items": [{"item": item, "p_yes": EXPECTED.get(item, 0.5)} for item in items]}


@pytest.mark.parametrize(
    ("items", "right"),
    [("ab", True), ("ba", False), ("", False), ("a", False), ("aa", False), ("ad", False)],
)
def test_an_answer_is_right_with_the_best_items_in_their_order(items: str, right: bool) -> None:
    assert is_right(answer(items), EXPECTED, k=2) is right


def test_a_catalogue_smaller_than_k_is_answered_whole() -> None:
    assert is_right(answer("abc"), EXPECTED, k=10)
