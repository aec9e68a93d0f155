"""Plans packed rows: which prompts share a prefix in one forward. Needs no model.

A row is one sequence of a forward: a prefix that is computed once, followed by the suffixes of all
prompts that share it. Prompts about one item for many users share its image; prompts about many
candidates for one user share the preference. Which of them applies follows from the order of fields
in the prompt alone: the planner only sees tokens.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Tokens = list[int]

PROMPTS_PER_ROW = 64  # at most
ROWS_REORDERED = 512  # rows are sorted by length within a window of this many rows


class Row(NamedTuple):
    """Prompts that run in one row of a forward.

    Attributes:
        prompts: Indices of the prompts.
        prefix_length: Tokens of the prefix that all of them share.
        tokens: Tokens of the whole row.
    """

    prompts: list[int]
    prefix_length: int
    tokens: int


def plan_rows(sequences: Sequence[Tokens], width: int, most_tokens: float = math.inf) -> list[Row]:
    """Group prompts into rows so that the forwards cost least.

    Sorted by their tokens, prompts with long common prefixes are neighbours; dynamic programming
    finds where to cut that order. The linear layers of a decoder layer take about 24 width^2
    operations per token, its attention 4 width for each token that another may attend to. So a row
    of t tokens, with a prefix of p and prompts of l, l', ..., costs t + a / (6 width), where a is
    p^2 / 2 + (l - p) l + (l' - p) l' + ... (:mod:`mllm_msr.engines.packed_attention`).

    Args:
        sequences: The tokens of each prompt; tokens of different images must differ.
        width: Of the model's hidden states.
        most_tokens: Of a row; a longer prompt has a row of its own.

    Returns:
        The rows, in the order of their tokens; each prompt is in exactly one.
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index])
    common = _common_prefix_lengths([sequences[index] for index in order])
    lengths = [len(sequences[index]) for index in order]
    best, cut = [0.0], [0]
    for stop in range(1, len(order) + 1):
        costs = {
            first: best[first] + tokens + attended / (6 * width)
            for first, _, tokens, attended in _rows_before(stop, lengths, common, most_tokens)
        }
        cut.append(min(costs, key=costs.__getitem__))
        best.append(costs[cut[-1]])
    rows: list[Row] = []
    stop = len(order)
    while stop:
        prefix_length, tokens = next(
            (prefix_length, tokens)
            for first, prefix_length, tokens, _ in _rows_before(stop, lengths, common, most_tokens)
            if first == cut[stop]
        )
        rows.append(Row(order[cut[stop] : stop], prefix_length, tokens))
        stop = cut[stop]
    return rows[::-1]


def batch_rows(rows: Sequence[Row], most_tokens: int, padded: bool = False) -> Iterator[list[Row]]:
    """Group rows into batches of at most ``most_tokens``, or of a single row.

    Rows of similar length share a batch, but only if they are near each other: otherwise the
    features of an image would be needed again long after.

    Args:
        rows: The rows.
        most_tokens: Of a batch with several rows.
        padded: Whether each row of a batch takes as many tokens as its longest.
    """
    for start in range(0, len(rows), ROWS_REORDERED):
        batch, tokens = list[Row](), 0
        for row in sorted(rows[start : start + ROWS_REORDERED], key=lambda row: -row.tokens):
            if batch and tokens + (batch[0] if padded else row).tokens > most_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(row)
            tokens += (batch[0] if padded else row).tokens
        yield batch


def count_necessary(sequences: Sequence[Tokens]) -> int:
    """Count the tokens that must be computed if every common prefix is computed once."""
    ordered = sorted(sequences)
    return sum(map(len, ordered)) - sum(_common_prefix_lengths(ordered))


def _rows_before(
    stop: int, lengths: Sequence[int], common: Sequence[int], most_tokens: float
) -> Iterator[tuple[int, int, int, float]]:
    """Yield the rows that can end before ``stop``.

    Yields:
        First prompt, prefix length, tokens, and pairs of tokens of which one may attend to the
        other, as attention computes them.
    """
    prefix_length = total = lengths[stop - 1]
    squares = total**2
    for first in range(stop - 1, max(-1, stop - 1 - PROMPTS_PER_ROW), -1):
        if first < stop - 1:
            total += lengths[first]
            squares += lengths[first] ** 2
            prefix_length = min(prefix_length, common[first + 1])
        tokens = total - (stop - first - 1) * prefix_length
        if first < stop - 1 and (not prefix_length or tokens > most_tokens):
            return  # with more prompts a row only becomes longer
        attended = prefix_length**2 / 2 + squares - prefix_length * total
        yield first, prefix_length, tokens, attended


def _common_prefix_lengths(ordered: Sequence[Tokens]) -> list[int]:
    """Count the tokens that each sequence shares with the one before; 0 for the first."""
    return [0, *map(_common_prefix_length, ordered, ordered[1:])]


def _common_prefix_length(one: Tokens, other: Tokens) -> int:
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))
