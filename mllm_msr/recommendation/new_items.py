"""Items that came after the run: their texts and images, cleaned as those of the catalogue.

They are in the histories and candidates of one request. Texts are folded as by the stage
preprocess, images shrunk as by the stage fetch_images.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import duckdb
from PIL import Image

from mllm_msr.core.errors import DataError
from mllm_msr.data.sources.cleaning import fold
from mllm_msr.data.sources.parsing import explain_read_errors, locate_row, view_records
from mllm_msr.images.decoding import decode, encode
from mllm_msr.images.gallery import Gallery, ImageRef
from mllm_msr.recommendation.catalogue import Catalogue

FOLD = (
    f"SELECT {fold('title')}, {fold('description')}"
    " FROM (SELECT ?::VARCHAR AS title, ?::VARCHAR AS description)"
)
GIVE_ONE = "give it a title, a description or an image"


class NewItem(NamedTuple):
    """An item that is not in the catalogue.

    Attributes:
        item: Its id.
        title: Its title, or None.
        description: Its description, or None.
        image: The file of its image, or None.
    """

    item: str
    title: str | None
    description: str | None = None
    image: Path | None = None


class NewImage(NamedTuple):
    """The shrunk image of a new item.

    Attributes:
        content: The encoded bytes.
        size: Width and height in pixels.
    """

    content: bytes
    size: tuple[int, int]

    @property
    def digest(self) -> str:
        """The SHA-256 of the bytes."""
        return hashlib.sha256(self.content).hexdigest()


class ExtendedGallery(Gallery):
    """The images of a catalogue, and for a while those of new items."""

    def __init__(self, path: Path) -> None:
        """Open the table of images."""
        super().__init__(path)
        self._new: Mapping[str, NewImage] = {}

    @contextlib.contextmanager
    def with_images(self, images: Mapping[str, NewImage]) -> Iterator[None]:
        """Have the images of new items, by item, in the block."""
        self._new = images
        try:
            yield
        finally:
            self._new = {}

    def image_ref(self, item: str) -> ImageRef | None:
        """Return the reference to an item's image, or None if it has none."""
        new = self._new.get(item)
        return ImageRef(item, new.digest) if new else super().image_ref(item)

    def size(self, image_ref: ImageRef) -> tuple[int, int]:
        """Return an image's (width, height) in pixels."""
        new = self._new.get(image_ref.item)
        return new.size if new else super().size(image_ref)

    def images(self, image_refs: Sequence[ImageRef]) -> list[Image.Image]:
        """Return decoded RGB images in the given order."""
        found = iter(super().images([ref for ref in image_refs if ref.item not in self._new]))
        return [
            decode(self._new[ref.item].content) if ref.item in self._new else next(found)
            for ref in image_refs
        ]


def read_new_items(path: Path) -> list[NewItem]:
    """Read new items from a CSV, TSV, JSON Lines or Parquet file.

    Its columns are item, title and, optionally, description and image, a path below the file's
    folder.

    Raises:
        DataError: The file or a column is missing, a line is malformed, an id is empty, or an
            image's path leads out of the folder.
    """
    if not path.is_file():
        raise DataError(
            expected="a file of new items", got="no such file", where=str(path), fix="correct it"
        )
    with duckdb.connect() as connection, explain_read_errors(path):
        view_records(connection, "new_items", path, ("item", "title"), ("description", "image"))
        query = "SELECT item, title, description, image, row FROM new_items ORDER BY row"
        rows = connection.execute(query).fetchall()
    found = []
    for item, title, description, image, row in rows:
        where = locate_row(path, row)
        if item is None:
            raise DataError(
                expected="the id of an item", got="an empty cell", where=where, fix="add it"
            )
        if image and (PurePath(image).is_absolute() or ".." in PurePath(image).parts):
            raise DataError(
                expected=f"the path of an image below {path.parent}",
                got=repr(image),
                where=where,
                fix="put the image there",
            )
        file = path.parent / image if image else None
        found.append(NewItem(item, title, description, file))
    return found


def clean_items(items: Sequence[NewItem], catalogue: Catalogue) -> list[NewItem]:
    """Return new items with their texts folded, as preprocess folds those of the catalogue.

    Raises:
        DataError: An item is in the catalogue already, is there twice, or has neither text nor
            image.
    """
    found: dict[str, NewItem] = {}
    with duckdb.connect() as connection:
        for given in items:
            texts = [given.title, given.description]
            ((title, description),) = connection.execute(FOLD, texts).fetchall()
            where = f"new item {given.item!r}"
            if given.item in catalogue.titles or given.item in found:
                got = "one of the catalogue" if given.item not in found else "the same one twice"
                raise DataError(
                    expected="an item new to the catalogue",
                    got=got,
                    where=where,
                    fix="leave it out, or name it by another id",
                )
            if not (title or description or given.image):
                raise DataError(
                    expected="a text or an image", got="neither", where=where, fix=GIVE_ONE
                )
            found[given.item] = given._replace(title=title, description=description)
    return list(found.values())


def shrink_images(items: Sequence[NewItem], image_side: int) -> dict[str, NewImage]:
    """Return the images of new items by item, shrunk as by the stage fetch_images.

    Raises:
        DataError: An image is missing, damaged or too large.
    """
    images = {}
    for item in items:
        if item.image:
            images[item.item] = NewImage(*encode(item.image, image_side))
    return images
