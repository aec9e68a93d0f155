"""Item summaries: text summary, image description, fusion (paper, section Method, step 1)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import Items
from mllm_msr.core.tables import read_rows
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import Gallery, ImageRef
from mllm_msr.method import prompts
from mllm_msr.method.inference import Engine
from mllm_msr.method.prompts import Fitted, Templates


class Item(NamedTuple):
    """The inputs of an item's summary.

    Attributes:
        item: Its id.
        text: Title and description, or None.
        image_ref: Its image, or None.
    """

    item: str
    text: str | None
    image_ref: ImageRef | None


class Summary(NamedTuple):
    """A row of the table Summaries."""

    item: str
    text_summary: str | None
    image_description: str | None
    summary: str


def item_text(title: str | None, description: str | None) -> str | None:
    """Return an item's title and description as one text; None where both are empty."""
    parts = [prompts.neutralise(part or "").rstrip(". ") for part in (title, description)]
    return ". ".join(part for part in parts if part) or None


def read_items(items: Path, gallery: Gallery | None) -> list[Item]:
    """Read the catalogue, with the images of a gallery or without images.

    Raises:
        DataError: The table violates its schema.
    """
    return [
        Item(
            row["item"],
            item_text(row["title"], row["description"]),
            gallery.image_ref(row["item"]) if gallery else None,
        )
        for row in read_rows(Items, items, order="item")
    ]


def choose_inputs(items: Sequence[Item], text: bool, image: bool, missing: str) -> list[Item]:
    """Return the items with the inputs that the settings select.

    Args:
        items: The catalogue.
        text: Whether texts are read.
        image: Whether images are described.
        missing: What happens to an item without text or image: ``error``, or ``describe``, which
            uses the input that it has.

    Raises:
        DataError: An item lacks an input and ``missing`` is ``error``.
    """
    chosen = [Item(i.item, i.text if text else None, i.image_ref if image else None) for i in items]
    if missing == "error":
        for item in chosen:
            lacking = "text" if text and not item.text else "image"
            if (text and not item.text) or (image and not item.image_ref):
                fix = "add it, or set summarize_items.missing to describe"
                raise DataError(
                    expected="text and image",
                    got=f"no {lacking}",
                    where=f"item {item.item}",
                    fix=fix,
                )
    return chosen


def copy_texts(items: Sequence[Item]) -> list[Summary]:
    """Return each item's text as its summary; no model is asked."""
    return [Summary(item.item, item.text, None, item.text or "") for item in items]


class Summarizer:
    """Generates summaries, and counts the prompts that had to be shortened.

    Attributes:
        shortened: How many prompts were too long for the model.
    """

    def __init__(
        self, engine: Engine, templates: Templates, fusion: str, *, raw_text: bool = False
    ) -> None:
        """Take what summaries are generated with.

        Args:
            engine: The model.
            templates: The prompts of ``summarize_items``.
            fusion: ``model`` or ``concat``.
            raw_text: Whether an item's text is taken as its text summary, without a prompt.
        """
        self.shortened = 0
        self._raw_text = raw_text
        self._engine, self._templates, self._fusion = engine, templates, fusion

    def summarize(self, items: Sequence[Item]) -> list[Summary]:
        """Return the summary of each item, from the inputs that it has."""
        raw = {item.item: item.text for item in items if item.text and self._raw_text}
        of_texts = {
            item.item: self._text(item) for item in items if item.text and not self._raw_text
        }
        of_images = {item.item: self._image(item) for item in items if item.image_ref}
        both = [item.item for item in items if item.text and item.image_ref]
        total = len(of_texts) + len(of_images) + (len(both) if self._fusion == "model" else 0)
        with tqdm(total=total, unit="prompt", desc="summarize_items") as progress:
            texts = raw | self._respond(of_texts, progress)
            images = self._respond(of_images, progress)
            fused = self._fuse(both, texts, images, progress)
        summaries = []
        for item in (row.item for row in items):
            text, image = texts.get(item), images.get(item)
            summaries.append(Summary(item, text, image, fused.get(item, text or image or "")))
        return summaries

    def _fuse(
        self,
        both: Sequence[str],
        texts: Mapping[str, str],
        images: Mapping[str, str],
        progress: "tqdm[Any]",
    ) -> dict[str, str]:
        """Return the fusion of text summary and image description, by item."""
        if self._fusion == "concat":
            return {item: f"{texts[item]} {images[item]}" for item in both}
        of_both = {
            item: self._fit(
                partial(prompts.fusion, self._templates, texts[item], images[item]), item
            )
            for item in both
        }
        return self._respond(of_both, progress)

    def _text(self, item: Item) -> Prompt:
        return self._fit(partial(prompts.text_summary, self._templates, item.text or ""), item.item)

    def _image(self, item: Item) -> Prompt:
        assert item.image_ref is not None
        prompt = prompts.image_description(self._templates, item.image_ref)
        return self._fit(lambda _: prompt, item.item)  # there is no field to shorten

    def _fit(self, render: Callable[[int | None], Prompt], item: str) -> Prompt:
        fitted: Fitted = prompts.fit(
            render, self._engine.encoder.count_tokens, self._engine.limit, f"item {item}"
        )
        self.shortened += fitted.shortened
        return fitted.prompt

    def _respond(self, of_items: Mapping[str, Prompt], progress: "tqdm[Any]") -> dict[str, str]:
        """Return the responses to the prompts of items, by item."""
        responses = self._engine.respond(list(of_items.values()), progress)
        return dict(zip(of_items, responses, strict=True))
