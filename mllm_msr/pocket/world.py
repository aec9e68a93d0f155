"""The embedded world: a catalogue with drawn images, and users whose tastes drift.

Colour, pattern, motif and scene are seen only in an item's image; series and maker are told only
by its title. Each user likes one value of some attributes of both kinds, and at some point of the
history one liking changes; motif and maker mean nothing to anybody. Choices are a softmax over the
catalogue of taste plus log popularity, without repeats; the same seed gives the same world.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from mllm_msr.pocket.drawing import COLOURS, MOTIFS, PATTERNS, SCENES, draw_item

IMAGE_ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = {
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "motif": MOTIFS,
    "scene": SCENES,
}
TEXT_ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = {
    "series": (
        *("Lumen", "Tessera", "Orbit", "Vesper", "Quill"),
        *("Marrow", "Solstice", "Juniper", "Halcyon", "Ember"),
    ),
    "maker": (
        *("Aldo", "Brenna", "Corvo", "Dunmore", "Elska"),
        *("Fenwick", "Galla", "Hobart", "Ivara", "Jorun"),
    ),
}
ATTRIBUTES: Final = IMAGE_ATTRIBUTES | TEXT_ATTRIBUTES

KINDS: Final = (
    *("poster", "notebook", "mug", "puzzle", "lamp", "tray"),
    *("cushion", "bag", "blanket", "clock", "jar", "calendar"),
)
SIZES: Final = ("small", "large", "slim", "sturdy", "folding", "classic")
TITLES: Final = (
    "{series} {kind} by {maker}",
    "{maker} {series} {kind}",
    "{kind} from the {series} series, {maker}",
    "{size} {kind}, {series}, made by {maker}",
    "{maker}: the {size} {series} {kind}",
)
DESCRIPTIONS: Final = (
    "A {size} {kind} of the {series} series.",
    "{maker} makes each {kind} by hand.",
    "Ships flat within three days.",
    "Part of {series}, a limited edition by {maker}.",
    "A fine gift for any home.",
)

LIKABLE_IMAGE_ATTRIBUTES: Final = ("colour", "pattern", "scene")
LIKABLE_TEXT_ATTRIBUTES: Final = ("series",)
"""Tastes are about these. Motif and maker only distract: they are in every image and title, and
nobody minds them, as in a real catalogue not all that is shown matters."""
LIKED_IMAGE_ATTRIBUTES: Final = 2
LIKED_TEXT_ATTRIBUTES: Final = 1
TASTE_STRENGTH: Final = 4.5
"""Log weight that a liked value adds to an item; each user varies it by :data:`STRENGTH_SPREAD`."""
STRENGTH_SPREAD: Final = 0.15
POPULARITY_EXPONENT: Final = 0.45
"""An item's popularity is its random rank to the power of minus this."""
HISTORY_LENGTHS: Final = (7, 14)
"""Fewest and most interactions of a user, the last one included."""
DRIFT_SHARE: Final = (0.2, 0.5)
"""A liking changes after this share of the interactions, drawn uniformly."""
UNDESCRIBED_SHARE: Final = 0.02
FIRST_TIMESTAMP: Final = 1_700_000_000_000  # ms since 1970
DAY: Final = 86_400_000  # ms


@dataclass(frozen=True)
class Item:
    """One item of the catalogue.

    Attributes:
        item: Its id.
        values: The value of each of :data:`ATTRIBUTES`, by the attribute's name.
        title: Tells the series and the maker.
        description: May repeat them; ``None`` where the publisher left it out.
        drawing_seed: Seed of position, size and shades of its image.
    """

    item: str
    values: dict[str, str]
    title: str
    description: str | None
    drawing_seed: int

    def draw(self) -> Image.Image:
        """Draw the item's image, 64 x 64 pixels RGB."""
        image_values = {name: self.values[name] for name in IMAGE_ATTRIBUTES}
        return draw_item(**image_values, generator=np.random.default_rng(self.drawing_seed))


@dataclass(frozen=True)
class User:
    """One user: what was taken and what is liked at the end.

    Attributes:
        user: The user's id.
        items: Numbers of the items taken, oldest first.
        timestamps: When, milliseconds since 1970.
        taste: The liked value by attribute at the last interaction.
        utility: Log choice weight of every item at the last interaction, shape ``(items,)``.
    """

    user: str
    items: list[int]
    timestamps: list[int]
    taste: dict[str, str]
    utility: np.ndarray


@dataclass(frozen=True)
class World:
    """A catalogue and its users."""

    seed: int
    items: list[Item]
    users: list[User]


def make_world(seed: int, users: int, items: int) -> World:
    """Make a whole world.

    Args:
        seed: The same seed gives the same world.
        users: How many users.
        items: How many items; more than a user takes at most.
    """
    generator = np.random.default_rng(seed)
    catalogue = make_items(generator, items)
    log_popularity = -POPULARITY_EXPONENT * np.log(generator.permutation(items) + 1.0)
    people = [
        _make_user(f"u{number:05d}", catalogue, log_popularity, generator)
        for number in range(users)
    ]
    return World(seed, catalogue, people)


def make_items(generator: np.random.Generator, items: int) -> list[Item]:
    """Draw a catalogue: every attribute's value is uniform and independent of the others."""
    return [_make_item(f"i{number:05d}", generator) for number in range(items)]


def _make_item(item: str, generator: np.random.Generator) -> Item:
    values = {name: str(generator.choice(of)) for name, of in ATTRIBUTES.items()}
    words = {name: values[name] for name in TEXT_ATTRIBUTES}
    words |= {"kind": str(generator.choice(KINDS)), "size": str(generator.choice(SIZES))}
    title = str(generator.choice(TITLES)).format(**words)
    sentence = str(generator.choice(DESCRIPTIONS)).format(**words)
    return Item(
        item=item,
        values=values,
        title=title[0].upper() + title[1:],
        description=None if generator.random() < UNDESCRIBED_SHARE else sentence,
        drawing_seed=int(generator.integers(2**32)),
    )


def _make_user(
    user: str, catalogue: list[Item], log_popularity: np.ndarray, generator: np.random.Generator
) -> User:
    """Let one user choose item after item; the taste drifts once on the way."""
    taste, strength = _draw_taste(generator)
    length = int(generator.integers(HISTORY_LENGTHS[0], HISTORY_LENGTHS[1] + 1))
    drift = int(length * generator.uniform(*DRIFT_SHARE))
    utility = _weigh(catalogue, taste, strength) + log_popularity
    taken: list[int] = []
    for step in range(length):
        if step == drift:
            taste = _drift(taste, generator)
            utility = _weigh(catalogue, taste, strength) + log_popularity
        taken.append(_choose(utility, taken, generator))
    gaps = generator.exponential(3 * DAY, length).astype(np.int64) + 1
    start = FIRST_TIMESTAMP + int(generator.integers(200 * DAY))
    return User(user, taken, [int(t) for t in start + gaps.cumsum()], taste, utility)


def _draw_taste(generator: np.random.Generator) -> tuple[dict[str, str], float]:
    """Draw one liked value for some attributes of both kinds, and how strongly it counts."""
    names = [
        *generator.choice(LIKABLE_IMAGE_ATTRIBUTES, LIKED_IMAGE_ATTRIBUTES, replace=False),
        *generator.choice(LIKABLE_TEXT_ATTRIBUTES, LIKED_TEXT_ATTRIBUTES, replace=False),
    ]
    taste = {str(name): str(generator.choice(ATTRIBUTES[name])) for name in names}
    return taste, TASTE_STRENGTH * generator.uniform(1 - STRENGTH_SPREAD, 1 + STRENGTH_SPREAD)


def _drift(taste: dict[str, str], generator: np.random.Generator) -> dict[str, str]:
    """Replace one liked value by another of the same attribute."""
    name = str(generator.choice(list(taste)))
    others = [value for value in ATTRIBUTES[name] if value != taste[name]]
    return taste | {name: str(generator.choice(others))}


def _weigh(catalogue: list[Item], taste: dict[str, str], strength: float) -> np.ndarray:
    """Give each item's taste utility: strength times the number of liked values, ``(items,)``."""
    matches = [sum(item.values[n] == v for n, v in taste.items()) for item in catalogue]
    return strength * np.array(matches, dtype=np.float64)


def _choose(utility: np.ndarray, taken: list[int], generator: np.random.Generator) -> int:
    """Choose one item not taken before, by softmax over the utilities."""
    weight = np.exp(utility - utility.max())
    weight[taken] = 0
    return int(generator.choice(len(weight), p=weight / weight.sum()))
