"""The pocket model's lessons: correct answers, other worlds, no recommendation question."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

import mllm_msr
from mllm_msr.pocket import lessons
from mllm_msr.pocket.measure import FRESH_SEED
from mllm_msr.pocket.train import FIRST_SEED, WORLDS
from mllm_msr.pocket.world import ATTRIBUTES, Item, World, make_world

ROOT = Path(mllm_msr.__file__).parents[1]


@pytest.fixture(scope="module")
def templates() -> lessons.Templates:
    return lessons.Templates.load(ROOT / "prompts.yaml")


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(FIRST_SEED, users=20, items=60)


def draw_lessons(templates: lessons.Templates, world: World) -> list[lessons.Lesson]:
    generator = np.random.default_rng(0)
    chats = []
    for item in world.items:
        chats += [
            lessons.teach_description(templates, item),
            lessons.teach_summary(templates, item, generator),
            lessons.teach_fusion(templates, item),
            lessons.teach_preference(templates, world, generator),
            lessons.teach_questions(item, generator, True, 4),
            lessons.teach_questions(item, generator, False, 6),
        ]
    return chats


def make_item(**values: str) -> Item:
    first = {name: of[0] for name, of in ATTRIBUTES.items()}
    return Item("i", first | values, "a title", None, 0)


def test_training_worlds_differ_from_the_demo_and_the_measured_world() -> None:
    demo = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["pocket_world"]
    taught = range(FIRST_SEED, FIRST_SEED + WORLDS)
    assert demo["seed"] not in taught
    assert FRESH_SEED not in taught


def test_no_lesson_asks_the_recommendation_question(
    templates: lessons.Templates, world: World
) -> None:
    asked = yaml.safe_load((ROOT / "prompts.yaml").read_text(encoding="utf-8"))["recommender"]
    sentence = asked["question"].splitlines()[-1]
    assert "next opportunity" in sentence
    for chat in draw_lessons(templates, world):
        for turn in chat.turns:
            assert sentence not in str(turn.prompt)
            assert "opportunity" not in str(turn.prompt)


def ask_about(world: World) -> list[tuple[lessons.Lesson, lessons.Turn]]:
    generator = np.random.default_rng(1)
    chats = [lessons.teach_questions(i, generator, True, 4) for i in world.items for _ in range(5)]
    return [(chat, turn) for chat in chats for turn in chat.turns]


def test_half_of_the_comparisons_are_answered_yes(world: World) -> None:
    answers = [t.answer for _, t in ask_about(world) if "yes or no" in str(t.prompt)]
    assert set(answers) == {"yes", "no"}
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_other_questions_ask_for_a_value(world: World) -> None:
    said = [(chat, turn) for chat, turn in ask_about(world) if "Which" in str(turn.prompt)]
    assert said
    for chat, turn in said:
        assert chat.item is not None
        name, kind = re.findall(r"Which (\w+) (is liked|does it have)\?", str(turn.prompt))[0]
        stated = str(chat.turns[0].prompt).splitlines()
        liking = next(line for line in stated if line.startswith("[User's Preference]"))
        if kind == "does it have":
            assert turn.answer == chat.item.values[name].capitalize()
        elif turn.answer == "Any":
            assert f"any {name}" in liking
        else:
            assert turn.answer.lower() in liking.lower()


def test_a_preference_text_names_the_liked_values_and_any_for_the_rest() -> None:
    taste = {"colour": "red", "maker": "Aldo"}
    text = lessons.state_preference(taste)
    assert text == (
        "The user appears to have a preference for "
        "red, any pattern, any motif, any scene, any series, Aldo."
    )
    assert lessons.read_preference(text) == taste


def test_a_value_of_two_in_three_items_is_liked() -> None:
    block = [make_item(colour="red"), make_item(colour="blue"), make_item(colour="red")]
    assert lessons.infer_taste(block)["colour"] == "red"


def test_an_attribute_without_a_repeated_value_stays_open() -> None:
    block = [make_item(colour="red"), make_item(colour="blue"), make_item(colour="pink")]
    assert "colour" not in lessons.infer_taste(block)


def test_a_known_value_stays_only_if_the_block_shows_it_again() -> None:
    block = [make_item(colour="red"), make_item(colour="blue"), make_item(colour="pink")]
    assert lessons.infer_taste(block, {"colour": "blue"})["colour"] == "blue"
    assert "colour" not in lessons.infer_taste(block, {"colour": "green"})


def test_a_new_repeated_value_replaces_the_known_one() -> None:
    block = [make_item(colour="red"), make_item(colour="blue"), make_item(colour="red")]
    assert lessons.infer_taste(block, {"colour": "blue"})["colour"] == "red"


def test_a_short_block_keeps_known_values() -> None:
    block = [make_item(colour="red")]
    assert lessons.infer_taste(block, {"colour": "blue"})["colour"] == "blue"
