"""Generation of a pocket world: a catalogue with drawn images, and users whose tastes drift.

Colour, pattern, motif and scene are visible only in an item's image; series and maker are named
only by its text. Each user likes one value of some image and some text attributes, and at some
point of the history one liked value changes. Motif and maker are distractors that no user cares
about.

Interactions are sparse and have a long tail, as in real catalogues. Popularity falls with an item's
random rank by a power law, and half of the catalogue arrives while users are already choosing, so
new items have few interactions. Users choose among the items that have arrived, by a softmax of
taste plus log popularity, without repeats. The same seed gives the same world.
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
POPULARITY_EXPONENT: Final = 1.0
"""An item's popularity is its random rank to the power of minus this (Zipf's law)."""
LATE_SHARE: Final = 0.5
"""Share of the items that arrive after the first day, uniformly over :data:`PERIOD`."""
HISTORY_LENGTHS: Final = (7, 14)
"""Minimum and maximum interactions of a user, including the last."""
DRIFT_SHARE: Final = (0.2, 0.5)
"""Range of the share of interactions after which a liked value changes, drawn uniformly."""
UNDESCRIBED_SHARE: Final = 0.02
FIRST_TIMESTAMP: Final = 1_700_000_000_000  # ms since 1970
DAY: Final = 86_400_000  # ms
PERIOD: Final = 200 * DAY
"""Time in which users start, ms; their choices are three days apart on average."""


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
        utility: Log choice weight of every item at the last interaction, shape ``(items,)``; items
            that had not arrived yet have that of their taste and popularity too.
    """

    user: str
    items: list[int]
    timestamps: list[int]
    taste: dict[str, str]
    utility: np.ndarray


@dataclass(frozen=True)
class World:
    """A catalogue and its users.

    Attributes:
        seed: The seed of both.
        items: The items.
        arrivals: When each item arrived, milliseconds since 1970, shape ``(items,)``.
        users: The users.
    """

    seed: int
    items: list[Item]
    arrivals: np.ndarray
    users: list[User]


@dataclass(frozen=True)
class Market:
    """What users choose from.

    Attributes:
        items: The items.
        log_popularity: Log weight of each item, whoever chooses, shape ``(items,)``.
        arrivals: As in :class:`World`.
    """

    items: list[Item]
    log_popularity: np.ndarray
    arrivals: np.ndarray


def make_world(seed: int, users: int, items: int) -> World:
    """Generate a world.

    Args:
        seed: Seed of everything.
        users: Number of users.
        items: Number of items; half of them must exceed the longest history.
    """
    generator = np.random.default_rng(seed)
    catalogue = make_items(generator, items)
    market = Market(
        catalogue,
        log_popularity=-POPULARITY_EXPONENT * np.log(generator.permutation(items) + 1.0),
        arrivals=_draw_arrivals(items, generator),
    )
    population = [_make_user(f"u{number:05d}", market, generator) for number in range(users)]
    return World(seed, catalogue, market.arrivals, population)


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


def _draw_arrivals(items: int, generator: np.random.Generator) -> np.ndarray:
    """Draw when each item arrives, ``(items,)``: at the start, or uniformly over the period.

    Exactly :data:`LATE_SHARE` of the items are late, so that users always have the others.
    """
    late = generator.permutation(items) < LATE_SHARE * items
    return FIRST_TIMESTAMP + np.where(late, generator.integers(PERIOD, size=items), 0)


def _make_user(user: str, market: Market, generator: np.random.Generator) -> User:
    """Generate a user who chooses one item after another; the taste changes once."""
    taste, strength = _draw_taste(generator)
    length = int(generator.integers(HISTORY_LENGTHS[0], HISTORY_LENGTHS[1] + 1))
    drift = int(length * generator.uniform(*DRIFT_SHARE))
    gaps = generator.exponential(3 * DAY, length).astype(np.int64) + 1
    times = FIRST_TIMESTAMP + int(generator.integers(PERIOD)) + gaps.cumsum()
    utility = _weigh(market, taste, strength)
    chosen: list[int] = []
    for step, time in enumerate(times):
        if step == drift:
            taste = _drift(taste, generator)
            utility = _weigh(market, taste, strength)
        chosen.append(_choose(utility, market.arrivals <= time, chosen, generator))
    return User(user, chosen, [int(time) for time in times], taste, utility)


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


def _weigh(market: Market, taste: dict[str, str], strength: float) -> np.ndarray:
    """Return each item's log weight, ``(items,)``: strength per liked value, plus popularity."""
    matches = [sum(item.values[n] == v for n, v in taste.items()) for item in market.items]
    utility: np.ndarray = strength * np.array(matches, dtype=np.float64) + market.log_popularity
    return utility


def _choose(
    utility: np.ndarray, arrived: np.ndarray, chosen: list[int], generator: np.random.Generator
) -> int:
    """Choose an item that has arrived and was not chosen before, by softmax of the utilities."""
    weight = np.exp(utility - utility.max()) * arrived
    weight[chosen] = 0
    return int(generator.choice(len(weight), p=weight / weight.sum()))
