"""Lessons: the chats on which the pocket model is trained.

Prompts are rendered by :mod:`mllm_msr.method.prompts` from ``prompts.yaml``, as for any model; the
answers follow from the attributes of generated items. The lessons come from worlds with other seeds
than the demo, and the recommendation question is not among them: before fine-tuning, the model
answers it zero-shot.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import ImageRef
from mllm_msr.method import prompts
from mllm_msr.pocket.world import ATTRIBUTES, Item, World, make_world

PREFERENCE_START: Final = "The user appears to have a preference for"
FIT_QUESTION: Final = "Does its {attribute} fit? Answer yes or no."
LIKED_VALUE_QUESTION: Final = "Which {attribute} is liked?"
ITEM_VALUE_QUESTION: Final = "Which {attribute} does it have?"
VALUE_QUESTION_SHARE: Final = 0.4
"""Share of questions whose answer is a value instead of yes or no."""
CONTEXT: Final = "[User's Preference] {preference}\n[Item] {title}\n"
NO_IMAGE: Final = ImageRef("", "")
BLOCK: Final = 3
"""Items per block in the demo; lessons have other block sizes too."""

Taste = Mapping[str, str]


class Turn(NamedTuple):
    """A question and its correct answer."""

    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Lesson:
    """A chat; its first turn may show an item's image."""

    turns: list[Turn]
    item: Item | None = None


@dataclass(frozen=True)
class Templates:
    """The prompt templates of the lessons; the recommender's are not used."""

    summaries: prompts.Templates
    preferences: prompts.Templates

    @classmethod
    def load(cls, path: Path) -> "Templates":
        """Load the two sections from a prompts file."""
        return cls(
            prompts.load_prompts("summarize_items", path),
            prompts.load_prompts("infer_preferences", path),
        )


def make_worlds(first_seed: int, worlds: int, users: int, items: int) -> list[World]:
    """Generate worlds with consecutive seeds."""
    return [make_world(first_seed + number, users, items) for number in range(worlds)]


def describe_image(item: Item) -> str:
    """Return the correct description of an item's image."""
    values = item.values
    article = "An" if values["colour"][0] in "aeiou" else "A"
    return (
        f"{article} {values['colour']} {values['pattern']} {values['motif']}"
        f", {values['scene']} scene."
    )


def summarize_text(item: Item) -> str:
    """Return the correct summary of an item's text."""
    return f"{item.values['series']} by {item.values['maker']}."


def fuse(item: Item) -> str:
    """Return the correct fusion of description and summary."""
    return f"{describe_image(item)[:-1]}, {summarize_text(item)}"


def infer_taste(block: Sequence[Item], previous: Taste | None = None) -> dict[str, str]:
    """Return the liked values that a block of items supports, at most one per attribute.

    A value is supported if at least half of the block's items, rounded down, have it, and at least
    two (one, if the block is a single first item). Of several, the most frequent is chosen, then
    the most recent. Without a supported value, the one of the previous preference stays if an item
    of the block has it or the block is shorter than :data:`BLOCK`.
    """
    least = 1 if previous is None and len(block) == 1 else max(2, len(block) // 2)
    taste = {}
    for name in ATTRIBUTES:
        values = [item.values[name] for item in reversed(block)]
        value, count = Counter(values).most_common(1)[
            0
        ]  # ties: the first, which is the most recent
        known = (previous or {}).get(name)
        if count >= least:
            taste[name] = value
        elif known is not None and (known in values or len(block) < BLOCK):
            taste[name] = known
    return taste


def state_preference(taste: Taste) -> str:
    """Return a taste as text; an attribute without a liked value is written as "any"."""
    return state_liked_values({name: taste.get(name, f"any {name}") for name in ATTRIBUTES})


def state_liked_values(taste: Taste) -> str:
    """Return the liked values of a taste as text, without the other attributes."""
    return f"{PREFERENCE_START} {', '.join(taste[name] for name in ATTRIBUTES if name in taste)}."


def read_preference(text: str) -> dict[str, str]:
    """Return the liked values in a preference text; the inverse of :func:`state_preference`."""
    words = set(text.replace(",", " ").replace(".", " ").split())
    return {
        name: value for name, values in ATTRIBUTES.items() for value in values if value in words
    }


def teach_description(templates: Templates, item: Item) -> Lesson:
    """Return a lesson that describes an image."""
    prompt = prompts.image_description(templates.summaries, NO_IMAGE)
    return Lesson([Turn(prompt, describe_image(item))], item)


def teach_summary(templates: Templates, item: Item, generator: np.random.Generator) -> Lesson:
    """Return a lesson that summarizes a title, mostly with a description."""
    joint = str(generator.choice([". ", " ", ": ", "\n"]))
    text = item.title
    if item.description is not None and generator.random() < 0.8:
        text = joint.join([text, item.description])
    return Lesson([Turn(prompts.text_summary(templates.summaries, text), summarize_text(item))])


def teach_fusion(templates: Templates, item: Item) -> Lesson:
    """Return a lesson that fuses a text summary and an image description."""
    parts = summarize_text(item), describe_image(item)
    return Lesson([Turn(prompts.fusion(templates.summaries, *parts), fuse(item))])


def teach_preference(templates: Templates, world: World, generator: np.random.Generator) -> Lesson:
    """Return a lesson of one step of recurrent preference inference for a random user."""
    user = world.users[int(generator.integers(len(world.users)))]
    history = [world.items[number] for number in user.items[:-1]]
    size = BLOCK if generator.random() < 0.75 else int(generator.integers(1, 10))
    step = int(generator.integers(-(-len(history) // size)))
    blocks = [history[start : start + size] for start in range(0, len(history), size)]
    previous: dict[str, str] | None = None
    for block in blocks[:step]:
        previous = infer_taste(block, previous)
    prompt = prompts.preference(
        templates.preferences,
        [_summarize(item, generator) for item in blocks[step]],
        None if previous is None else state_preference(previous),
    )
    return Lesson([Turn(prompt, state_preference(infer_taste(blocks[step], previous)))])


def _summarize(item: Item, generator: np.random.Generator) -> str:
    """Return an item's summary: mostly the fusion, sometimes both parts side by side."""
    if generator.random() < 0.1:
        return f"{summarize_text(item)} {describe_image(item)}"
    return fuse(item)


def teach_questions(item: Item, generator: np.random.Generator, see: bool, likings: int) -> Lesson:
    """Return a lesson that compares attributes of an item with a stated preference.

    Args:
        item: The item.
        generator: Random generator of the preference; each liked value is the item's with
            probability 1/2.
        see: Show the image; otherwise its description replaces it.
        likings: Number of attributes with a liked value. The others are either not mentioned, which
            is easier to learn, or written as "any", in which case some questions ask about one.
    """
    names = [str(n) for n in generator.permutation(list(ATTRIBUTES))[:likings]]
    taste = {name: _draw_liked_value(item, name, generator) for name in names}
    alone = generator.random() < 0.5
    preference = state_liked_values(taste) if alone else state_preference(taste)
    if not alone and likings < len(ATTRIBUTES) and generator.random() < 0.3:
        names[-1] = str(generator.choice([name for name in ATTRIBUTES if name not in taste]))
    context = CONTEXT.format(preference=preference, title=item.title)
    turns = [_ask(item, taste, name, generator) for name in names]
    opening = "" if see else describe_image(item) + "\n"
    image = NO_IMAGE if see else None
    first = Prompt(opening, image, context + turns[0].prompt.before)
    return Lesson([Turn(first, turns[0].answer), *turns[1:]], item if see else None)


def _ask(item: Item, taste: Taste, name: str, generator: np.random.Generator) -> Turn:
    """Return a question whether an attribute fits, or one for the liked or the item's value.

    Questions for a value teach the model where an attribute is found; yes and no alone are too weak
    a signal, and comparisons of some attributes would stay at chance.
    """
    own, liked = item.values[name], taste.get(name, "any")
    if generator.random() >= VALUE_QUESTION_SHARE:
        return Turn(Prompt(FIT_QUESTION.format(attribute=name)), "yes" if liked == own else "no")
    question, value = (
        (LIKED_VALUE_QUESTION, liked) if generator.random() < 0.5 else (ITEM_VALUE_QUESTION, own)
    )
    return Turn(Prompt(question.format(attribute=name)), value.capitalize())


def _draw_liked_value(item: Item, name: str, generator: np.random.Generator) -> str:
    """Draw a liked value: the item's own or another, with equal probability."""
    own = item.values[name]
    others = [value for value in ATTRIBUTES[name] if value != own]
    return own if generator.random() < 0.5 else str(generator.choice(others))
