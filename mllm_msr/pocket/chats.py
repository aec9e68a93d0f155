"""Encoding of lessons as tensors, with the processor and chat template of the shipped model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlavaProcessor

from mllm_msr.pocket.lessons import Lesson, Turn
from mllm_msr.pocket.model import ASSISTANT, END, IMAGE, IMAGE_TOKENS
from mllm_msr.pocket.world import Item

IGNORED = -100
"""Label of tokens that the loss ignores."""


@dataclass(frozen=True)
class Batch:
    """A batch of encoded lessons.

    Attributes:
        input_ids: ``(lessons, tokens)``.
        attention_mask: ``(lessons, tokens)``; 0 on the padding, which is on the right.
        labels: ``(lessons, tokens)``; the token inside an answer, :data:`IGNORED` elsewhere.
        pixel_values: ``(images, 3, 64, 64)``, or None if no lesson shows an image.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor | None


class Chats:
    """Encoder of lessons, with a cache of drawn images."""

    def __init__(self, processor: LlavaProcessor) -> None:
        """Store the processor.

        Args:
            processor: The model's processor.
        """
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._images: dict[int, torch.Tensor] = {}
        self._assistant = self.tokenizer.convert_tokens_to_ids(ASSISTANT)
        self._end = self.tokenizer.convert_tokens_to_ids(END)

    def encode(self, chats: Sequence[Lesson]) -> Batch:
        """Encode lessons of similar length; all with an image or all without."""
        messages = [[m for turn in chat.turns for m in to_messages(turn)] for chat in chats]
        texts = self.processor.apply_chat_template(messages, tokenize=False)
        texts = [text.replace(IMAGE, IMAGE * IMAGE_TOKENS) for text in texts]
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        items = [chat.item for chat in chats if chat.item is not None]
        return Batch(
            encoded["input_ids"],
            encoded["attention_mask"],
            self._label(encoded["input_ids"]),
            self.encode_images(items) if items else None,
        )

    def open(self, chats: Sequence[Lesson]) -> dict[str, torch.Tensor]:
        """Encode the first question of each lesson for generation, padded on the left."""
        messages = [to_messages(chat.turns[0])[:1] for chat in chats]
        texts = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        images = [[chat.item.draw()] for chat in chats if chat.item is not None]
        inputs = self.processor(
            text=texts, images=images or None, return_tensors="pt", padding=True
        )
        return dict(inputs)

    def encode_images(self, items: Sequence[Item]) -> torch.Tensor:
        """Return the normalized images of items, ``(items, 3, 64, 64)``."""
        new = [item for item in items if item.drawing_seed not in self._images]
        if new:
            images = [item.draw() for item in new]
            pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
            self._images.update(zip((item.drawing_seed for item in new), pixels, strict=True))
        return torch.stack([self._images[item.drawing_seed] for item in items])

    def _label(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return labels: the tokens of each answer with its end token, else :data:`IGNORED`."""
        opened = (input_ids == self._assistant).cumsum(dim=1)
        closed = (input_ids == self._end).cumsum(dim=1)
        # Each turn, of user or assistant, ends with an end token. Inside the n-th answer, n user
        # turns and n - 1 answers have ended: closed = 2 * opened - 1.
        before = closed - (input_ids == self._end).long()
        answer = (before == 2 * opened - 1) & (input_ids != self._assistant)
        return torch.where(answer, input_ids, torch.full_like(input_ids, IGNORED))


def to_messages(turn: Turn) -> list[dict[str, Any]]:
    """Return a turn as chat messages of the user and the assistant."""
    prompt = turn.prompt
    before = [{"type": "text", "text": prompt.before}] if prompt.before else []
    image = [{"type": "image"}] if prompt.image else []
    after = [{"type": "text", "text": prompt.after}] if prompt.after else []
    return [
        {"role": "user", "content": [*before, *image, *after]},
        {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]},
    ]
