"""Renders the templates of ``prompts.yaml``; the only place that neutralises catalogue text.

A prompt is one user turn with at most one image. Templates contain no chat markers: the model's own
chat template adds them (``mllm_msr/engines/encoding.py``).
"""

import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mllm_msr.core.errors import ModelError, ParamsError
from mllm_msr.core.params import read_yaml
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import ImageRef

Templates = Mapping[str, str]

IMAGE = "{image}"
BRACES = re.compile(r"\{\{|\}\}|\{image\}")  # double braces are text, also around the word image
# Joiners beside ASCII or at an end; elsewhere Persian, Indic scripts and emoji need them.
JOINERS = re.compile(r"(\A|[\x00-\x7f\s])[\u200c\u200d]+|[\u200c\u200d]+(?=[\x00-\x7f\s]|\Z)")
TEXTS_CACHED = 10_000  # neutralised texts; an item's summary is in many prompts

# The fields of each template; all are required, and others are errors.
FIELDS: dict[str, dict[str, set[str]]] = {
    "summarize_items": {
        "text": {"text"},
        "image": {"image"},
        "fusion": {"text", "image_description"},
    },
    "infer_preferences": {
        "item": {"number", "summary"},
        "first": {"items"},
        "update": {"items", "preference"},
        "titles": {"titles"},
    },
    "recommender": {
        "question": {"image", "preference", "title"},
        "answer_yes": set(),
        "answer_no": set(),
    },
}


class Fitted(NamedTuple):
    """A prompt within its limit, and whether a field had to be shortened."""

    prompt: Prompt
    shortened: bool


def load_prompts(section: str, path: Path = Path("prompts.yaml")) -> dict[str, str]:
    """Read one section of the prompts file; check the templates of all sections.

    Raises:
        ParamsError: The file, section or a template is missing or unknown, or a template lacks a
            field or has an unknown one.
    """
    document = read_yaml(path)
    unknown = sorted(str(name) for name in document if name not in FIELDS)
    if unknown:
        got = f"unknown section {', '.join(unknown)}"
        raise ParamsError(
            expected=f"sections {', '.join(FIELDS)}",
            got=got,
            where=str(path),
            fix="correct or remove it",
        )
    templates = _check_section(document, section, path)
    for other in [name for name in FIELDS if name in document and name != section]:
        _check_section(document, other, path)
    return templates


def _check_section(document: Mapping[str, object], section: str, path: Path) -> dict[str, str]:
    """Check and return the templates of one section of the prompts file."""
    expected = FIELDS[section]
    templates = document.get(section)
    if not isinstance(templates, dict) or set(templates) != set(expected):
        got = ", ".join(map(str, templates)) if isinstance(templates, dict) else str(templates)
        raise ParamsError(
            expected=f"the prompts {', '.join(expected)}",
            got=got,
            where=f"{path}, {section}",
            fix="correct them",
        )
    for name, template in templates.items():
        _check_fields(template, expected[name], f"{path}, {section}.{name}")
    return templates


@functools.lru_cache(TEXTS_CACHED)
def neutralise(text: str) -> str:
    """Make a text from a catalogue or a model harmless inside any chat template.

    Control characters are removed (joiners inside Persian, Indic scripts and emoji stay, since
    no marker has them), whitespace is collapsed, and the characters of special tokens
    and turn markers are replaced by look-alikes: ``<image>``, ``<|im_start|>``, ``</s>``,
    ``[INST]``, ``### Assistant:``, ``USER:``. The function is idempotent.
    """
    text = "".join(
        sign for sign in text if sign.isprintable() or sign.isspace() or sign in "\u200c\u200d"
    )
    text = JOINERS.sub(r"\1", text)
    text = text.translate(str.maketrans("<>[]", "‹›()"))
    text = re.sub(r"#{2,}", "#", text)
    text = re.sub(r"(?i)\b(user|assistant|system|human)\s*:", r"\1 -", text)
    return " ".join(text.split())


def text_summary(templates: Templates, text: str, cap: int | None = None) -> Prompt:
    """Return the prompt for the summary of an item's text (paper, section Method, step 1)."""
    return _render(templates["text"], text=_clean(text, cap))


def image_description(templates: Templates, image_ref: ImageRef) -> Prompt:
    """Return the prompt for the description of an item's image (paper, section Method, step 1)."""
    return _render(templates["image"], image_ref)


def fusion(templates: Templates, text: str, description: str, cap: int | None = None) -> Prompt:
    """Return the prompt that fuses text summary and image description (paper, step 1)."""
    fields = {"text": _clean(text, cap), "image_description": _clean(description, cap)}
    return _render(templates["fusion"], **fields)


def preference(
    templates: Templates,
    summaries: Sequence[str],
    previous: str | None = None,
    cap: int | None = None,
) -> Prompt:
    """Return the prompt for the preference after a block (paper, section Method, step 2).

    Args:
        templates: The prompts of ``infer_preferences``.
        summaries: The block's item summaries, oldest first.
        previous: The preference after the block before, or None for the first block.
        cap: Longest length of a field in characters; None for no limit.
    """
    items = "\n".join(
        templates["item"].format(number=number, summary=_clean(summary, cap))
        for number, summary in enumerate(summaries, start=1)
    )
    if previous is None:
        return _render(templates["first"], items=items)
    return _render(templates["update"], items=items, preference=_clean(previous, cap))


def titles_preference(templates: Templates, titles: Sequence[str]) -> str:
    """Return the titles of a history in place of a preference, without a model."""
    return templates["titles"].format(titles="; ".join(_clean(title, None) for title in titles))


def recommendation(
    templates: Templates, preference: str, title: str, image_ref: ImageRef | None, cap: int | None
) -> Prompt:
    """Return the prompt whether a user takes an item next (paper, section Method, step 3).

    Without an image, the template's ``{image}`` is removed.
    """
    fields = {"preference": _clean(preference, cap), "title": _clean(title, cap)}
    return _render(templates["question"], image_ref, **fields)


def fit(
    render: Callable[[int | None], Prompt], count: Callable[[Prompt], int], limit: int, what: str
) -> Fitted:
    """Shorten a prompt's longest fields until it fits; image and instruction stay complete.

    Args:
        render: Returns the prompt, with fields of at most a number of characters; None: complete.
        count: Counts the tokens of a rendered prompt, with those of its image.
        limit: The most tokens of the prompt.
        what: The subject of the prompt, for the error.

    Raises:
        ModelError: The prompt is too long even with empty fields.
    """
    prompt = render(None)
    if count(prompt) <= limit:
        return Fitted(prompt, shortened=False)
    shortest = count(render(0))
    if shortest > limit:
        raise ModelError(
            expected=f"a prompt of at most {limit} tokens",
            got=f"{shortest} tokens with every field left empty",
            where=what,
            fix="use smaller images, a shorter prompt or a model with a longer context",
        )
    low, high = 0, len(str(prompt))  # the prompt fits at low and does not at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(render(middle)) <= limit else (low, middle)
    return Fitted(render(low), shortened=True)


def _clean(text: str, cap: int | None) -> str:
    return neutralise(text)[:cap].rstrip()


def _render(template: str, image: ImageRef | None = None, /, **fields: str) -> Prompt:
    """Fill in a template; the image replaces ``{image}``."""
    start = next((found.start() for found in BRACES.finditer(template) if found[0] == IMAGE), None)
    before, after = template, ""
    if start is not None:
        before, after = template[:start], template[start + len(IMAGE) :]
    if start is not None and image is None:
        before, after = (before.strip() + "\n" + after.strip()).strip(), ""
    return Prompt(before.strip().format(**fields), image, after.strip().format(**fields))


def _check_fields(template: object, expected: set[str], where: str) -> None:
    if not isinstance(template, str) or not template.strip():
        raise ParamsError(
            expected="a text", got=repr(template), where=where, fix="put it into quotes"
        )
    try:
        found = [
            name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            for _, name, form, conversion in string.Formatter().parse(template)
            if name is not None
        ]
    except ValueError as error:
        raise ParamsError(
            expected="a template", got=str(error), where=where, fix="double braces meant as text"
        ) from error
    if set(found) != expected or found.count("image") > 1:
        names = ", ".join(f"{{{name}}}" for name in sorted(expected)) or "no field"
        got = ", ".join(f"{{{name}}}" for name in sorted(found)) or "none"
        raise ParamsError(expected=names, got=got, where=where, fix="correct the template")
