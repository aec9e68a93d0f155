"""Single test sequences told from the history to the ranking, chosen by a seeded rule.

Of all test sequences, in an order drawn from the seed, the first few whose target is ranked first,
and as many whose target is not. Nobody picks them.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import duckdb
import numpy as np

from mllm_msr.evaluation.evaluation import MODEL
from mllm_msr.images.gallery import Gallery
from mllm_msr.ranking import Placements, rank
from mllm_msr.report.settings import Settings
from mllm_msr.report.thumbnails import make_thumbnail

SHOWN = 25  # candidates of a story; the target is shown wherever it stands
TITLE, SUMMARY = 90, 140  # characters shown


class Shown(NamedTuple):
    """An item as the page shows it."""

    title: str  # or the summary, or the identifier, whatever there is
    summary: str  # empty where it stands as the title
    image: str | None  # a data URI
    described: str  # what stands for the image where it cannot be seen


class Change(NamedTuple):
    """A piece of a text, and what became of it since the text before."""

    kind: str  # same, added or removed
    text: str


class Block(NamedTuple):
    """Items that were read together, and the preference after them."""

    number: int
    items: list[Shown]
    preference: list[Change]


class Ranked(NamedTuple):
    """A candidate in its place."""

    rank: float  # the middle of its ties
    item: Shown
    p_yes: float
    taken: int  # interactions of the item
    target: bool


@dataclass(frozen=True)
class Story:
    """A test sequence.

    Attributes:
        sequence: Its number in the tables.
        user: Whose it is, as the data name them.
        rank: Of the target, 1 the best.
        asked: Number of candidates.
        blocks: The history, oldest first.
        candidates: Best first; at most ``SHOWN`` and the target.
    """

    sequence: int
    user: str
    rank: float
    asked: int
    blocks: list[Block]
    candidates: list[Ranked]

    @property
    def target(self) -> Shown:
        """The item that the user took."""
        return next(ranked.item for ranked in self.candidates if ranked.target)


class Chosen(NamedTuple):
    """The sequences to be told, in the order of the draw."""

    right: list[int]
    wrong: list[int]


@dataclass(frozen=True)
class Stories:
    """What the section shows: targets ranked first, and others."""

    right: list[Story]
    wrong: list[Story]


def tell_stories(
    connection: duckdb.DuckDBPyConnection, gallery: Gallery, settings: Settings
) -> Stories:
    """Choose test sequences and tell them.

    Args:
        connection: Comes from :func:`mllm_msr.report.inputs.open_tables`.
        gallery: The catalogue's images.
        settings: Tell how many, the seed and the size of images.
    """
    chosen = choose_sequences(connection, settings.report.stories, settings.report.seed)
    narrator = _Narrator(connection, gallery, settings.report.thumbnail_side)
    return Stories(*([narrator.tell(sequence) for sequence in kind] for kind in chosen))


def choose_sequences(connection: duckdb.DuckDBPyConnection, stories: int, seed: int) -> Chosen:
    """Draw an order of the test sequences and take the first of each kind.

    Args:
        connection: Comes from :func:`mllm_msr.report.inputs.open_tables`.
        stories: Of each kind at most.
        seed: Of the order.
    """
    rows = connection.execute(
        "SELECT sequence, candidates, above, tied FROM per_sequence"
        " WHERE scorer = ? AND split = 'test' ORDER BY sequence",
        [MODEL],
    ).fetchnumpy()
    order = np.random.default_rng(seed).permutation(len(rows["sequence"]))
    first = rank(Placements(*rows.values())) == 1
    right, wrong = (
        [int(rows["sequence"][place]) for place in order if first[place] == wanted][:stories]
        for wanted in (True, False)
    )
    return Chosen(right, wrong)


def mark_changes(before: str, after: str) -> list[Change]:
    """Mark which words and signs of a text are new, and which of the one before are gone.

    Args:
        before: The text before; empty for the first, of which nothing is new.
        after: The text.
    """
    if not before:
        return [Change("same", after)]
    old, new = (re.findall(r"\s*(?:\w+|[^\w\s])", text) for text in (before, after))
    changes = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal":
            changes.append(Change("same", "".join(new[j1:j2])))
        if kind in ("delete", "replace"):
            changes += _mark("removed", "".join(old[i1:i2]))
        if kind in ("insert", "replace"):
            changes += _mark("added", "".join(new[j1:j2]))
    return changes


def _mark(kind: str, text: str) -> list[Change]:
    """Mark a piece, but not the space before it."""
    marked = text.lstrip()
    space = text[: len(text) - len(marked)]
    return [Change("same", space), Change(kind, marked)] if space else [Change(kind, marked)]


def shorten(text: str, characters: int) -> str:
    """Cut a text to so many characters, between words where there are spaces."""
    if len(text) <= characters:
        return text
    start = text[: characters - 1]
    between = start.rfind(" ", characters // 2)
    return f"{start[:between] if between > 0 else start}…"


class _Narrator:
    """Reads what belongs to a sequence."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, gallery: Gallery, side: int) -> None:
        self._connection, self._gallery, self._side = connection, gallery, side

    def tell(self, sequence: int) -> Story:
        """Tell a test sequence."""
        candidates = self._read_candidates(sequence)
        target = next(number for number, ranked in enumerate(candidates) if ranked.target)
        shown = candidates[:SHOWN] + ([candidates[target]] if target >= SHOWN else [])
        blocks = list(self._read_blocks(sequence))
        ((user,),) = self._fetch('SELECT "user" FROM sequences WHERE sequence = ?', sequence)
        return Story(sequence, user, candidates[target].rank, len(candidates), blocks, shown)

    def _read_candidates(self, sequence: int) -> list[Ranked]:
        """Read the candidates, best first; those that tie in the order of their items."""
        rows = self._fetch(
            "SELECT item, label, log_odds, interactions,"
            " rank() OVER best + (count(*) OVER (PARTITION BY log_odds) - 1) / 2"
            " FROM candidates JOIN scores USING (sequence, item) JOIN popularity USING (item)"
            " WHERE sequence = ? WINDOW best AS (ORDER BY log_odds DESC)"
            " ORDER BY log_odds DESC, item",
            sequence,
        )
        return [
            Ranked(place, self._show(item), (1 + float(np.tanh(odds / 2))) / 2, taken, label)
            for item, label, odds, taken, place in rows
        ]

    def _read_blocks(self, sequence: int) -> Iterator[Block]:
        """Read the history, cut where a preference was inferred."""
        history = self._fetch(
            "SELECT item FROM histories WHERE sequence = ? ORDER BY position", sequence
        )
        items = [item for (item,) in history]
        start, before = 0, ""
        for number, end, preference in self._fetch(
            "SELECT block, items, preference FROM preferences WHERE sequence = ? ORDER BY block",
            sequence,
        ):
            shown = [self._show(item) for item in items[start:end]]
            yield Block(number, shown, mark_changes(before, preference))
            start, before = end, preference

    def _show(self, item: str) -> Shown:
        """Look an item up: its title, or its summary, or its identifier."""
        rows = self._fetch(
            "SELECT title, summary, image_description"
            " FROM items LEFT JOIN summaries USING (item) WHERE item = ?",
            item,
        )
        title, summary, description = rows[0] if rows else (None, None, None)
        shown = shorten(title or summary or item, TITLE)
        return Shown(
            shown,
            shorten(summary or "", SUMMARY) if title else "",
            make_thumbnail(self._gallery, item, self._side),
            shorten(description or f"Image of {shown}", SUMMARY),
        )

    def _fetch(self, query: str, key: int | str) -> Sequence[tuple[Any, ...]]:
        return self._connection.execute(query, [key]).fetchall()
