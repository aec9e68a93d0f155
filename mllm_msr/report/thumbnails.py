"""Thumbnails as data URIs."""

import base64
import io

from mllm_msr.images.gallery import Gallery

QUALITY = 80  # of WebP, 0..100; images that are not resized are lossless


def make_thumbnail(gallery: Gallery, item: str, side: int) -> str | None:
    """Return an item's image as a data URI, or None if it has none.

    Args:
        gallery: The catalogue's images.
        item: The item.
        side: Greatest length of the longer side, in pixels.
    """
    image_ref = gallery.image_ref(item)
    if image_ref is None:
        return None
    small = max(gallery.size(image_ref)) <= side
    image = gallery.images([image_ref])[0]
    image.thumbnail((side, side))
    content = io.BytesIO()
    image.save(content, "WEBP", lossless=small, quality=QUALITY, method=4)
    return make_data_uri(content.getvalue(), "image/webp")


def make_data_uri(content: bytes, kind: str) -> str:
    """Return a file's bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
