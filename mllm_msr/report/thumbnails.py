"""Images small enough to travel inside a page."""

import base64
import io

from mllm_msr.images.gallery import Gallery

QUALITY = 80  # of WebP, 0..100; images that need not shrink are kept lossless


def make_thumbnail(gallery: Gallery, item: str, side: int) -> str | None:
    """Give an item's image as a data URI, or None where it has none.

    Args:
        gallery: The catalogue's images.
        item: Whose image.
        side: Longer side at most, in pixels.
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
    """Write a file's bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
