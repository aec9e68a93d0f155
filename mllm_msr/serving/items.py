"""Items of the catalogue as the service shows them: by id or title, by words, and their images."""

import functools
import io
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mllm_msr.core.errors import UnknownError
from mllm_msr.images.gallery import Gallery
from mllm_msr.recommendation.catalogue import Catalogue

CACHED_IMAGES = 500
IDS_SHOWN = 3  # of items with the same title, in the error


class ItemView(NamedTuple):
    """An item.

    Attributes:
        item: Its id.
        title: None where it has none.
        summary: What the models read of it; None where the run made none.
        interactions: How often it was taken.
        image: Whether it has an image.
    """

    item: str
    title: str | None
    summary: str | None
    interactions: int
    image: bool


class Items:
    """The items of a catalogue, with their images."""

    def __init__(self, catalogue: Catalogue, images: Path) -> None:
        """Take a catalogue and open its images.

        Args:
            catalogue: The items.
            images: The table Images; a run without images has none.

        Raises:
            DataError: The table is damaged.
        """
        self.catalogue = catalogue
        self._gallery = Gallery(images) if images.is_file() else None
        self._by_title: dict[str, list[str]] = defaultdict(list)
        for item, title in catalogue.titles.items():
            if title:
                self._by_title[title].append(item)
        # Requests for images come from several threads, and a Parquet file is read by one.
        self._lock = threading.Lock()
        self._encode = functools.lru_cache(CACHED_IMAGES)(self._encode_image)

    def find(self, item: str) -> ItemView:
        """Return an item.

        Raises:
            UnknownError: It is unknown; names a similar id.
        """
        self.catalogue.check([item], "item")
        return ItemView(
            item,
            self.catalogue.titles[item],
            self.catalogue.summaries.get(item),
            self.catalogue.popularity.get(item, 0),
            self.has_image(item),
        )

    def has_image(self, item: str) -> bool:
        """Return whether an item has an image."""
        return self._gallery is not None and self._gallery.image_ref(item) is not None

    def search(self, words: str, limit: int) -> list[ItemView]:
        """Return items whose id and title have all words, the most popular first."""
        wanted = words.casefold().split()
        found = [
            item
            for item, title in self.catalogue.titles.items()
            if all(word in f"{item} {title or ''}".casefold() for word in wanted)
        ]
        counts = self.catalogue.popularity
        found.sort(key=lambda item: -counts.get(item, 0))
        return [self.find(item) for item in found[:limit]]

    def resolve(self, documents: Sequence[str]) -> list[str]:
        """Return the ids of items that are named by id or by title.

        Raises:
            UnknownError: One is neither, or a title is that of several items.
        """
        return [self._resolve(each, f"documents[{n}]") for n, each in enumerate(documents)]

    def image(self, item: str) -> bytes:
        """Return an item's image as PNG.

        Raises:
            UnknownError: The item is unknown, or has no image.
            DataError: Its image is damaged.
        """
        view = self.find(item)
        if not view.image:
            raise UnknownError(
                expected="an item with an image", got="none", where="item", fix="show its title"
            )
        with self._lock:
            return self._encode(item)

    def _resolve(self, document: str, where: str) -> str:
        if document in self.catalogue.titles:
            return document
        same = self._by_title.get(document, [])
        if len(same) > 1:
            shown = ", ".join(map(repr, same[:IDS_SHOWN]))
            raise UnknownError(
                expected="an id, or the title of one item",
                got=f"a title of {len(same):,} items, as {shown}",
                where=where,
                fix="name it by its id",
            )
        if not same:
            self.catalogue.check([document], where)
        return same[0]

    def _encode_image(self, item: str) -> bytes:
        assert self._gallery
        image_ref = self._gallery.image_ref(item)
        assert image_ref, "checked by the caller"
        written = io.BytesIO()
        self._gallery.images([image_ref])[0].save(written, "PNG")
        return written.getvalue()
