"""Reads ``images.parquet`` by item: digests and sizes at once, pixels when asked."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import duckdb
from PIL import Image

from mllm_msr.images import decode
from mllm_msr.prompts import Picture
from mllm_msr.tables import Images, check_table


class Gallery:
    """The pictures of a catalogue."""

    def __init__(self, path: Path) -> None:
        """Open the table and note every item's digest and size.

        Raises:
            DataError: The table is missing or breaks its model.
        """
        check_table(Images, path)
        self._path = str(path)
        self._connection = duckdb.connect()
        rows = self._connection.execute(
            "SELECT item, digest, width, height FROM read_parquet(?)", [self._path]
        ).fetchall()
        self._pictures = {item: Picture(item, digest) for item, digest, _, _ in rows}
        self._sizes = {item: (width, height) for item, _, width, height in rows}

    def __enter__(self) -> Self:
        """Use the gallery as a context."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self._connection.close()

    def picture(self, item: str) -> Picture | None:
        """Name an item's picture, or None where it has none."""
        return self._pictures.get(item)

    def size(self, picture: Picture) -> tuple[int, int]:
        """Give a picture's width and height in pixels."""
        return self._sizes[picture.item]

    def images(self, pictures: Sequence[Picture]) -> list[Image.Image]:
        """Decode pictures, in their order; RGB."""
        items = sorted({picture.item for picture in pictures})
        rows = self._connection.execute(
            "SELECT item, image FROM read_parquet(?) WHERE item IN (SELECT unnest(?))",
            [self._path, items],
        ).fetchall()
        decoded = {item: decode(image) for item, image in rows}
        return [decoded[picture.item] for picture in pictures]
