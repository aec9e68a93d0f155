"""Plans forwards in which prompts that begin alike share that beginning. Needs no model.

A row is one sequence of a forward: a beginning that is computed once, and after it the ends of all
prompts that share it. One item asked about for many users shares its image; one user asked about
many candidates shares the preference. Which of the two there is follows from the prompt's order
alone: the planner only sees tokens.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Tokens = list[int]

MOST_PROMPTS = 64  # of a row
ROWS_IN_ORDER = 512  # rows that lie apart by no more than this may change places


class Row(NamedTuple):
    """Prompts that one sequence of a forward answers.

    Attributes:
        prompts: Which, by number.
        shared: How many tokens of their beginning they share.
        tokens: How many tokens the row has in all.
    """

    prompts: list[int]
    shared: int
    tokens: int


def plan_rows(sequences: Sequence[Tokens], width: int, most_tokens: float = math.inf) -> list[Row]:
    """Part prompts into rows so that the forwards cost least.

    In order of their tokens, prompts with long common beginnings are neighbours; where to cut that
    order is found by dynamic programming. A row of t tokens costs t (1 + t / (6 width)): the linear
    layers of a decoder layer take about 24 width^2 operations a token, its attention 4 t width.

    Args:
        sequences: The tokens of each prompt; tokens of different images must differ.
        width: Of the model's hidden states.
        most_tokens: Of a row; a prompt that is longer has a row of its own.

    Returns:
        The rows, in the order of their tokens; each prompt is in one of them.
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index])
    common = _common_beginnings([sequences[index] for index in order])
    lengths = [len(sequences[index]) for index in order]
    best, cut = [0.0], [0]
    for stop in range(1, len(order) + 1):
        costs = {
            first: best[first] + tokens * (1 + tokens / (6 * width))
            for first, _, tokens in _rows_before(stop, lengths, common, most_tokens)
        }
        cut.append(min(costs, key=costs.__getitem__))
        best.append(costs[cut[-1]])
    rows: list[Row] = []
    stop = len(order)
    while stop:
        shared, tokens = next(
            (shared, tokens)
            for first, shared, tokens in _rows_before(stop, lengths, common, most_tokens)
            if first == cut[stop]
        )
        rows.append(Row(order[cut[stop] : stop], shared, tokens))
        stop = cut[stop]
    return rows[::-1]


def batch_rows(rows: Sequence[Row], most_tokens: int) -> Iterator[list[Row]]:
    """Part rows into batches of at most so many tokens, padding included; one row at least.

    Rows of like length go together, but only rows that lie near each other: an image is then not
    needed again long after.
    """
    for start in range(0, len(rows), ROWS_IN_ORDER):
        batch: list[Row] = []
        for row in sorted(rows[start : start + ROWS_IN_ORDER], key=lambda row: -row.tokens):
            if batch and batch[0].tokens * (len(batch) + 1) > most_tokens:
                yield batch
                batch = []
            batch.append(row)
        yield batch


def count_necessary(sequences: Sequence[Tokens]) -> int:
    """Count the tokens that must be computed if every common beginning is computed once."""
    ordered = sorted(sequences)
    return sum(map(len, ordered)) - sum(_common_beginnings(ordered))


def _rows_before(
    stop: int, lengths: Sequence[int], common: Sequence[int], most_tokens: float
) -> Iterator[tuple[int, int, int]]:
    """Give first prompt, shared tokens and all tokens of each row that ends before ``stop``."""
    shared = total = lengths[stop - 1]
    for first in range(stop - 1, max(-1, stop - 1 - MOST_PROMPTS), -1):
        if first < stop - 1:
            total += lengths[first]
            shared = min(shared, common[first + 1])
        tokens = total - (stop - first - 1) * shared
        if first < stop - 1 and (not shared or tokens > most_tokens):
            return  # with more prompts a row only becomes longer
        yield first, shared, tokens


def _common_beginnings(ordered: Sequence[Tokens]) -> list[int]:
    """Count the tokens that each sequence shares with the one before; 0 for the first."""
    return [0, *map(_count_common, ordered, ordered[1:])]


def _count_common(one: Tokens, other: Tokens) -> int:
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))
