"""Reads ``images.parquet`` by item: digests and sizes at once, pixels when asked."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import pyarrow.parquet
from PIL import Image

from mllm_msr.core.errors import DataError
from mllm_msr.core.tables import Images, check_table
from mllm_msr.images.decoding import decode

GROUPS_KEPT = 8  # of rows, encoded, for callers that read in the table's order


class ImageRef(NamedTuple):
    """An image without its pixels: the item that it shows, and the SHA-256 of its bytes."""

    item: str
    digest: str


class _Place(NamedTuple):
    """Where the table has an image."""

    group: int
    row: int  # in its group


class Gallery:
    """The images of a catalogue. Holds no pixels: an image is read with its row group."""

    def __init__(self, path: Path) -> None:
        """Open the table and note every item's digest, size and place.

        Raises:
            DataError: The table is missing or breaks its model.
        """
        check_table(Images, path)
        self._path = path
        self._file = pyarrow.parquet.ParquetFile(path.absolute())
        self._image_refs: dict[str, ImageRef] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._places: dict[str, _Place] = {}
        for group in range(self._file.num_row_groups):
            self._note(group)
        self._read_group = functools.lru_cache(GROUPS_KEPT)(self._read_group_anew)

    def __enter__(self) -> Self:
        """Use the gallery as a context."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    @property
    def image_refs(self) -> list[ImageRef]:
        """All images, in the table's order."""
        return list(self._image_refs.values())

    def image_ref(self, item: str) -> ImageRef | None:
        """Name an item's image, or None where it has none."""
        return self._image_refs.get(item)

    def size(self, image_ref: ImageRef) -> tuple[int, int]:
        """Give an image's width and height in pixels."""
        return self._sizes[image_ref.item]

    def images(self, image_refs: Sequence[ImageRef]) -> list[Image.Image]:
        """Decode images, in their order; RGB. One of them asked for twice is decoded once.

        Raises:
            DataError: An image's bytes are not those that its digest is of, or the file is
                damaged since it was opened. Responses are stored under the digest.
        """
        items = {image_ref.item for image_ref in image_refs}
        decoded = {item: self._read(place, item) for place, item in self._in_order(items)}
        return [decoded[image_ref.item] for image_ref in image_refs]

    def _note(self, group: int) -> None:
        columns = ["item", "digest", "width", "height"]
        rows = self._file.read_row_group(group, columns).to_pylist()
        for number, row in enumerate(rows):
            item = row["item"]
            self._image_refs[item] = ImageRef(item, row["digest"])
            self._sizes[item] = (row["width"], row["height"])
            self._places[item] = _Place(group, number)

    def _in_order(self, items: set[str]) -> list[tuple[_Place, str]]:
        """Order items by place, so that each group is read once."""
        return sorted((self._places[item], item) for item in items)

    def _read(self, place: _Place, item: str) -> Image.Image:
        try:
            image = self._read_group(place.group)[place.row].as_py()
        except OSError as error:
            raise self._damaged(item, str(error)[:200]) from error
        digest = hashlib.sha256(image).hexdigest()
        if digest != self._image_refs[item].digest:
            raise self._damaged(item, f"bytes with the SHA-256 {digest}")
        return decode(image)

    def _read_group_anew(self, group: int) -> pyarrow.ChunkedArray:
        return self._file.read_row_group(group, ["image"]).column("image")

    def _damaged(self, item: str, got: str) -> DataError:
        return DataError(
            expected=f"the image with the digest {self._image_refs[item].digest}",
            got=got,
            where=f"{self._path}, item {item}",
            fix="delete the file, run the stage fetch_images again, and check the disk",
        )
