"""Random access to the table of images."""

from pathlib import Path

import pyarrow.parquet
import pytest
from families import draw_image
from PIL import ImageChops
from small_world import CATALOGUE, SmallWorld, image_row

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import Images
from mllm_msr.core.tables import arrow_schema, write_rows
from mllm_msr.images.decoding import ROWS_PER_GROUP, Failures, ImageLocation, write_images
from mllm_msr.images.gallery import Gallery

SIZES = {item: size for item, _, _, size in CATALOGUE if size}


def test_sizes_and_digests_are_known_without_pixels(gallery: Gallery) -> None:
    for item, size in SIZES.items():
        image_ref = gallery.image_ref(item)
        assert image_ref is not None
        assert image_ref == (item, image_row(item, size)["digest"])
        assert gallery.size(image_ref) == size


def test_an_item_without_an_image_has_no_reference(gallery: Gallery) -> None:
    assert gallery.image_ref("d") is None
    assert gallery.image_ref("unknown") is None


def test_images_are_returned_in_the_given_order_with_repeats(gallery: Gallery) -> None:
    asked = ["c", "a", "c", "b"]
    found = gallery.images([image_ref for item in asked if (image_ref := gallery.image_ref(item))])
    assert [image.size for image in found] == [SIZES[item] for item in asked]
    assert all(image.mode == "RGB" for image in found)
    drawn = draw_image(*SIZES["b"], seed=ord("b"))
    assert ImageChops.difference(found[3], drawn).getbbox() is None


def test_no_references_give_no_images(gallery: Gallery) -> None:
    assert gallery.images([]) == []


def test_a_gallery_may_be_empty(tmp_path: Path) -> None:
    write_rows(Images, [], tmp_path / "images.parquet")
    with Gallery(tmp_path / "images.parquet") as gallery:
        assert gallery.image_ref("a") is None


def test_another_table_is_refused(world: SmallWorld) -> None:
    with pytest.raises(DataError, match=r"items\.parquet"):
        Gallery(world.items)


def test_only_the_row_group_of_an_image_is_read(tmp_path: Path) -> None:
    # The bytes of another row group are destroyed, so that reading it would fail.
    path = tmp_path / "images.parquet"
    items = [f"{letter}{number}" for number in range(2) for letter in "abcdefghij"]
    rows = [image_row(item, (8, 8)) for item in items]
    write_rows(Images, rows, path, rows_per_group=10)
    with Gallery(path) as gallery:
        first, second = gallery.image_ref("j0"), gallery.image_ref("a1")
        assert first is not None
        assert second is not None
        column = pyarrow.parquet.read_metadata(path).row_group(1).column(1)
        assert column.path_in_schema == "image"
        with path.open("r+b") as file:
            file.seek(column.dictionary_page_offset or column.data_page_offset)
            file.write(bytes(column.total_compressed_size))
        assert gallery.images([first])[0].size == (8, 8)
        with pytest.raises(DataError, match=r"images\.parquet, item a1: expected the image with"):
            gallery.images([second])


def test_an_image_with_a_wrong_digest_is_refused(tmp_path: Path) -> None:
    # Written without a file digest, which would detect the damage first.
    rows = [
        image_row("a", (8, 8)),
        image_row("b", (8, 8)) | {"image": image_row("a", (8, 8))["image"]},
    ]
    path = tmp_path / "images.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=arrow_schema(Images)), path)
    with Gallery(path) as gallery:
        first, second = gallery.image_refs
        assert gallery.images([first])[0].size == (8, 8)
        with pytest.raises(DataError, match=r"images\.parquet, item b: expected the image with"):
            gallery.images([first, second])


@pytest.mark.parametrize("column", ["image", "digest"])
def test_a_flipped_byte_in_the_images_is_detected(tmp_path: Path, column: str) -> None:
    path = tmp_path / "images.parquet"
    write_rows(Images, [image_row(item, (8, 8)) for item in "ab"], path)
    chunks = [
        chunk
        for number in range(5)
        if (chunk := pyarrow.parquet.read_metadata(path).row_group(0).column(number))
        and chunk.path_in_schema == column
    ]
    content = path.read_bytes()
    start, length = chunks[0].dictionary_page_offset, chunks[0].total_compressed_size
    for place in range(start, start + length, max(1, length // 20)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DataError, match=r"images\.parquet: expected the bytes"):
            Gallery(path)


def test_images_are_written_in_small_row_groups(tmp_path: Path) -> None:
    files = []
    for number in range(ROWS_PER_GROUP + 1):
        draw_image(8, 8, seed=number).save(tmp_path / f"{number}.png")
        files.append(ImageLocation(str(number), tmp_path / f"{number}.png"))
    path = tmp_path / "images.parquet"
    write_images(files, path, 8, Failures(len(files), 0.0))
    assert pyarrow.parquet.read_metadata(path).num_row_groups == 2
    with Gallery(path) as gallery:
        last = gallery.image_ref(str(ROWS_PER_GROUP))
        assert last is not None
        drawn = draw_image(8, 8, seed=ROWS_PER_GROUP)
        assert ImageChops.difference(gallery.images([last])[0], drawn).getbbox() is None
