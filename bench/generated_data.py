"""Tables of the model stages, made from a seed in the form of MicroLens: titles, images, histories.

Nothing is read but the pocket model's tokenizer: texts consist of its whole words, so that their
length in tokens is known.
"""

import hashlib
import io
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageChops
from transformers import PreTrainedTokenizerBase

from bench.images import QUALITY, draw_photograph
from bench.shapes import whole_words
from mllm_msr.core import schemas
from mllm_msr.core.tables import write_rows

SEED = 2026
DRAWN = 4  # images; each item has one of them, shifted by another number of pixels
SIDE = 672  # pixels of an image's longer side, as the preset microlens_paper has it
TITLE_TOKENS = 20


class Sizes(NamedTuple):
    """How much is generated.

    Attributes:
        items: Of the catalogue.
        histories: How many.
        train: Training sequences, with one negative each.
        test: Test sequences.
        candidates: Of a test sequence.
        train_items: The items that training pairs are drawn from.
        test_items: The same for test pairs.
        text_tokens: Of each summary and preference.
    """

    items: int
    histories: int
    train: int
    test: int
    candidates: int
    train_items: int
    test_items: int
    text_tokens: int


def write_tables(
    data: Path, sizes: Sizes, tokenizer: PreTrainedTokenizerBase, history: int
) -> None:
    """Write the tables that the model stages read.

    Args:
        data: Folder of the stages' outputs.
        sizes: How much.
        tokenizer: Of the models.
        history: Items of a history.
    """
    generator = random.Random(SEED)  # noqa: S311  # no cryptography
    words = [word[1:] for word in whole_words(tokenizer)]

    def write_text(tokens: int) -> str:
        return " ".join(generator.choices(words, k=tokens))

    items = [f"{number:05}" for number in range(sizes.items)]
    filtered = data / "filter_sequences"
    titles = [{"item": i, "title": write_text(TITLE_TOKENS), "description": None} for i in items]
    write_rows(schemas.Items, titles, filtered / "items.parquet")
    write_rows(schemas.Images, draw_images(items), data / "fetch_images/images.parquet")
    summaries = [
        {"item": i, "text_summary": None, "image_description": None}
        | {"summary": write_text(sizes.text_tokens)}
        for i in items
    ]
    write_rows(schemas.Summaries, summaries, data / "summarize_items/summaries.parquet")
    histories = [
        {"sequence": sequence, "position": position, "item": item}
        for sequence in range(sizes.histories)
        for position, item in enumerate(generator.sample(items, history), start=1)
    ]
    write_rows(schemas.Histories, histories, filtered / "histories.parquet")
    asked = max(sizes.train, sizes.test)
    preferences = [
        {"sequence": s, "block": 1, "items": history, "preference": write_text(sizes.text_tokens)}
        for s in range(asked)
    ]
    write_rows(schemas.Preferences, preferences, data / "infer_preferences/preferences.parquet")
    train = draw_candidates(generator, items[: sizes.train_items], sizes.train, 2)
    write_rows(schemas.Candidates, train, filtered / "train_candidates.parquet")
    test = draw_candidates(generator, items[: sizes.test_items], sizes.test, sizes.candidates)
    write_rows(schemas.Candidates, test, filtered / "test_candidates.parquet")


def draw_candidates(
    generator: random.Random, items: Sequence[str], sequences: int, candidates: int
) -> Iterable[dict[str, Any]]:
    """Yield rows of the table Candidates: a target and different negatives for each sequence."""
    for sequence in range(sequences):
        for position, item in enumerate(generator.sample(items, candidates)):
            yield {
                "sampling": "uniform",
                "sequence": sequence,
                "position": position,
                "item": item,
                "label": position == 0,
            }


def draw_images(items: Sequence[str]) -> Iterable[dict[str, Any]]:
    """Yield rows of the table Images: every second image is square, the others upright."""
    drawn = [draw_photograph(seed) for seed in range(min(DRAWN, len(items)))]
    for number, item in enumerate(items):
        image = ImageChops.offset(drawn[number % len(drawn)], number)
        if number % 2:
            top = (image.height - image.width) // 2
            image = image.crop((0, top, image.width, top + image.width))
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        content = file.getvalue()
        yield {
            "item": item,
            "image": content,
            "width": image.width,
            "height": image.height,
            "digest": hashlib.sha256(content).hexdigest(),
        }
