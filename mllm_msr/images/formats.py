"""Detection of a file's format by its first bytes; names and content types are often wrong."""

import codecs

FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "AVIF",
)  # readable, by Pillow's names
HEAD = 1_024  # bytes that are enough to detect a format
# First bytes of a file, and its format; the first match counts.
SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS", "PSD"),
    (b"\0\0\x01\0", "ICO"),
    (b"%!PS", "PostScript"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"\x1a\x45\xdf\xa3", "WebM"),
)
# Brands of an ISO base media file (ISO/IEC 14496-12); any other is a video.
AVIF = (b"avif", b"avis")
HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def find_format(head: bytes) -> str | None:
    """Return the format of a file by its first bytes, or None if it is unknown.

    Args:
        head: At least 32 bytes, or the whole file; text formats need :data:`HEAD` bytes.
    """
    if head.startswith(b"RIFF"):
        return {b"WEBP": "WEBP"}.get(head[8:12], "RIFF")
    if head[4:8] == b"ftyp":
        # The major brand, the minor version, and the compatible brands.
        box = head[8 : max(12, min(len(head), int.from_bytes(head[:4], "big")))]
        brands = {box[start : start + 4] for start in range(0, len(box), 4)}
        if brands.intersection(AVIF):
            return "AVIF"
        return "HEIC" if brands.intersection(HEIC) else "MP4"
    for signature, name in SIGNATURES:
        if head.startswith(signature):
            return name
    return _find_text_format(head[:HEAD])


def _find_text_format(head: bytes) -> str | None:
    """Return the text format of a file's first bytes, or None if they are no text."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in text:
        return "SVG"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in text:
        return "HTML"
    if text.startswith(b"<?xml"):
        return "XML"
    if text.startswith(b"version https://git-lfs.github.com/"):
        return "a Git LFS pointer"
    try:
        characters = codecs.getincrementaldecoder("utf-8")().decode(text)  # may end inside one
    except UnicodeDecodeError:
        return None
    return "text" if characters and "\0" not in characters else None
