"""Training and scoring have the same examples, built from a candidate and its user."""

from collections.abc import Callable

import pytest
from families import Family
from small_world import CATALOGUE, SmallWorld, recommender_settings

from mllm_msr.core.errors import DataError, ModelError
from mllm_msr.method import prompts
from mllm_msr.method.examples import (
    Question,
    RecommenderInputs,
    open_recommender,
    read_questions,
    read_titles,
)
from mllm_msr.method.prompts import load_prompts

TEMPLATES = load_prompts("recommender")


def test_questions_are_read_sequence_by_sequence_in_their_order(world: SmallWorld) -> None:
    assert read_questions(world.candidates("valid")) == [
        Question(1, "b", False),
        Question(1, "d", False),
        Question(1, "t", True),
    ]


def test_titles_are_read_with_those_that_are_missing(world: SmallWorld) -> None:
    assert read_titles(world.items) == {item: title for item, title, _, _ in CATALOGUE}


@pytest.mark.parametrize("item", ["a", "d", "e", "f", "g"])
def test_an_example_holds_preference_title_and_image(
    recommender: RecommenderInputs, item: str
) -> None:
    builder = recommender.builder
    image_ref = builder.gallery.image_ref(item) if builder.gallery else None
    example = builder.build(Question(1, item, True))
    assert example.prompt == prompts.recommendation(
        TEMPLATES, "The user of 1 likes 2 cups.", builder.titles[item] or "", image_ref, None
    )
    assert (example.prompt.image is not None) == (
        recommender.model.encoder.takes_images and item not in "dg"
    )
    assert builder.shortened == 0


def test_the_label_is_not_in_the_prompt(recommender: RecommenderInputs) -> None:
    build = recommender.builder.build
    assert build(Question(1, "a", True)).prompt == build(Question(1, "a", False)).prompt


def test_the_answers_are_yes_and_no_after_every_prompt(
    recommender: RecommenderInputs, world: SmallWorld
) -> None:
    encoder = recommender.model.encoder
    for question in read_questions(world.candidates("train")):
        prompt = recommender.builder.build(question).prompt
        found = tuple(encoder.answer_token_id(prompt, answer) for answer in ("yes", "no"))
        assert found == recommender.answer_token_ids


def test_a_prompt_that_is_too_long_is_shortened_and_counted(recommender: RecommenderInputs) -> None:
    builder = recommender.builder
    builder.titles = {"a": "Red kettle " * 545}
    example = builder.build(Question(1, "a", True))
    assert builder.shortened == 1
    assert recommender.model.encoder.count_tokens(example.prompt) <= 512
    assert "The user of 1 likes 2 cups." in str(example.prompt)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question(9, "a", True), "sequence 9: expected its preference; got none; run the stage"),
        (Question(1, "zz", True), "got item zz; .*set preprocess.unknown_items to drop or keep"),
    ],
)
def test_a_question_about_what_no_table_has_is_an_error(
    recommender: RecommenderInputs, question: Question, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        recommender.builder.build(question)


def test_a_text_model_asked_to_show_images_is_an_error(
    build: Callable[[str], Family], world: SmallWorld
) -> None:
    settings = recommender_settings(build("llama3").folder, image=True)
    tables = (world.preferences, world.items, world.images)
    with (
        pytest.raises(ModelError, match="takes images; got a text-only model"),
        open_recommender(settings, TEMPLATES, *tables) as opened,
    ):
        opened.builder.build(Question(1, "a", True))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"answer_no": "yes"}, "expected two different answers"),
        ({"answer_no": "certainly not"}, "to be one token after the prompt"),
    ],
)
def test_answers_that_cannot_be_told_apart_are_an_error(
    family: Family, world: SmallWorld, answers: dict[str, str], message: str
) -> None:
    settings = recommender_settings(family.folder, image=False)
    tables = (world.preferences, world.items, world.images)
    with (
        pytest.raises(ModelError, match=message),
        open_recommender(settings, TEMPLATES | answers, *tables),
    ):
        pass
