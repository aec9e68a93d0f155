"""Rows share the common prefix of their prompts, and cost least."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from mllm_msr.engines.prefixes import batch_rows, count_necessary, plan_rows

prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12)


@given(prompts)
def test_every_prompt_is_in_one_row_and_has_its_prefix(sequences: list[list[int]]) -> None:
    rows = plan_rows(sequences, 64)
    assert sorted(index for row in rows for index in row.prompts) == list(range(len(sequences)))
    for row in rows:
        prefixes = {tuple(sequences[index][: row.prefix_length]) for index in row.prompts}
        assert len(prefixes) == 1
        suffixes = sum(len(sequences[index]) - row.prefix_length for index in row.prompts)
        assert row.tokens == row.prefix_length + suffixes


@given(prompts, st.integers(1, 20))
def test_rows_of_several_prompts_respect_the_limit(sequences: list[list[int]], most: int) -> None:
    rows = plan_rows(sequences, 64, most)
    assert sorted(index for row in rows for index in row.prompts) == list(range(len(sequences)))
    assert all(row.tokens <= most or len(row.prompts) == 1 for row in rows)


@given(prompts, st.integers(1, 40))
def test_no_other_cut_of_the_sorted_prompts_costs_less(
    sequences: list[list[int]], most: int
) -> None:
    def cost(rows: Sequence[Sequence[list[int]]]) -> float:
        tokens = [count_tokens(row) for row in rows]
        if any(t > most and len(row) > 1 for t, row in zip(tokens, rows, strict=True)):
            return 10_000_000
        return sum(tokens) + sum(map(count_attended, rows)) / (6 * 4)

    def count_shared(row: Sequence[list[int]]) -> int:
        return next(
            n
            for n in range(9, -1, -1)
            if len({tuple(s[:n]) for s in row}) == 1 and all(len(s) >= n for s in row)
        )

    def count_attended(row: Sequence[list[int]]) -> float:
        shared = count_shared(row)
        return shared**2 / 2 + sum((len(s) - shared) * len(s) for s in row)

    def count_tokens(row: Sequence[list[int]]) -> int:
        shared = count_shared(row)
        if len(row) > 1 and not shared:
            return 10_000  # prompts without a common prefix share no row
        return sum(map(len, row)) - (len(row) - 1) * shared

    ordered = sorted(sequences[:7])
    planned = [[ordered[index] for index in row.prompts] for row in plan_rows(ordered, 4, most)]
    every = []
    for cuts in range(2 ** max(0, len(ordered) - 1)):
        rows: list[list[list[int]]] = [[]]
        for index, sequence in enumerate(ordered):
            if index and cuts >> (index - 1) & 1:
                rows.append([])
            rows[-1].append(sequence)
        every.append(cost(rows) if ordered else 0.0)
    assert abs(cost(planned) - min(every)) < 1e-6


def test_prompts_about_one_item_share_its_image() -> None:
    def ask(image: int, user: int) -> list[int]:
        return [1, *[-image] * 60, 2, *[100 + user] * 20]

    sequences = [ask(image, user) for user in range(3) for image in (1, 2)]
    rows = plan_rows(sequences, 192)
    assert [row.prefix_length for row in rows] == [62, 62]
    assert sorted(sorted(row.prompts) for row in rows) == [[0, 2, 4], [1, 3, 5]]


def test_candidates_of_one_user_share_the_preference() -> None:
    sequences = [
        [1, *[7 + user] * 50, *[-image] * 16] for user in range(2) for image in range(1, 4)
    ]
    rows = plan_rows(sequences, 192)
    assert [row.prefix_length for row in rows] == [51, 51]


def test_a_row_ends_where_attention_costs_more_than_sharing_saves() -> None:
    narrow = plan_rows([[1, 2, *[100 + n] * 40] for n in range(30)], 8)
    wide = plan_rows([[1, 2, *[100 + n] * 40] for n in range(30)], 8192)
    assert max(len(row.prompts) for row in narrow) == 1
    assert max(len(row.prompts) for row in wide) > 1


@given(prompts, st.integers(1, 40), st.booleans())
def test_batches_hold_every_row_once_within_the_budget(
    sequences: list[list[int]], budget: int, padded: bool
) -> None:
    rows = plan_rows(sequences, 64)
    batches = list(batch_rows(rows, budget, padded))
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    for batch in batches:
        lengths = [row.tokens for row in batch]
        tokens = max(lengths) * len(lengths) if padded else sum(lengths)
        assert len(batch) == 1 or tokens <= budget


@given(prompts)
def test_necessary_tokens_are_the_distinct_prefixes(sequences: list[list[int]]) -> None:
    prefixes = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    assert count_necessary(sequences) == len(prefixes)
