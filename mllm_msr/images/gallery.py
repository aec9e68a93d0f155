"""Random access to ``images.parquet`` by item: digests and sizes in memory, pixels on demand."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import pyarrow.parquet
from PIL import Image

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import Images
from mllm_msr.core.tables import check_table
from mllm_msr.images.decoding import decode

CACHED_GROUPS = 8  # encoded row groups, for callers that read in the table's order


class ImageRef(NamedTuple):
    """A reference to an image: its item, and the SHA-256 of its encoded bytes."""

    item: str
    digest: str


class _Position(NamedTuple):
    """The position of an image in the table."""

    group: int
    row: int  # in its group


class Gallery:
    """The images of a catalogue. Pixels are not held: an image is read with its row group."""

    def __init__(self, path: Path) -> None:
        """Open the table and load every item's digest, size and position.

        Raises:
            DataError: The table is missing or violates its model.
        """
        check_table(Images, path)
        self._path = path
        self._file = pyarrow.parquet.ParquetFile(path.absolute())
        self._image_refs: dict[str, ImageRef] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._positions: dict[str, _Position] = {}
        for group in range(self._file.num_row_groups):
            self._load_group_index(group)
        self._read_group = functools.lru_cache(CACHED_GROUPS)(self._load_group)

    def __enter__(self) -> Self:
        """Return the gallery."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path, for the workers of a cluster, which open the table themselves."""
        return Gallery, (self._path,)

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
        """References to all images, in the table's order."""
        return list(self._image_refs.values())

    def image_ref(self, item: str) -> ImageRef | None:
        """Return the reference to an item's image, or None if it has none."""
        return self._image_refs.get(item)

    def size(self, image_ref: ImageRef) -> tuple[int, int]:
        """Return an image's (width, height) in pixels."""
        return self._sizes[image_ref.item]

    def images(self, image_refs: Sequence[ImageRef]) -> list[Image.Image]:
        """Return decoded RGB images in the given order; a repeated image is decoded once.

        Raises:
            DataError: An image's bytes do not match its digest, under which responses are stored,
                or the file was damaged after it was opened.
        """
        items = {image_ref.item for image_ref in image_refs}
        decoded = {item: decode(self._read(position, item)) for position, item in self._sort(items)}
        return [decoded[image_ref.item] for image_ref in image_refs]

    def encoded(self, image_ref: ImageRef) -> bytes:
        """Return an image as the table has it, in WebP or JPEG.

        Raises:
            DataError: As :meth:`images`.
        """
        return self._read(self._positions[image_ref.item], image_ref.item)

    def _load_group_index(self, group: int) -> None:
        columns = ["item", "digest", "width", "height"]
        rows = self._file.read_row_group(group, columns).to_pylist()
        for number, row in enumerate(rows):
            item = row["item"]
            self._image_refs[item] = ImageRef(item, row["digest"])
            self._sizes[item] = (row["width"], row["height"])
            self._positions[item] = _Position(group, number)

    def _sort(self, items: set[str]) -> list[tuple[_Position, str]]:
        """Return items sorted by position, so that each row group is read once."""
        return sorted((self._positions[item], item) for item in items)

    def _read(self, position: _Position, item: str) -> bytes:
        try:
            image: bytes = self._read_group(position.group)[position.row].as_py()
        except OSError as error:
            raise self._damaged_error(item, str(error)[:200]) from error
        digest = hashlib.sha256(image).hexdigest()
        if digest != self._image_refs[item].digest:
            raise self._damaged_error(item, f"bytes with the SHA-256 {digest}")
        return image

    def _load_group(self, group: int) -> pyarrow.ChunkedArray:
        return self._file.read_row_group(group, ["image"]).column("image")

    def _damaged_error(self, item: str, got: str) -> DataError:
        return DataError(
            expected=f"the image with the digest {self._image_refs[item].digest}",
            got=got,
            where=f"{self._path}, item {item}",
            fix="delete the file, run the stage fetch_images again, and check the disk",
        )
