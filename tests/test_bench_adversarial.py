"""The benchmark of texts that argue: which items it changes, and what it measures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_world import NEGATIVES, write_small_world

from bench import adversarial
from bench.adversarial import (
    TEXTS,
    Chosen,
    choose_negatives,
    describe,
    draw_text,
    list_names,
    name_variant,
)
from mllm_msr.core.schemas import Images, Items, Scores
from mllm_msr.core.tables import read_rows, write_rows
from mllm_msr.images.decoding import decode


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the small world, with a score of each test candidate."""
    write_small_world(tmp_path)
    rows = [
        {"sequence": 2, "item": item, "split": "test", "log_odds": float(odds)}
        for odds, item in enumerate("cef")
    ]
    write_rows(Scores, rows, tmp_path / "score/scores.parquet")
    monkeypatch.setattr(adversarial, "DATA", tmp_path)
    return tmp_path


def test_the_texts_are_equally_long() -> None:
    assert len(set(map(len, TEXTS.values()))) == 1


@pytest.mark.usefixtures("data")
def test_a_negative_is_chosen_with_the_scores_of_the_others() -> None:
    drawn = [choose_negatives(5, seed) for seed in range(9)]
    assert drawn == [choose_negatives(5, seed) for seed in range(9)]
    assert {each.item for (each,) in drawn} == set(NEGATIVES[2])
    others = {each.item: each.others for (each,) in drawn}
    assert {item: sorted(scores) for item, scores in others.items()} == {
        "e": [0.0, 2.0],
        "f": [0.0, 1.0],
    }


@pytest.mark.usefixtures("data")
def test_each_variant_changes_the_title_or_the_image(tmp_path: Path) -> None:
    write_rows(Items, adversarial._vary_titles({"a", "d"}), tmp_path / "items.parquet")
    write_rows(Images, adversarial._vary_images({"a", "d"}), tmp_path / "images.parquet")
    titles = {
        row["item"]: row["title"] for row in read_rows(Items, tmp_path / "items.parquet", "item")
    }
    assert set(titles) == {*list_names("a", has_image=True), *list_names("d", has_image=True)}
    assert titles["a title argument"] == f"Red kettle {TEXTS['argument']}"
    assert titles["a image argument"] == titles["a"] == "Red kettle"
    images = {
        row["item"]: np.asarray(decode(row["image"]))
        for row in read_rows(Images, tmp_path / "images.parquet", "item")
    }
    assert set(images) == set(list_names("a", has_image=True))  # d has no image
    assert (images["a title control"] == images["a"]).all()
    for text in TEXTS:
        assert (images[name_variant("a", "image", text)] != images["a"]).any()


@pytest.mark.parametrize("size", [(40, 40), (30, 110), (336, 200)])
def test_drawn_text_is_at_the_lower_edge_of_an_image_of_the_same_size(
    size: tuple[int, int],
) -> None:
    drawn = draw_text(Image.new("RGB", size, "red"), "one two")
    assert drawn.size == size
    pixels = np.asarray(drawn)
    assert (pixels[0] == (255, 0, 0)).all()
    assert (pixels[-1] != (255, 0, 0)).any()
    assert pixels.sum(axis=2).min() < 100  # black letters


def test_a_rise_is_measured_against_the_item_as_it_is() -> None:
    chosen = [Chosen(1, "a", [0.0, 1.0, 3.0]), Chosen(2, "d", [0.0, 1.0, 3.0])]
    titles = {"argument": 2.0, "control": 0.0}
    scores = {(each.sequence, each.item): -1.0 for each in chosen}
    for each in chosen:
        for text, odds in titles.items():
            scores[each.sequence, name_variant(each.item, "title", text)] = odds
    argument, control, difference = describe(chosen, scores, seed=0)
    assert (argument["place"], argument["text"], argument["sequences"]) == ("title", "argument", 2)
    assert argument["log_odds"] == [3.0, 3.0, 3.0]
    assert argument["ranks"] == [2.0, 2.0, 2.0]  # from the fourth to the second
    assert control["ranks"] == [0.5, 0.5, 0.5]  # tied with the third
    assert difference["log_odds"] == [2.0, 2.0, 2.0]
    json.dumps(difference)
