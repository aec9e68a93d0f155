"""Decoding of untrusted image files into one table of small RGB images.

Each image is decoded once, checked, shrunk and encoded again, so that models get only small RGB
images that decode. Only regular files of raster formats are opened, and an image's size is checked
before its pixels are decoded.
"""

import contextlib
import functools
import hashlib
import io
import logging
import math
import re
import struct
import threading
import warnings
import weakref
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple, TypedDict

from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from mllm_msr.core.cpus import available_cpus
from mllm_msr.core.errors import DataError, shorten
from mllm_msr.core.files import (
    BROKEN_ZIP,
    UnreadableFileError,
    explain_write_errors,
    open_regular,
    open_zip,
)
from mllm_msr.core.schemas import FailedImages, Images
from mllm_msr.core.tables import write_rows
from mllm_msr.images.formats import FORMATS, HEAD, find_format

STORED = ("WEBP", "JPEG")  # formats in the table of images
MAX_PIXELS = 89_478_485  # Pillow's own limit: 0.4 GB in RGB, four times that with transparency
MAX_BYTES = 64_000_000  # of a member of an archive; more than any published cover
# Longer over shorter side. The image processors of the Qwen families refuse more; white is added.
MAX_ASPECT = 200
# A JPEG is decoded at the smallest scale (1/2, 1/4 or 1/8) at which its longer side has at least so
# many times the pixels of the shrunk image. At 1.9, pixels differ by 0.6 to 0.9 levels of 255 from
# those of a full decode; storing them as JPEG of quality 95 changes 2.1 levels.
MIN_DRAFT_RATIO = 1.75
QUEUED_PER_THREAD = 8  # images that are decoded before the writer takes them
ROWS_PER_GROUP = 16  # an image is read with its row group (mllm_msr/images/gallery.py)
OR_ALLOW_FAILURES = "or let some fail: fetch_images.failed_share"
DATA_URI = re.compile(r"(^|/)data:[\w.+-]*(/[\w.+-]+)?[;,]", re.IGNORECASE)
ENCRYPTED = 0x1  # bit of a zip member's flags
# Compression methods that are not read (APPNOTE.TXT, 4.4.5). zipfile supports two of them, but
# decompresses those without a limit: a kilobyte may become gigabytes.
METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ"}
UNPACK = "unpack the archive into a folder of its name, or pack it again with Deflate"
# What Pillow's decoders raise on damaged files.
UNREADABLE = (
    UnreadableFileError,
    OSError,
    RuntimeError,  # of AVIF
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
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


class ImageLocation(NamedTuple):
    """The location of an item's image: a file, or a member of a zip archive."""

    item: str
    file: Path
    member: str | None = None
    folder: Path | None = None  # in which the file must lie; None: any, for downloaded files


class FailureRow(TypedDict):
    """A row of ``failures.parquet``."""

    item: str
    place: str
    reason: str


def max_failures(share: float, images: int) -> int:
    """Return how many of some images may fail, computed exactly: 0.29 * 100 is below 29."""
    return int(Fraction(str(share)) * images)


@dataclass
class Failures:
    """Collects failed images, and raises an error when they are too many.

    Attributes:
        images: Number of all images.
        share: Share of them that may fail; 0: none.
        rows: The failed images so far.
    """

    images: int
    share: float
    rows: list[FailureRow] = field(default_factory=list)

    def add(self, item: str, error: DataError) -> None:
        """Record the failed image of an item.

        Raises:
            DataError: Too many have failed; if none may fail, the error itself with the item.
        """
        if self.share:  # where none may fail, the error says it all
            self.note(item, error)
        self.check(item, error)

    def note(self, item: str, error: DataError) -> None:
        """Record the failed image of an item without checking the limit."""
        self.rows.append({"item": item, "place": error.where, "reason": error.got})
        if self.share:
            log.warning("dropped: %s (item %s)", error, shorten(item))

    def check(self, item: str, error: DataError) -> None:
        """Refuse more failures than are allowed.

        Args:
            item: The item whose image failed last.
            error: Its error.

        Raises:
            DataError: Too many have failed; if none may fail and one did, the error itself with the
                item.
        """
        where = f"{error.where} (item {shorten(item)})"
        if not self.share and len(self.rows) <= 1:
            raise DataError(
                expected=error.expected, got=error.got, where=where, fix=error.fix
            ) from error
        limit = max_failures(self.share, self.images)
        if len(self.rows) > limit:
            raise DataError(
                expected=f"at most {limit:,} of {self.images:,} images to fail",
                got=f"{len(self.rows):,}, the last with {error.got}",
                where=where,
                fix="correct or replace them, or raise fetch_images.failed_share",
            )

    @contextlib.contextmanager
    def saved_on_error(self, path: Path) -> Iterator[None]:
        """Write the table of failed images if the block raises an error.

        Raises:
            DataError: The block's error, which then also names the table; or an earlier table
                cannot be removed.
        """
        with explain_write_errors(path):
            path.unlink(missing_ok=True)
        try:
            yield
        except DataError as error:
            if not self.rows:
                raise
            write_rows(FailedImages, self.rows, path)
            fix = f"{error.fix}; the images that failed until then are in {path}"
            raise DataError(
                expected=error.expected, got=error.got, where=error.where, fix=fix
            ) from error


class PixelBudget:
    """Bounds the pixels that all threads decode at once: a large image takes a gigabyte."""

    def __init__(self, limit: int) -> None:
        """Take the number of pixels; an image with more waits until no other is decoded."""
        self._limit = self._free = limit
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for an image, and keep the room in the block."""
        pixels = min(pixels, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: pixels <= self._free)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


DECODED = PixelBudget(MAX_PIXELS)


def write_images(
    images: Sequence[ImageLocation], path: Path, image_side: int, failures: Failures
) -> int:
    """Decode images, write the table of images, and return their number.

    Args:
        images: The images, in the order of the table's rows.
        path: The Parquet file to write.
        image_side: Maximum length of the longer side, in pixels; smaller images are not enlarged.
        failures: Collects images that are missing or do not decode.

    Raises:
        DataError: Too many failed, or the disk is full; then nothing is written.
    """

    def rows() -> Iterator[ImageRow]:
        encoded = _encode_all(images, image_side)
        shown = tqdm(encoded, "images", len(images), disable=not images)
        for image, row in zip(images, shown, strict=True):
            if isinstance(row, DataError):
                failures.add(image.item, row)
            else:
                yield row

    # Too many pixels are an error of ours already.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return write_rows(Images, rows(), path, ROWS_PER_GROUP)


def encode(
    file: Path, image_side: int, member: str | None = None, folder: Path | None = None
) -> tuple[bytes, tuple[int, int]]:
    """Decode an image file to upright, shrunk RGB on a white background, and encode it again.

    A JPEG is encoded as JPEG of high quality, any other format as lossless WebP. Metadata is
    dropped, so that within a format equal pixels give equal bytes. Of an animation, only the first
    frame is used. An aspect ratio above :data:`MAX_ASPECT` is padded with white.

    Args:
        file: An image in one of :data:`mllm_msr.images.formats.FORMATS`, or a zip archive.
        image_side: Maximum length of the longer side, in pixels.
        member: The image's name in the archive.
        folder: The folder in which the file must lie, links resolved; None allows any file.

    Returns:
        The encoded bytes, and (width, height) in pixels.

    Raises:
        DataError: The file is missing, not a regular file, empty, damaged, of another format, or
            has more than :data:`MAX_PIXELS` pixels.
    """
    where = shorten(f"{file}, {member}" if member else str(file))
    try:
        with _open_source(file, member, folder) as stream, _open_image(stream) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise DataError(
                    expected=f"an image of at most {MAX_PIXELS:,} pixels",
                    got=f"{opened.width:,} x {opened.height:,}",
                    where=where,
                    fix=f"shrink it, {OR_ALLOW_FAILURES}",
                )
            lossy = opened.format in ("JPEG", "MPO")  # MPO: the JPEGs of some cameras
            image = _normalise(opened, image_side)
    except UNREADABLE as error:
        fix = error.fix if isinstance(error, UnreadableFileError) else "replace it"
        raise DataError(
            expected=f"a valid image ({', '.join(FORMATS)})",
            got=_describe_error(error),
            where=where,
            fix=f"{fix}, {OR_ALLOW_FAILURES}",
        ) from error
    return _encode_image(image, lossy), image.size


def decode(image: bytes) -> Image.Image:
    """Decode the bytes of a row of ``images.parquet`` to an RGB image."""
    return Image.open(io.BytesIO(image), formats=STORED).convert("RGB")


def _encode_all(images: Iterable[ImageLocation], image_side: int) -> Iterator[ImageRow | DataError]:
    """Encode images in order on all available CPUs; Pillow releases the GIL while it works."""

    def encode_row(source: ImageLocation) -> ImageRow | DataError:
        try:
            image, (width, height) = encode(source.file, image_side, source.member, source.folder)
        except DataError as error:
            return error
        digest = hashlib.sha256(image).hexdigest()
        return ImageRow(item=source.item, image=image, width=width, height=height, digest=digest)

    threads = available_cpus()
    tasks = iter(images)
    with ThreadPoolExecutor(threads) as pool:
        queue = deque(
            pool.submit(encode_row, task) for task in islice(tasks, QUEUED_PER_THREAD * threads)
        )
        while queue:
            row = queue.popleft().result()
            queue.extend(pool.submit(encode_row, task) for task in islice(tasks, 1))
            yield row


def _open_source(file: Path, member: str | None, folder: Path | None) -> IO[bytes]:
    """Open a file, or read a member of an archive."""
    if DATA_URI.search(str(file)):
        raise UnreadableFileError("a data: URI", "write the image to a file and name its path")
    return _read_member(file, member, folder) if member else open_regular(file, folder)


def _open_image(stream: IO[bytes]) -> Image.Image:
    """Read an image's header; the error of another file names its format."""
    head = stream.read(HEAD)
    stream.seek(0)
    if not head:
        raise UnreadableFileError("an empty file")
    try:
        return Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError as error:
        found = find_format(head)
        if found in FORMATS:
            raise UnreadableFileError(f"a damaged {found} file") from error
        raise UnreadableFileError(found or "bytes of no known format") from error


def _read_member(file: Path, member: str, folder: Path | None) -> IO[bytes]:
    """Read a member of an archive, within :data:`MAX_BYTES`.

    Raises:
        UnreadableFileError: The member is too large or cannot be read.
    """
    archive = _open_archive(file, folder)
    try:
        info = archive.getinfo(member)
    except KeyError as error:
        raise UnreadableFileError("no such file") from error
    if info.is_dir():
        raise UnreadableFileError("a folder")
    if info.flag_bits & ENCRYPTED:
        raise UnreadableFileError("an encrypted member", UNPACK)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = METHODS.get(info.compress_type, f"method {info.compress_type}")
        raise UnreadableFileError(f"a member compressed with {method}", UNPACK)
    if info.file_size > MAX_BYTES:
        raise UnreadableFileError(f"more than {MAX_BYTES:,} bytes")
    try:
        with archive.open(info) as stream:  # the size that the archive declares may be wrong
            return io.BytesIO(stream.read(MAX_BYTES + 1))
    except BROKEN_ZIP as error:
        raise UnreadableFileError("a damaged member", "download the archive again") from error


@functools.lru_cache(maxsize=16)
def _open_archive(file: Path, folder: Path | None) -> zipfile.ZipFile:
    """Open an archive and cache it: opening reads the names of all members, often 20,000."""
    stream = open_regular(file, folder)
    try:
        archive = open_zip(stream)
    except UnreadableFileError:
        stream.close()
        raise
    weakref.finalize(archive, stream.close)  # once other archives have replaced it in the cache
    return archive


def _normalise(image: Image.Image, image_side: int) -> Image.Image:
    """Return any image as a small upright RGB image without metadata."""
    _choose_scale(image, image_side)
    with DECODED.take(image.width * image.height):
        opaque = _on_white(_eight_bits(ImageOps.exif_transpose(image)))
        opaque.thumbnail((image_side, image_side), Image.Resampling.LANCZOS)
        return _bound_aspect(opaque)


def _choose_scale(image: Image.Image, image_side: int) -> None:
    """Have a JPEG decoded at a lower resolution, see :data:`MIN_DRAFT_RATIO`.

    Other formats are decoded in full.
    """
    needed = MIN_DRAFT_RATIO * image_side / max(image.size)  # share of the pixels of a side
    if needed < 1:
        image.draft(None, (math.ceil(needed * image.width), math.ceil(needed * image.height)))


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image as RGB, its transparent parts on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return canvas


def _bound_aspect(image: Image.Image) -> Image.Image:
    """Pad an image with white to :data:`MAX_ASPECT`, which some models require."""
    least = math.ceil(max(image.size) / MAX_ASPECT)
    if min(image.size) >= least:
        return image
    size = (max(image.width, least), max(image.height, least))
    canvas = Image.new("RGB", size, "white")
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey levels to 8 bits; Pillow would clip them at 255."""
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda level: level / 256).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}")
    return image


def _encode_image(image: Image.Image, lossy: bool) -> bytes:
    """Return an image's bytes for the table, as JPEG if ``lossy``, else as WebP."""
    buffer = io.BytesIO()
    if lossy:
        # A JPEG stored losslessly would be more than twice as large. Chroma is not subsampled,
        # because covers have coloured letters.
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        image.save(buffer, "WEBP", lossless=True, method=1)
    return buffer.getvalue()


def _describe_error(error: Exception) -> str:
    """Return what is wrong with a file, without its path."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels"
    return str(error) or type(error).__name__
