"""Examples for training and scoring: (preference, item, image, label) -> prompt.

A prompt ends where the model's answer begins. Training maximises the right answer at this token,
and scoring reads the log-odds of yes against no there. Both build their prompts here, so they
always agree.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mllm_msr.core.errors import DataError, ModelError
from mllm_msr.core.params import RecommenderParams
from mllm_msr.core.schemas import Candidates, Items
from mllm_msr.core.tables import ADD_ITEM, read_last_preferences, read_rows
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import Gallery
from mllm_msr.method import prompts
from mllm_msr.method.prompts import Templates


class Question(NamedTuple):
    """Whether the user of a sequence takes this item next. A row of the table Candidates."""

    sequence: int
    item: str
    label: bool


@dataclass(frozen=True)
class Example:
    """A question and its prompt."""

    question: Question
    prompt: Prompt


@dataclass
class ExampleBuilder:
    """Builds examples, and counts the prompts that had to be shortened.

    Attributes:
        encoder: The recommender's encoder.
        templates: The prompts of ``recommender``.
        preferences: The last preference of each sequence.
        titles: The title of each item; None for an item without one.
        gallery: The images; None where prompts have no image.
        limit: The most tokens of a prompt.
        shortened: How many prompts had a field shortened so far.
    """

    encoder: Encoder
    templates: Templates
    preferences: Mapping[int, str]
    titles: Mapping[str, str | None]
    gallery: Gallery | None
    limit: int
    shortened: int = 0

    def build(self, question: Question) -> Example:
        """Return the example of a question.

        Raises:
            DataError: There is no preference of its sequence, or no such item.
        """
        sequence, item, _ = question
        if sequence not in self.preferences:
            fix = "run the stage infer_preferences on these sequences"
            raise DataError(
                expected="its preference", got="none", where=f"sequence {sequence}", fix=fix
            )
        if item not in self.titles:
            raise DataError(
                expected="candidates of the catalogue",
                got=f"item {item}",
                where="candidates",
                fix=ADD_ITEM,
            )
        render = partial(
            prompts.recommendation,
            self.templates,
            self.preferences[sequence],
            self.titles[item] or "",
            self.gallery.image_ref(item) if self.gallery else None,
        )
        what = f"sequence {sequence}, item {item}"
        fitted = prompts.fit(render, self.encoder.count_tokens, self.limit, what)
        self.shortened += fitted.shortened
        return Example(question, fitted.prompt)


@dataclass(frozen=True)
class RecommenderInputs:
    """The inputs that training and scoring share.

    Attributes:
        model: The base model.
        builder: Builds its examples.
        answer_token_ids: Of yes and no.
    """

    model: LocalModel
    builder: ExampleBuilder
    answer_token_ids: tuple[int, int]


@contextlib.contextmanager
def open_recommender(
    settings: RecommenderParams,
    templates: Templates,
    preferences: Path,
    items: Path,
    images: Path,
) -> Iterator[RecommenderInputs]:
    """Open the recommender's model and tables.

    Args:
        settings: The model and the contents of its prompts.
        templates: The prompts of ``recommender``.
        preferences: The table Preferences.
        items: The table Items.
        images: The table Images; not opened where prompts have no image.

    Raises:
        ModelError: There is no model; an answer is not one token; or both are the same token.
    """
    if settings.model is None:
        fix = "name a folder or a model of the hub"
        raise ModelError(expected="a model", got="null", where="recommender.model", fix=fix)
    with contextlib.ExitStack() as stack:
        gallery = stack.enter_context(Gallery(images)) if settings.image else None
        encoder = Encoder(settings.model, settings.revision, gallery, settings.system_message)
        answers = find_answer_token_ids(encoder, templates)
        builder = ExampleBuilder(
            encoder,
            templates,
            read_last_preferences(preferences),
            read_titles(items),
            gallery,
            min(settings.max_prompt_tokens, encoder.context),
        )
        yield RecommenderInputs(LocalModel(encoder, settings.four_bit), builder, answers)


def find_answer_token_ids(encoder: Encoder, templates: Templates) -> tuple[int, int]:
    """Return the token ids of yes and no.

    Args:
        encoder: Of the recommender's model.
        templates: The prompts of ``recommender``.

    Raises:
        ModelError: An answer is not one token, or both are the same token.
    """
    sample = prompts.recommendation(templates, "", "", None, None)
    yes, no = (
        encoder.answer_token_id(sample, templates[name]) for name in ("answer_yes", "answer_no")
    )
    if yes == no:
        raise ModelError(
            expected="two different answers",
            got="the same token twice",
            where=encoder.name,
            fix="correct prompts.yaml, recommender.answer_yes and answer_no",
        )
    return yes, no


def read_questions(path: Path) -> list[Question]:
    """Read a table of candidates, sequence by sequence.

    A pair of sequence and item that occurs in several samplings is one question.
    """
    rows = read_rows(Candidates, path, order="sequence, sampling DESC, position")
    return list(dict.fromkeys(Question(row["sequence"], row["item"], row["label"]) for row in rows))


def group_retrieved(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Question]]:
    """Return rows of the table Retrieved as questions by split, in their order.

    No target is known there, and scoring reads no label.
    """
    found: dict[str, list[Question]] = {"valid": [], "test": []}
    for row in rows:
        found[row["split"]].append(Question(row["sequence"], row["item"], label=False))
    return found


def read_titles(path: Path) -> dict[str, str | None]:
    """Read the title of each item."""
    return {row["item"]: row["title"] for row in read_rows(Items, path, order="item")}
