"""Pictures, decoded once: checked, bounded, and encoded again into one table.

Models then meet only small RGB pictures that are known to decode. Files are data from strangers:
only raster formats are opened, and a picture's size is read before its pixels are.
"""

import hashlib
import io
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypedDict

from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from mllm_msr.errors import DataError
from mllm_msr.tables import Images, write_rows

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MOST_PIXELS = 89_478_485  # Pillow's own bound: a quarter of a gigabyte in RGB
FILES_AT_ONCE = 64
# What Pillow's decoders raise on broken files.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

log = logging.getLogger(__name__)


class ImageRow(TypedDict):
    """A row of ``images.parquet``."""

    item: str
    image: bytes
    width: int
    height: int
    digest: str


def write_images(
    files: Sequence[tuple[str, Path]], path: Path, image_side: int, drop: bool
) -> tuple[int, int]:
    """Decode pictures and write them as the table of images.

    Args:
        files: An item and its picture's file, in the order of the table's rows.
        path: The Parquet file to write.
        image_side: Longer side after shrinking, in pixels; smaller pictures stay as they are.
        drop: Whether unreadable files are left out and counted, or are an error.

    Returns:
        How many pictures were written, and how many files were dropped.

    Raises:
        DataError: A file is missing or no picture and must not be dropped, or the disk is full;
            nothing is written then.
    """
    dropped = 0

    def rows() -> Iterator[ImageRow]:
        nonlocal dropped
        for row in tqdm(_encoded(files, image_side), "images", len(files), disable=not files):
            if not isinstance(row, DataError):
                yield row
            elif drop:
                dropped += 1
                log.warning("dropped: %s", row)
            else:
                raise row

    # Pillow's own warning would come on top of our refusal.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return write_rows(Images, rows(), path), dropped


def encode(file: Path, image_side: int) -> tuple[bytes, tuple[int, int]]:
    """Decode a picture file, upright, RGB on white, shrunk, and encode it as lossless WebP.

    Equal pixels give equal bytes: nothing of the file's metadata is kept. Of an animation, the
    first frame is taken.

    Args:
        file: A picture in one of :data:`FORMATS`.
        image_side: Longer side after shrinking, in pixels.

    Returns:
        The bytes, and width and height in pixels.

    Raises:
        DataError: The file is missing, empty, broken, of another format, or has more than
            :data:`MOST_PIXELS` pixels.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(
                    f"a picture of at most {MOST_PIXELS:,} pixels",
                    f"{image.width:,} x {image.height:,}",
                    str(file),
                    "shrink it, or set preprocess.bad_images to drop",
                )
            picture = _normalise(image, image_side)
    except UNREADABLE as error:
        raise DataError(
            f"a whole picture ({', '.join(FORMATS)})",
            _reason(error, file),
            str(file),
            "replace it, or set preprocess.bad_images to drop",
        ) from error
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, method=1)
    return buffer.getvalue(), picture.size


def decode(image: bytes) -> Image.Image:
    """Decode the bytes of a row of ``images.parquet``; RGB."""
    return Image.open(io.BytesIO(image), formats=("WEBP",)).convert("RGB")


def _encoded(files: Iterable[tuple[str, Path]], image_side: int) -> Iterator[ImageRow | DataError]:
    """Encode on all cores, in order; Pillow lets go of the interpreter while it works."""

    def encode_row(task: tuple[str, Path]) -> ImageRow | DataError:
        item, file = task
        try:
            image, (width, height) = encode(file, image_side)
        except DataError as error:
            return error
        digest = hashlib.sha256(image).hexdigest()
        return {"item": item, "image": image, "width": width, "height": height, "digest": digest}

    tasks = iter(files)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while some := list(islice(tasks, FILES_AT_ONCE)):
            yield from pool.map(encode_row, some)


def _normalise(image: Image.Image, image_side: int) -> Image.Image:
    """Turn any picture into a small upright RGB one without metadata."""
    image.draft(None, (2 * image_side, 2 * image_side))  # JPEG: decodes no more than needed
    upright = _eight_bits(ImageOps.exif_transpose(image))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        mask = upright.getchannel("A")
    else:
        mask = None
    canvas = Image.new("RGB", upright.size, "white")
    canvas.paste(upright.convert("RGB"), mask=mask)
    canvas.thumbnail((image_side, image_side), Image.Resampling.LANCZOS)
    return canvas


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit greys: Pillow would cut them off at 255."""
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda level: level / 256).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}")
    return image


def _reason(error: Exception, file: Path) -> str:
    """Name what is wrong with a file, without its path again."""
    if not file.is_file():
        return "no such file"
    if not file.stat().st_size:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        return "no such picture"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MOST_PIXELS:,} pixels"
    return str(error) or type(error).__name__
