"""Stories are chosen by the rule and show what the tables hold."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_world import make_settings

from mllm_msr.evaluation.calibration import Scaling
from mllm_msr.images.gallery import Gallery
from mllm_msr.report import stories
from mllm_msr.report.inputs import open_tables
from mllm_msr.report.stories import choose_sequences, mark_changes, read_stories, truncate_words

texts = st.lists(st.sampled_from(["tea", "red", "jugs", ",", ".", "not"]), min_size=1).map(" ".join)


@pytest.fixture(scope="module")
def found(finished):
    with open_tables(finished, "uniform") as connection, Gallery(finished.images) as gallery:
        return read_stories(connection, gallery, make_settings(), Scaling(0.5, -1.0))


def test_sequences_are_chosen_by_whether_the_target_is_first(finished):
    with open_tables(finished, "uniform") as connection:
        for seed in range(5):
            chosen = choose_sequences(connection, 9, seed)
            assert chosen.right == [2]
            assert sorted(chosen.wrong) == [3, 4]  # a tie for rank 1 is not first


def test_the_seed_decides_the_order(finished):
    with open_tables(finished, "uniform") as connection:
        drawn = [choose_sequences(connection, 1, seed) for seed in range(12)]
        assert drawn == [choose_sequences(connection, 1, seed) for seed in range(12)]
    assert {tuple(chosen.wrong) for chosen in drawn} == {(3,), (4,)}


def test_zero_stories_are_none(finished):
    with open_tables(finished, "uniform") as connection:
        assert choose_sequences(connection, 0, 0) == ([], [])


@given(st.text(), st.integers(2, 30))
def test_a_shortened_text_is_a_prefix_within_the_limit(text, characters):
    short = truncate_words(text, characters)
    assert len(short) <= characters
    assert short == text if len(text) <= characters else text.startswith(short.removesuffix("…"))


def test_a_text_is_cut_between_words():
    assert truncate_words("A lamp of green glass", 12) == "A lamp of…"
    assert truncate_words("緑のガラスのランプ", 6) == "緑のガラス…"


@given(texts, texts)
def test_both_texts_can_be_recovered_from_the_marks(before, after):
    pieces = mark_changes(before, after)

    def without(kind):
        return "".join(piece.text for piece in pieces if piece.kind != kind)

    assert re.sub(r"\s", "", without("removed")) == re.sub(r"\s", "", after)
    assert re.sub(r"\s", "", without("added")) == re.sub(r"\s", "", before)


def test_a_changed_word_is_marked_and_its_space_is_not():
    pieces = mark_changes("Likes red jugs, any maker.", "Likes green jugs, any maker.")
    assert [(piece.kind, piece.text) for piece in pieces if piece.text.strip()] == [
        ("same", "Likes"),
        ("removed", "red"),
        ("added", "green"),
        ("same", " jugs, any maker."),
    ]


def test_nothing_is_new_in_the_first_preference():
    assert mark_changes("", "Likes jugs.") == [("same", "Likes jugs.")]


def test_a_story_has_the_history_in_blocks_and_the_candidates_best_first(found):
    (story,) = found.right
    assert [[item.title for item in block.items] for block in story.blocks] == [
        ["Yellow jug", "Blue teapot"],
        ["Red kettle"],
    ]
    ranking = [(ranked.rank, ranked.item.title, ranked.target) for ranked in story.candidates]
    assert ranking[0] == (1, "Green cup", True)
    assert [rank for rank, _, _ in ranking] == [1, 2, 3]
    assert story.candidates[0].p_yes == pytest.approx(0.8808, abs=1e-4)  # sigmoid(2)
    assert story.candidates[0].calibrated == 0.5  # sigmoid(0.5 * 2 - 1)
    assert story.candidates[0].interactions == 3


def test_an_item_without_a_title_is_shown_by_its_summary(found):
    third = next(story for story in found.wrong if story.sequence == 3)
    names = [item.title for block in third.blocks for item in block.items]
    assert "Summary e: None." in names


def test_tied_candidates_have_their_mean_rank(found):
    fourth = next(story for story in found.wrong if story.sequence == 4)
    assert fourth.rank == 1.5
    assert [ranked.rank for ranked in fourth.candidates] == [1.5, 1.5, 3]


def test_only_items_with_an_image_have_one(found):
    shown = {
        item.title: item.image
        for story in found.right + found.wrong
        for block in story.blocks
        for item in block.items
    }
    assert shown["Yellow jug"] is None
    assert shown["Red kettle"].startswith("data:image/webp;base64,")


def test_a_long_ranking_is_cut_but_shows_the_target(finished, monkeypatch):
    monkeypatch.setattr(stories, "SHOWN", 1)
    with open_tables(finished, "uniform") as connection, Gallery(finished.images) as gallery:
        found = read_stories(connection, gallery, make_settings(), Scaling(0.5, -1.0))
    third = next(story for story in found.wrong if story.sequence == 3)
    assert [ranked.rank for ranked in third.candidates] == [1, 3]
    assert third.candidates[-1].target
    assert (third.count, third.rank) == (3, 3)
