"""Stories: example test sequences from the history to the ranking, chosen by a seeded rule.

The test sequences are put in an order drawn from the seed. The first few whose target is ranked
first are shown, and the first few whose target is not.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import duckdb
import numpy as np

from mllm_msr.core.params import ReportParams
from mllm_msr.evaluation.calibration import Scaling, sigmoid
from mllm_msr.evaluation.scorers import MODEL
from mllm_msr.images.gallery import Gallery
from mllm_msr.ranking import TargetRanks, expected_rank
from mllm_msr.report.settings import Settings
from mllm_msr.report.thumbnails import make_thumbnail

SHOWN = 25  # candidates of a story; the target is always shown
TITLE, SUMMARY = 90, 140  # characters shown


class Shown(NamedTuple):
    """An item as the page shows it."""

    title: str  # or the summary, or the identifier
    summary: str  # empty if it is the title
    image: str | None  # a data URI
    description: str  # text alternative of the image


class Change(NamedTuple):
    """A piece of a text, and whether it changed since the text before."""

    kind: str  # same, added or removed
    text: str


class Block(NamedTuple):
    """Items of one block of the history, and the preference after them."""

    number: int
    items: list[Shown]
    preference: list[Change]


class RankedCandidate(NamedTuple):
    """A candidate and its rank."""

    rank: float  # the mean over its ties
    item: Shown
    p_yes: float  # as the model gives it
    calibrated: float | None  # its scaling; None where none was fitted
    interactions: int  # of the item
    target: bool


@dataclass(frozen=True)
class Story:
    """A test sequence.

    Attributes:
        sequence: Its number in the tables.
        user: Its user, as named in the data.
        rank: Of the target, 1 the best.
        count: Number of candidates.
        blocks: The history, oldest first.
        candidates: Best first; at most ``SHOWN`` and the target.
    """

    sequence: int
    user: str
    rank: float
    count: int
    blocks: list[Block]
    candidates: list[RankedCandidate]

    @property
    def target(self) -> Shown:
        """The target."""
        return next(ranked.item for ranked in self.candidates if ranked.target)


class Chosen(NamedTuple):
    """The sequences of the stories, in the order of the draw."""

    right: list[int]
    wrong: list[int]


@dataclass(frozen=True)
class Stories:
    """The section of the report: targets ranked first, and others."""

    right: list[Story]
    wrong: list[Story]


def read_stories(
    connection: duckdb.DuckDBPyConnection,
    gallery: Gallery,
    settings: Settings,
    scaling: Scaling | None,
) -> Stories:
    """Choose test sequences and read their stories.

    Args:
        connection: From :func:`mllm_msr.report.inputs.open_tables`.
        gallery: The catalogue's images.
        settings: Number of stories, seed, and size of images.
        scaling: Turns log-odds into calibrated probabilities, if one was fitted.
    """
    chosen = choose_sequences(connection, settings.report.stories, settings.report.seed)
    reader = _StoryReader(connection, gallery, settings.report, scaling)
    return Stories(*([reader.read(sequence) for sequence in kind] for kind in chosen))


def choose_sequences(connection: duckdb.DuckDBPyConnection, stories: int, seed: int) -> Chosen:
    """Draw an order of the test sequences and choose the first of each kind.

    Args:
        connection: From :func:`mllm_msr.report.inputs.open_tables`.
        stories: Number of each kind, at most.
        seed: Seed of the order.
    """
    rows = connection.execute(
        "SELECT sequence, candidates, above, tied FROM per_sequence"
        " WHERE scorer = ? AND split = 'test' ORDER BY sequence",
        [MODEL],
    ).fetchnumpy()
    order = np.random.default_rng(seed).permutation(len(rows["sequence"]))
    first = expected_rank(TargetRanks(*rows.values())) == 1
    right, wrong = (
        [int(rows["sequence"][row]) for row in order if first[row] == wanted][:stories]
        for wanted in (True, False)
    )
    return Chosen(right, wrong)


def mark_changes(before: str, after: str) -> list[Change]:
    """Mark which words and signs of a text were added, and which were removed.

    Args:
        before: The text before; empty for the first text, in which nothing is marked.
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
    """Mark a piece, without the space before it."""
    marked = text.lstrip()
    space = text[: len(text) - len(marked)]
    return [Change("same", space), Change(kind, marked)] if space else [Change(kind, marked)]


def truncate_words(text: str, characters: int) -> str:
    """Cut a text to a number of characters, between words if there are spaces."""
    if len(text) <= characters:
        return text
    start = text[: characters - 1]
    between = start.rfind(" ", characters // 2)
    return f"{start[:between] if between > 0 else start}…"


class _StoryReader:
    """Reads the stories of sequences."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        gallery: Gallery,
        settings: ReportParams,
        scaling: Scaling | None,
    ) -> None:
        self._connection, self._gallery = connection, gallery
        self._settings, self._scaling = settings, scaling

    def read(self, sequence: int) -> Story:
        """Read the story of a test sequence."""
        candidates = self._read_candidates(sequence)
        target = next(number for number, ranked in enumerate(candidates) if ranked.target)
        shown = candidates[:SHOWN] + ([candidates[target]] if target >= SHOWN else [])
        blocks = list(self._read_blocks(sequence))
        ((user,),) = self._fetch('SELECT "user" FROM sequences WHERE sequence = ?', sequence)
        return Story(sequence, user, candidates[target].rank, len(candidates), blocks, shown)

    def _read_candidates(self, sequence: int) -> list[RankedCandidate]:
        """Read the candidates, best first; tied candidates in the order of their items."""
        rows = self._fetch(
            "SELECT item, label, log_odds, interactions,"
            " rank() OVER best + (count(*) OVER (PARTITION BY log_odds) - 1) / 2"
            " FROM candidates JOIN scores USING (sequence, item) JOIN popularity USING (item)"
            " WHERE sequence = ? WINDOW best AS (ORDER BY log_odds DESC)"
            " ORDER BY log_odds DESC, item",
            sequence,
        )
        return [
            RankedCandidate(
                rank=position,
                item=self._show(item),
                p_yes=float(sigmoid(odds)),
                calibrated=float(self._scaling.apply(odds)) if self._scaling else None,
                interactions=interactions,
                target=label,
            )
            for item, label, odds, interactions, position in rows
        ]

    def _read_blocks(self, sequence: int) -> Iterator[Block]:
        """Yield the blocks of the history, each with the preference after it."""
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
        """Return an item as the page shows it."""
        rows = self._fetch(
            "SELECT title, summary, image_description"
            " FROM items LEFT JOIN summaries USING (item) WHERE item = ?",
            item,
        )
        title, summary, description = rows[0] if rows else (None, None, None)
        shown = truncate_words(title or summary or item, TITLE)
        return Shown(
            shown,
            truncate_words(summary or "", SUMMARY) if title else "",
            make_thumbnail(self._gallery, item, self._settings.thumbnail_side),
            truncate_words(description or f"Image of {shown}", SUMMARY),
        )

    def _fetch(self, query: str, key: int | str) -> Sequence[tuple[Any, ...]]:
        return self._connection.execute(query, [key]).fetchall()
