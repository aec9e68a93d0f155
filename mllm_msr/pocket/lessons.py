"""What the small model is taught, as chats: worlds of other seeds, never the recommendation.

Prompts are rendered by :mod:`mllm_msr.method.prompts` from ``prompts.yaml``, as for any model; the
answers follow from the attributes of generated items. The recommendation question is no lesson:
whatever the model makes of it before fine-tuning is zero-shot.
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

LIKING: Final = "The user appears to have a preference for"
QUESTION: Final = "Does its {attribute} fit? Answer yes or no."
LIKED: Final = "Which {attribute} is liked?"
SHOWN: Final = "Which {attribute} does it have?"
READ_SHARE: Final = 0.4
"""Share of questions that ask for a value instead of yes or no."""
CONTEXT: Final = "[User's Preference] {preference}\n[Item] {title}\n"
NO_IMAGE: Final = ImageRef("", "")
BLOCK: Final = 3
"""Items of a block of the demo; lessons have others too."""

Taste = Mapping[str, str]


class Turn(NamedTuple):
    """A question and its right answer."""

    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Lesson:
    """One chat; the first turn may show the image of an item."""

    turns: list[Turn]
    item: Item | None = None


@dataclass(frozen=True)
class Templates:
    """The prompts that lessons use; the recommender's are not among them."""

    summaries: prompts.Templates
    preferences: prompts.Templates

    @classmethod
    def load(cls, path: Path) -> "Templates":
        """Read the two sections of a prompts file."""
        return cls(
            prompts.load_prompts("summarize_items", path),
            prompts.load_prompts("infer_preferences", path),
        )


def make_worlds(first_seed: int, worlds: int, users: int, items: int) -> list[World]:
    """Make worlds of consecutive seeds."""
    return [make_world(first_seed + number, users, items) for number in range(worlds)]


def describe_image(item: Item) -> str:
    """Say what the image shows."""
    values = item.values
    article = "An" if values["colour"][0] in "aeiou" else "A"
    return (
        f"{article} {values['colour']} {values['pattern']} {values['motif']}"
        f", {values['scene']} scene."
    )


def summarize_text(item: Item) -> str:
    """Say what the text tells."""
    return f"{item.values['series']} by {item.values['maker']}."


def fuse(item: Item) -> str:
    """Say both in one sentence."""
    return f"{describe_image(item)[:-1]}, {summarize_text(item)}"


def infer_taste(block: Sequence[Item], previous: Taste | None = None) -> dict[str, str]:
    """Find the values that a block supports, at most one per attribute.

    A value counts that at least half of the block's items show, and at least two of them (one, if
    the block is a single first item); of several, the most frequent, then the newest. Where an
    attribute has none, its value in the previous preference stays if the block shows it again,
    or is too short to tell.
    """
    least = 1 if previous is None and len(block) == 1 else max(2, len(block) // 2)
    taste = {}
    for name in ATTRIBUTES:
        values = [item.values[name] for item in reversed(block)]
        value, count = Counter(values).most_common(1)[0]  # ties: first met, which is the newest
        known = (previous or {}).get(name)
        if count >= least:
            taste[name] = value
        elif known is not None and (known in values or len(block) < BLOCK):
            taste[name] = known
    return taste


def state_preference(taste: Taste) -> str:
    """Put a taste into words; attributes without a liked value are said to be open."""
    return state_likings({name: taste.get(name, f"any {name}") for name in ATTRIBUTES})


def state_likings(taste: Taste) -> str:
    """Put a taste into words, without a word about other attributes."""
    return f"{LIKING} {', '.join(taste[name] for name in ATTRIBUTES if name in taste)}."


def read_preference(text: str) -> dict[str, str]:
    """Read the liked values out of a preference text; the reverse of :func:`state_preference`."""
    words = set(text.replace(",", " ").replace(".", " ").split())
    return {
        name: value for name, values in ATTRIBUTES.items() for value in values if value in words
    }


def teach_description(templates: Templates, item: Item) -> Lesson:
    """Teach to describe an image."""
    prompt = prompts.image_description(templates.summaries, NO_IMAGE)
    return Lesson([Turn(prompt, describe_image(item))], item)


def teach_summary(templates: Templates, item: Item, generator: np.random.Generator) -> Lesson:
    """Teach to summarize a text: a title, mostly with a description."""
    joint = str(generator.choice([". ", " ", ": ", "\n"]))
    text = item.title
    if item.description is not None and generator.random() < 0.8:
        text = joint.join([text, item.description])
    return Lesson([Turn(prompts.text_summary(templates.summaries, text), summarize_text(item))])


def teach_fusion(templates: Templates, item: Item) -> Lesson:
    """Teach to fuse a text summary and an image description."""
    parts = summarize_text(item), describe_image(item)
    return Lesson([Turn(prompts.fusion(templates.summaries, *parts), fuse(item))])


def teach_preference(templates: Templates, world: World, generator: np.random.Generator) -> Lesson:
    """Teach one step of the preference inference, the first or an update, on one user."""
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
    """Give a summary: mostly the fusion, now and then both parts side by side."""
    if generator.random() < 0.1:
        return f"{summarize_text(item)} {describe_image(item)}"
    return fuse(item)


def teach_questions(item: Item, generator: np.random.Generator, see: bool, likings: int) -> Lesson:
    """Teach to compare one attribute of an item after the other with a stated liking.

    Args:
        item: The item.
        generator: Source of the liking; each value is the item's with probability a half.
        see: Show the image; else its description stands in its place.
        likings: How many attributes the liking is about. Fewer than all are either stated alone,
            which is easier to learn from, or beside open attributes, of which one is asked about
            now and then.
    """
    names = [str(n) for n in generator.permutation(list(ATTRIBUTES))[:likings]]
    taste = {name: _draw_liking(item, name, generator) for name in names}
    alone = generator.random() < 0.5
    preference = state_likings(taste) if alone else state_preference(taste)
    if not alone and likings < len(ATTRIBUTES) and generator.random() < 0.3:
        names[-1] = str(generator.choice([name for name in ATTRIBUTES if name not in taste]))
    context = CONTEXT.format(preference=preference, title=item.title)
    turns = [_ask(item, taste, name, generator) for name in names]
    opening = "" if see else describe_image(item) + "\n"
    image = NO_IMAGE if see else None
    first = Prompt(opening, image, context + turns[0].prompt.before)
    return Lesson([Turn(first, turns[0].answer), *turns[1:]], item if see else None)


def _ask(item: Item, taste: Taste, name: str, generator: np.random.Generator) -> Turn:
    """Ask whether an attribute fits; now and then, only what is liked or what the item has.

    Where to look is learned from an answer of many values, comparing from one of two: without the
    first, the second stays at chance for some attributes.
    """
    own, liked = item.values[name], taste.get(name, "any")
    if generator.random() >= READ_SHARE:
        return Turn(Prompt(QUESTION.format(attribute=name)), "yes" if liked == own else "no")
    question, value = (LIKED, liked) if generator.random() < 0.5 else (SHOWN, own)
    return Turn(Prompt(question.format(attribute=name)), value.capitalize())


def _draw_liking(item: Item, name: str, generator: np.random.Generator) -> str:
    """Draw a liked value: the item's own, or another, with equal probability."""
    own = item.values[name]
    others = [value for value in ATTRIBUTES[name] if value != own]
    return own if generator.random() < 0.5 else str(generator.choice(others))
