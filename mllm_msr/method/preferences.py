"""Recurrent preferences: a history read block by block (paper, section Method, step 2).

Block t is summarised together with the preference after block t - 1, as a recurrent network reads
its hidden state. Only the history is read: the target is in none of the tables that get here.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mllm_msr.core.errors import DataError
from mllm_msr.core.tables import ADD_ITEM, Histories, Items, Summaries, read_rows
from mllm_msr.engines.prompt import Prompt
from mllm_msr.method import prompts
from mllm_msr.method.asking import Asker
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
    """Read the histories with a text for each item, oldest first.

    Args:
        histories: The table Histories.
        items: The table Items.
        summaries: The table Summaries; without it an item's text is its title, "" if it has none.

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
    """Cut a history into blocks, oldest first; the direct mode reads it as one block."""
    size = block_size if mode == "recurrent" else len(history)
    return [history[start : start + size] for start in range(0, len(history), size)]


def count_calls(histories: HistoryTexts, mode: str, block_size: int) -> int:
    """Count the prompts that inferring takes."""
    return sum(len(cut_blocks(history, mode, block_size)) for history in histories.values())


def first_prompt(
    histories: HistoryTexts, templates: Templates, mode: str, block_size: int
) -> Prompt:
    """Give the first prompt that would be put to the model."""
    history = next(iter(histories.values()))
    return prompts.preference(templates, cut_blocks(history, mode, block_size)[0])


def list_titles(histories: HistoryTexts, templates: Templates) -> Iterator[Preference]:
    """Stand in for preferences by the titles of each history (the mode ``none``)."""
    for sequence, titles in histories.items():
        text = prompts.titles_preference(templates, titles)
        yield Preference(sequence, 1, len(titles), text)


class PreferenceInferrer:
    """Asks for preferences and counts the prompts it had to shorten.

    Attributes:
        shortened: How many prompts were too long for the model.
    """

    def __init__(self, asker: Asker, templates: Templates) -> None:
        """Take the model and the prompts of ``infer_preferences``."""
        self.shortened = 0
        self._asker, self._templates = asker, templates

    def infer(self, histories: HistoryTexts, mode: str, block_size: int) -> list[Preference]:
        """Infer the preference after every block, in waves: block t of all sequences together.

        Args:
            histories: Item summaries of each sequence, oldest first.
            mode: ``recurrent`` or ``direct``.
            block_size: Items per block of the recurrent mode.

        Returns:
            One row per sequence and block, in that order.
        """
        blocks = {s: cut_blocks(history, mode, block_size) for s, history in histories.items()}
        known: dict[int, list[str]] = {sequence: [] for sequence in histories}
        total = count_calls(histories, mode, block_size)
        with tqdm(total=total, unit="prompt", desc="infer_preferences") as progress:
            for wave in range(max(map(len, blocks.values()), default=0)):
                asked = [sequence for sequence in histories if wave < len(blocks[sequence])]
                wanted = [self._prompt(blocks[s][wave], known[s], s) for s in asked]
                for sequence, answer in zip(asked, self._asker.ask(wanted, progress), strict=True):
                    known[sequence].append(answer)
        return [row for sequence in histories for row in _rows(sequence, blocks, known)]

    def _prompt(self, block: Sequence[str], known: Sequence[str], sequence: int) -> Prompt:
        """Ask about a block, given the preference before it."""
        previous = known[-1] if known else None
        fitted = prompts.fit(
            partial(prompts.preference, self._templates, block, previous),
            self._asker.model.encoder.count,
            self._asker.limit,
            f"sequence {sequence}",
        )
        self.shortened += fitted.shortened
        return fitted.prompt


def _rows(
    sequence: int, blocks: Mapping[int, Sequence[Sequence[str]]], known: Mapping[int, Sequence[str]]
) -> Iterator[Preference]:
    items = 0
    for number, (block, text) in enumerate(
        zip(blocks[sequence], known[sequence], strict=True), start=1
    ):
        items += len(block)
        yield Preference(sequence, number, items, text)
