"""Prompts: text, or text around one image."""

from dataclasses import dataclass

from mllm_msr.images.gallery import ImageRef


@dataclass(frozen=True)
class Prompt:
    """One user turn: text, or text around one image.

    Attributes:
        before: Text before the image; the whole text where there is no image.
        image: The image, or None.
        after: Text after the image.
    """

    before: str
    image: ImageRef | None = None
    after: str = ""

    def __str__(self) -> str:
        """Return the prompt in readable form, for error messages and logs."""
        image = f"<image of {self.image.item}>" if self.image else ""
        return "\n".join(part for part in (self.before, image, self.after) if part)
