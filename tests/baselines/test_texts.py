"""The content baselines on texts that can be worked by hand, and their stages' errors."""

from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_task import NAMES, make_task

from mllm_msr.baselines import texts as texts_module
from mllm_msr.baselines.models.word_overlap import WordOverlapParams, count_words
from mllm_msr.baselines.settings import TextParams
from mllm_msr.baselines.task import Task
from mllm_msr.baselines.texts import Texts, compare_with_history, preferences_of, read_texts
from mllm_msr.core.arrays import Floats
from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import Items, Preferences, Summaries
from mllm_msr.core.tables import write_rows

WORDS: dict[str, Any] = {"analyzer": "word", "min_ngram": 1, "max_ngram": 1}


def texts(*values: str) -> Texts:
    return Texts(values, "title", "items.parquet", "leave it out")


def content_knn(task: Task, titles: Texts, **settings: Any) -> Floats:
    return compare_with_history(task, titles, TextParams.model_validate(settings))


def word_overlap(task: Task, items: Texts, preferences: list[str], *, idf: bool) -> Floats:
    return count_words(task, items, preferences, WordOverlapParams(idf=idf))


def rarity(having: int, items: int = 5) -> float:
    """Return scikit-learn's smooth inverse document frequency."""
    return 1 + log((1 + items) / (1 + having))


# -- content kNN -----------------------------------------------------------------------------------


def test_the_cosine_of_two_titles_by_hand() -> None:
    task = make_task([["a"]], [(0, "a")])
    shared, red, blue = rarity(2), rarity(1), rarity(1)
    found = content_knn(task, texts("red kettle", "blue kettle", "lamp", "", "sofa"), **WORDS)
    cosine = shared**2 / (sqrt(red**2 + shared**2) * sqrt(blue**2 + shared**2))
    assert found == pytest.approx([1, cosine, 0, 0, 0])


def test_the_items_of_a_history_count_alike_however_long_their_titles() -> None:
    task = make_task([["a", "b"]], [(0, "ab")])
    titles = texts("lamp", "red blue green kettle", "lamp", "kettle", "sofa")
    found = content_knn(task, titles, **WORDS)
    # The mean of two vectors of length 1 that share no word has the length 1 / sqrt(2).
    once, twice = rarity(1), rarity(2)
    second = twice / sqrt(3 * once**2 + twice**2)  # of kettle in the title of b
    assert found[[2, 3]] == pytest.approx([1 / sqrt(2), second / sqrt(2)])


def test_the_mean_over_a_history_is_a_mean_of_vectors() -> None:
    task = make_task([["a", "b"]], [(0, "ab")])
    found = content_knn(task, texts("lamp", "sofa", "lamp", "rug", "sofa"), **WORDS)
    assert found == pytest.approx([1 / sqrt(2), 1 / sqrt(2), 1 / sqrt(2), 0, 1 / sqrt(2)])


def test_items_and_histories_without_a_title_score_zero() -> None:
    task = make_task([["a", "b"]], [(0, "ab"), (0, "b")])
    found = content_knn(task, texts("lamp", "", "lamp", "", "sofa"), **WORDS).reshape(2, 5)
    assert found[0] == pytest.approx([1, 0, 1, 0, 0])  # b is no part of the direction
    assert found[1].tolist() == [0] * 5


def test_characters_find_what_is_spelled_alike() -> None:
    task = make_task([["a"]], [(0, "a")])
    titles = texts("kettles", "kettle", "lamp", "rug", "sofa")
    assert content_knn(task, titles, **WORDS)[1] == 0
    found = content_knn(task, titles, analyzer="char_wb", min_ngram=3, max_ngram=3)
    assert found[1] > 0.5
    assert found[2] == 0


@pytest.mark.parametrize("values", [[""] * 5, ["!", "?", "...", "", "#"]])
def test_titles_without_any_word_are_an_error_that_says_what_to_do(values: list[str]) -> None:
    task = make_task([["a"]], [(0, "a")])
    said = r"items.parquet: expected an item whose title has a word; got 5 without; leave it out"
    with pytest.raises(DataError, match=said):
        content_knn(task, texts(*values), **WORDS)


@given(
    st.lists(st.text("ab c", max_size=8), min_size=5, max_size=5).filter(
        lambda titles: any(len(word) > 1 for title in titles for word in title.split())
    ),
    st.lists(st.text(NAMES, min_size=1, max_size=4), min_size=1, max_size=4),
)
@settings(max_examples=50, deadline=None)
def test_a_cosine_lies_between_0_and_1_and_no_order_of_the_history_changes_it(
    titles: list[str], histories: list[str]
) -> None:
    forward, backward = (
        content_knn(
            make_task([["a"]], [(0, h[::step]) for h in histories]), texts(*titles), **WORDS
        )
        for step in (1, -1)
    )
    assert (forward >= 0).all()
    assert (forward <= 1 + 1e-9).all()
    assert forward == pytest.approx(backward)


def test_many_candidates_are_scored_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task([["a"]], [(0, "a"), (0, "bc"), (0, "e")])
    titles = texts("red kettle", "blue kettle", "red lamp", "", "sofa")
    whole = content_knn(task, titles, **WORDS)
    monkeypatch.setattr(texts_module, "CANDIDATES_AT_ONCE", 4)
    assert np.array_equal(content_knn(task, titles, **WORDS), whole)


# -- word overlap ----------------------------------------------------------------------------------


def test_the_different_words_of_a_preference_that_an_item_has_are_counted() -> None:
    task = make_task([["a"]], [(0, "a"), (0, "b")])
    items = texts("A red, RED kettle", "blue kettle", "red lamp by Aldo", "", "the sofa")
    preferences = ["The user likes a red kettle, red and red by Aldo.", "Likes any sofa."]
    found = word_overlap(task, items, preferences, idf=False).reshape(2, 5)
    assert found[0].tolist() == [2, 1, 2, 0, 0]  # neither "a" nor "the" nor "by"
    assert found[1].tolist() == [0, 0, 0, 0, 1]


def test_rare_words_count_more_where_asked_for() -> None:
    task = make_task([["a"]], [(0, "a")])
    items = texts("red kettle", "blue kettle", "lamp", "", "sofa")
    found = word_overlap(task, items, ["Likes red and blue kettles or a kettle."], idf=True)
    assert found == pytest.approx([rarity(1) + rarity(2), rarity(1) + rarity(2), 0, 0, 0])


def test_preferences_without_a_word_of_any_item_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = make_task([["a"]], [(0, "a"), (0, "b")])
    items = texts("red kettle", "lamp", "", "", "")
    found = word_overlap(task, items, ["", "lamp"], idf=False)
    assert found.tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    said = "1 of 2 preferences have no word of any item: all their candidates score 0"
    assert caplog.messages == [said]


# -- tables ----------------------------------------------------------------------------------------


def write_items(path: Path, titles: dict[str, str | None]) -> Path:
    rows = [{"item": i, "title": title, "description": "red"} for i, title in titles.items()]
    write_rows(Items, rows, path)
    return path


def test_titles_stand_in_the_order_of_the_items_and_missing_ones_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_items(tmp_path / "items.parquet", {"b": None, "c": " ", "a": "lamp", "z": "rug"})
    assert list(read_texts(path, "title", list("abc"), "content_knn").values) == ["lamp", "", " "]
    said = "content_knn: 2 of 3 items have no title, and are scored as an empty text"
    assert caplog.messages == [said]


def test_a_table_that_lacks_items_is_of_another_run(tmp_path: Path) -> None:
    path = write_items(tmp_path / "items.parquet", {"a": "lamp"})
    with pytest.raises(DataError, match=r"none for 2 of 3; run the stages again with dvc repro"):
        read_texts(path, "title", list("abc"), "content_knn")


def test_an_empty_table_of_summaries_says_what_to_leave_out(tmp_path: Path) -> None:
    write_rows(Summaries, [], tmp_path / "summaries.parquet")
    with pytest.raises(DataError, match=r"take word_overlap out of text_baselines\.models"):
        read_texts(
            tmp_path / "summaries.parquet", "summary", list("abc"), "text_baselines.word_overlap"
        )


def test_the_preference_after_the_last_block_is_read(tmp_path: Path) -> None:
    path = tmp_path / "preferences.parquet"
    rows = [
        {"sequence": sequence, "block": block, "items": block, "preference": f"{sequence}.{block}"}
        for sequence, block in ((1, 10), (0, 1), (1, 2), (0, 3), (0, 2), (7, 1))
    ]
    write_rows(Preferences, rows, path)
    task = make_task([["a"]], [(0, "a"), (0, "b")])
    assert preferences_of(task, path, "text_baselines.word_overlap") == ["0.3", "1.10"]


@pytest.mark.parametrize(
    ("sequences", "fix"),
    [((), "take word_overlap out of text_baselines.models"), ((0,), "run the stages again")],
)
def test_missing_preferences_are_an_error(
    tmp_path: Path, sequences: tuple[int, ...], fix: str
) -> None:
    path = tmp_path / "preferences.parquet"
    rows = [{"sequence": s, "block": 1, "items": 1, "preference": "x"} for s in sequences]
    write_rows(Preferences, rows, path)
    task = make_task([["a"]], [(0, "a"), (0, "b")])
    with pytest.raises(DataError, match=rf"got none for {2 - len(sequences)} of 2; {fix}"):
        preferences_of(task, path, "text_baselines.word_overlap")
