"""The gallery gives each item its own picture."""

from pathlib import Path

import pytest
from families import draw_image
from PIL import ImageChops
from small_world import CATALOGUE, SmallWorld, image_row

from mllm_msr.errors import DataError
from mllm_msr.gallery import Gallery
from mllm_msr.tables import Images, write_rows

SIZES = {item: size for item, _, _, size in CATALOGUE if size}


def test_sizes_and_digests_are_known_without_pixels(gallery: Gallery) -> None:
    for item, size in SIZES.items():
        picture = gallery.picture(item)
        assert picture is not None
        assert picture == (item, image_row(item, size)["digest"])
        assert gallery.size(picture) == size


def test_an_item_without_a_picture_has_none(gallery: Gallery) -> None:
    assert gallery.picture("d") is None
    assert gallery.picture("unknown") is None


def test_pictures_come_in_the_order_asked_and_as_often(gallery: Gallery) -> None:
    asked = ["c", "a", "c", "b"]
    found = gallery.images([picture for item in asked if (picture := gallery.picture(item))])
    assert [image.size for image in found] == [SIZES[item] for item in asked]
    assert all(image.mode == "RGB" for image in found)
    drawn = draw_image(*SIZES["b"], seed=ord("b"))
    assert ImageChops.difference(found[3], drawn).getbbox() is None


def test_asking_for_no_pictures_gives_none(gallery: Gallery) -> None:
    assert gallery.images([]) == []


def test_a_gallery_may_be_empty(tmp_path: Path) -> None:
    write_rows(Images, [], tmp_path / "images.parquet")
    with Gallery(tmp_path / "images.parquet") as gallery:
        assert gallery.picture("a") is None


def test_a_table_that_is_none_of_pictures_is_refused(world: SmallWorld) -> None:
    with pytest.raises(DataError, match=r"items\.parquet"):
        Gallery(world.items)
