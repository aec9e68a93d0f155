"""Items by id, title and words."""

from pathlib import Path

import pytest
from fake_recommender import FakeRecommender

from mllm_msr.core.errors import DataError
from mllm_msr.serving.items import Items


def test_a_run_without_images_has_items_all_the_same(tmp_path: Path) -> None:
    items = Items(FakeRecommender().catalogue, tmp_path / "images.parquet")
    assert not items.find("i1").image
    with pytest.raises(DataError, match="an item with an image"):
        items.image("i1")


def test_documents_are_ids_or_titles(images: Path) -> None:
    items = Items(FakeRecommender().catalogue, images)
    assert items.resolve(["i7", "Lamp 3", "a/b"]) == ["i7", "i3", "a/b"]
    with pytest.raises(DataError, match=r"documents\[1\]: expected an id, or the title of one"):
        items.resolve(["i7", "Same"])
    with pytest.raises(DataError, match=r"documents\[0\]: expected an item of the catalogue"):
        items.resolve([""])


def test_a_search_has_all_words_and_begins_with_the_popular(images: Path) -> None:
    items = Items(FakeRecommender().catalogue, images)
    assert [each.item for each in items.search("LAMP 1", 3)] == ["i1", "i10", "i11"]
    assert [each.item for each in items.search("a/b", 3)] == ["a/b"]
    assert items.search("lamp chair", 3) == []
    assert len(items.search("", 100)) == 30
