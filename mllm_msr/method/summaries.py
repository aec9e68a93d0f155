"""Item summaries: text summary, image description, fusion (paper, section Method, step 1)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from tqdm import tqdm

from mllm_msr.core.errors import DataError
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import ImageRef
from mllm_msr.method import prompts
from mllm_msr.method.asking import Asker
from mllm_msr.method.prompts import Fitted, Templates


class Item(NamedTuple):
    """What there is to summarize of an item.

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
    """Join what the catalogue says of an item; None where it says nothing."""
    parts = [prompts.neutralise(part or "").rstrip(". ") for part in (title, description)]
    return ". ".join(part for part in parts if part) or None


def choose_inputs(items: Sequence[Item], text: bool, image: bool, missing: str) -> list[Item]:
    """Leave out what the settings leave out, and refuse items without what they need.

    Args:
        items: The catalogue.
        text: Whether texts are summarized.
        image: Whether images are described.
        missing: ``error`` refuses an item without text or image; ``describe`` takes what is there.

    Raises:
        DataError: An item lacks something and ``missing`` is ``error``.
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


def count_calls(items: Sequence[Item], fusion: str) -> int:
    """Count the prompts that summarizing takes."""
    texts = sum(item.text is not None for item in items)
    images = sum(item.image_ref is not None for item in items)
    both = sum(item.text is not None and item.image_ref is not None for item in items)
    return texts + images + (both if fusion == "model" else 0)


def first_prompt(items: Sequence[Item], templates: Templates) -> Prompt:
    """Give the first prompt that would be put to the model.

    Raises:
        DataError: No item has anything to summarize.
    """
    for item in items:
        if item.text:
            return prompts.text_summary(templates, item.text)
        if item.image_ref:
            return prompts.image_description(templates, item.image_ref)
    fix = "check the source, and summarize_items.text and image"
    raise DataError(
        expected="an item with text or image", got="none", where="the catalogue", fix=fix
    )


class Summarizer:
    """Asks for summaries and counts the prompts it had to shorten.

    Attributes:
        shortened: How many prompts were too long for the model.
    """

    def __init__(self, asker: Asker, templates: Templates, fusion: str) -> None:
        """Take the model, the prompts of ``summarize_items``, and ``model`` or ``concat``."""
        self.shortened = 0
        self._asker, self._templates, self._fusion = asker, templates, fusion

    def summarize(self, items: Sequence[Item]) -> Iterator[Summary]:
        """Summarize items; what an item lacks is left out and never invented."""
        total = count_calls(items, self._fusion)
        with tqdm(total=total, unit="prompt", desc="summarize_items") as progress:
            texts = self._ask({i.item: self._text(i) for i in items if i.text}, progress)
            images = self._ask({i.item: self._image(i) for i in items if i.image_ref}, progress)
            both = [item.item for item in items if item.item in texts and item.item in images]
            fused = self._fuse(both, texts, images, progress)
        for item in (row.item for row in items):
            text, image = texts.get(item), images.get(item)
            yield Summary(item, text, image, fused.get(item, text or image or ""))

    def _fuse(
        self,
        both: Sequence[str],
        texts: Mapping[str, str],
        images: Mapping[str, str],
        progress: "tqdm[Any]",
    ) -> dict[str, str]:
        if self._fusion == "concat":
            return {item: f"{texts[item]} {images[item]}" for item in both}
        wanted = {
            item: self._fit(
                partial(prompts.fusion, self._templates, texts[item], images[item]), item
            )
            for item in both
        }
        return self._ask(wanted, progress)

    def _text(self, item: Item) -> Prompt:
        return self._fit(partial(prompts.text_summary, self._templates, item.text or ""), item.item)

    def _image(self, item: Item) -> Prompt:
        assert item.image_ref is not None
        prompt = prompts.image_description(self._templates, item.image_ref)
        return self._fit(lambda _: prompt, item.item)  # nothing to shorten: it fits, or an error

    def _fit(self, render: Callable[[int | None], Prompt], item: str) -> Prompt:
        fitted: Fitted = prompts.fit(
            render, self._asker.model.encoder.count, self._asker.limit, f"item {item}"
        )
        self.shortened += fitted.shortened
        return fitted.prompt

    def _ask(self, wanted: Mapping[str, Prompt], progress: "tqdm[Any]") -> dict[str, str]:
        answers = self._asker.ask(list(wanted.values()), progress)
        return dict(zip(wanted, answers, strict=True))
