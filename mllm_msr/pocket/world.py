"""Generation of a pocket world: a catalogue with drawn images, and users whose tastes drift.

Colour, pattern, motif and scene are visible only in an item's image; series and maker are named
only by its text. Each user likes one value of some image and some text attributes, and at some
point of the history one liked value changes. Motif and maker are distractors that no user cares
about. Users choose items by a softmax over the catalogue of taste plus log popularity, without
repeats. The same seed gives the same world.
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
"""The attributes that users care about. Motif and maker are distractors, as in a real catalogue not
everything that an image or title shows matters."""
LIKED_IMAGE_ATTRIBUTES: Final = 2
LIKED_TEXT_ATTRIBUTES: Final = 1
TASTE_STRENGTH: Final = 4.5
"""Log weight that a liked value adds to an item; varies by user within :data:`STRENGTH_SPREAD`."""
STRENGTH_SPREAD: Final = 0.15
POPULARITY_EXPONENT: Final = 0.45
"""An item's popularity is its random rank to the power of minus this."""
HISTORY_LENGTHS: Final = (7, 14)
"""Minimum and maximum interactions of a user, including the last."""
DRIFT_SHARE: Final = (0.2, 0.5)
"""Range of the share of interactions after which a liked value changes, drawn uniformly."""
UNDESCRIBED_SHARE: Final = 0.02
FIRST_TIMESTAMP: Final = 1_700_000_000_000  # ms since 1970
DAY: Final = 86_400_000  # ms


@dataclass(frozen=True)
class Item:
    """One item of the catalogue.

    Attributes:
        item: Its id.
        values: The value of each of :data:`ATTRIBUTES`, by the attribute's name.
        title: A title with the series and the maker.
        description: A description, which may repeat them; None if missing.
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
    """A user: the chosen items and the final taste.

    Attributes:
        user: The user's id.
        items: Indices of the chosen items, oldest first.
        timestamps: Times of the choices, milliseconds since 1970.
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
    """Generate a world.

    Args:
        seed: Seed of everything.
        users: Number of users.
        items: Number of items; must exceed the longest history.
    """
    generator = np.random.default_rng(seed)
    catalogue = make_items(generator, items)
    log_popularity = -POPULARITY_EXPONENT * np.log(generator.permutation(items) + 1.0)
    population = [
        _make_user(f"u{number:05d}", catalogue, log_popularity, generator)
        for number in range(users)
    ]
    return World(seed, catalogue, population)


def make_items(generator: np.random.Generator, items: int) -> list[Item]:
    """Generate a catalogue, with uniform and independent attribute values."""
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
    """Generate a user who chooses one item after another; the taste changes once."""
    taste, strength = _draw_taste(generator)
    length = int(generator.integers(HISTORY_LENGTHS[0], HISTORY_LENGTHS[1] + 1))
    drift = int(length * generator.uniform(*DRIFT_SHARE))
    utility = _weigh(catalogue, taste, strength) + log_popularity
    chosen: list[int] = []
    for step in range(length):
        if step == drift:
            taste = _drift(taste, generator)
            utility = _weigh(catalogue, taste, strength) + log_popularity
        chosen.append(_choose(utility, chosen, generator))
    gaps = generator.exponential(3 * DAY, length).astype(np.int64) + 1
    start = FIRST_TIMESTAMP + int(generator.integers(200 * DAY))
    return User(user, chosen, [int(t) for t in start + gaps.cumsum()], taste, utility)


def _draw_taste(generator: np.random.Generator) -> tuple[dict[str, str], float]:
    """Draw liked values for some image and text attributes, and their strength."""
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
    """Return each item's taste utility, ``(items,)``: strength times its number of liked values."""
    matches = [sum(item.values[n] == v for n, v in taste.items()) for item in catalogue]
    return strength * np.array(matches, dtype=np.float64)


def _choose(utility: np.ndarray, chosen: list[int], generator: np.random.Generator) -> int:
    """Choose an item that was not chosen before, by softmax over the utilities."""
    weight = np.exp(utility - utility.max())
    weight[chosen] = 0
    return int(generator.choice(len(weight), p=weight / weight.sum()))
