"""Recurrent preferences: a history summarised block by block (paper, section Method, step 2).

Block t is summarised together with the preference after block t - 1, which takes the role of the
hidden state of a recurrent network. Targets are in none of the tables that are read here.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import Histories, Items, Summaries
from mllm_msr.core.tables import ADD_ITEM, read_rows
from mllm_msr.engines.prompt import Prompt
from mllm_msr.method import prompts
from mllm_msr.method.inference import Conversation, Engine
from mllm_msr.method.prompts import Templates


class Preference(NamedTuple):
    """A row of the table Preferences."""

    sequence: int
    block: int
    items: int
    preference: str


HistoryTexts = Mapping[int, Sequence[str]]  # sequence -> one text per item, oldest first


def read_histories(
    histories: Path, items: Path, summaries: Path | None = None
) -> dict[int, list[str]]:
    """Read the histories as one text per item, oldest first.

    Args:
        histories: The table Histories.
        items: The table Items.
        summaries: The table Summaries; None: the text is the item's title, or "" without one.

    Raises:
        DataError: An item of a history is not in the catalogue, or has no summary.
    """
    texts = {row["item"]: row["title"] or "" for row in read_rows(Items, items, order="item")}
    catalogue = texts.keys()
    if summaries:
        rows = read_rows(Summaries, summaries, order="item")
        texts = {row["item"]: row["summary"] for row in rows}
    found: dict[int, list[str]] = {}
    for row in read_rows(Histories, histories, order="sequence, position"):
        item, where = row["item"], f"sequence {row['sequence']}"
        if item not in catalogue:
            where = f"{histories}, {where}"
            raise DataError(
                expected=f"items of the catalogue, {items}",
                got=f"item {item}",
                where=where,
                fix=ADD_ITEM,
            )
        if item not in texts:
            fix = "run the stage summarize_items on this catalogue"
            raise DataError(
                expected=f"a summary of item {item}",
                got="none",
                where=f"{summaries}, {where}",
                fix=fix,
            )
        found.setdefault(row["sequence"], []).append(texts[item])
    return found


def cut_blocks(history: Sequence[str], mode: str, block_size: int) -> list[Sequence[str]]:
    """Split a history into blocks, oldest first; in the direct mode it is one block."""
    size = block_size if mode == "recurrent" else len(history)
    return [history[start : start + size] for start in range(0, len(history), size)]


def list_titles(histories: HistoryTexts, templates: Templates) -> Iterator[Preference]:
    """Yield the titles of each history in place of a preference (the mode ``none``)."""
    for sequence, titles in histories.items():
        text = prompts.titles_preference(templates, titles)
        yield Preference(sequence, 1, len(titles), text)


class PreferenceInferrer:
    """Generates preferences, and counts the prompts that had to be shortened.

    Attributes:
        shortened: How many prompts were too long for the model.
    """

    def __init__(self, engine: Engine, templates: Templates) -> None:
        """Take the model and the prompts of ``infer_preferences``."""
        self.shortened = 0
        self._engine, self._templates = engine, templates

    def infer(
        self, histories: HistoryTexts, mode: str, block_size: int, *, show_progress: bool = True
    ) -> list[Preference]:
        """Infer the preference after every block of every sequence.

        Args:
            histories: Item summaries of each sequence, oldest first.
            mode: ``recurrent`` or ``direct``.
            block_size: Items per block of the recurrent mode.
            show_progress: Whether to show a progress bar.

        Returns:
            One row per sequence and block, in that order.
        """
        blocks = {s: cut_blocks(history, mode, block_size) for s, history in histories.items()}
        preferences: dict[int, list[str]] = {sequence: [] for sequence in histories}
        total = sum(map(len, blocks.values()))
        bar = tqdm(total=total, unit="prompt", desc="infer_preferences", disable=not show_progress)
        with bar as progress:
            self._engine.converse(
                (self._converse(blocks[s], preferences[s], s) for s in histories), progress
            )
        return [row for sequence in histories for row in _rows(sequence, blocks, preferences)]

    def _converse(
        self, blocks: Sequence[Sequence[str]], preferences: list[str], sequence: int
    ) -> Conversation:
        """Ask about one block after another; append the preference after each."""
        for block in blocks:
            preferences.append((yield self._prompt(block, preferences, sequence)))

    def _prompt(self, block: Sequence[str], preferences: Sequence[str], sequence: int) -> Prompt:
        """Return the prompt for a block, with the preference after the block before."""
        previous = preferences[-1] if preferences else None
        fitted = prompts.fit(
            partial(prompts.preference, self._templates, block, previous),
            self._engine.encoder.count_tokens,
            self._engine.limit,
            f"sequence {sequence}",
        )
        self.shortened += fitted.shortened
        return fitted.prompt


def _rows(
    sequence: int,
    blocks: Mapping[int, Sequence[Sequence[str]]],
    preferences: Mapping[int, Sequence[str]],
) -> Iterator[Preference]:
    items = 0
    for number, (block, text) in enumerate(
        zip(blocks[sequence], preferences[sequence], strict=True), start=1
    ):
        items += len(block)
        yield Preference(sequence, number, items, text)
