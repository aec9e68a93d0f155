"""Attention over packed rows equals masked attention over all of their tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from mllm_msr.engines import packed_attention as attention
from mllm_msr.engines.packed_attention import Group, PackedLayout, lay_out, packed_attention

Rows = list[tuple[int, list[int]]]

rows_of_prompts = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(0, 9), max_size=5)), min_size=1, max_size=4
)


def draw_states(tokens: int, heads: int, key_heads: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, count, tokens, 8) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def count_tokens(rows: Rows) -> int:
    return sum(prefix + sum(suffixes) for prefix, suffixes in rows)


def allowed(rows: Rows) -> torch.Tensor:
    """Return which token may attend to which, token by token, (tokens, tokens)."""
    owners = [
        (number, prompt)
        for number, (prefix, suffixes) in enumerate(rows)
        for prompt, length in enumerate([prefix, *suffixes])
        for _ in range(length)
    ]
    mask = torch.zeros(len(owners), len(owners), dtype=torch.bool)
    for query, (row, prompt) in enumerate(owners):
        for key, (other_row, other) in enumerate(owners[: query + 1]):
            mask[query, key] = row == other_row and other in (0, prompt)
    return mask


def attend_masked(rows: Rows, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
    times = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(times, dim=1) for states in (key, value))
    attended = scaled_dot_product_attention(query, key, value, attn_mask=allowed(rows))
    return attended.transpose(1, 2)


def attend_packed(rows: Rows, *states: torch.Tensor) -> torch.Tensor:
    output, weights = packed_attention(
        torch.nn.Module(), *states, None, packed_layout=lay_out(rows)
    )
    assert weights is None
    return output


@given(rows_of_prompts, st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]), st.integers(1, 60))
@settings(deadline=None)
def test_outputs_and_gradients_equal_those_of_masked_attention(
    rows: Rows, heads: tuple[int, int], keys_per_group: int
) -> None:
    states = draw_states(count_tokens(rows), *heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "KEYS_PER_GROUP", keys_per_group)
        found = attend_packed(rows, *states)
    expected = attend_masked(rows, *states)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours, plain = (
        torch.autograd.grad((output * weights).sum(), states) for output in (found, expected)
    )
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)


@given(rows_of_prompts, st.integers(1, 60))
def test_groups_hold_every_token_once(rows: Rows, keys_per_group: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "KEYS_PER_GROUP", keys_per_group)
        layout = lay_out(rows)
    assert torch.equal(layout.queries[layout.sources], torch.arange(count_tokens(rows)))
    for group in layout.groups:
        assert len(group.keys) == 1 or group.keys.numel() <= keys_per_group


def computed_scores(group: Group) -> int:
    return group.queries * group.keys.numel()


def shapes(layout: PackedLayout) -> list[tuple[int, int, int]]:
    """Return the segments, queries and keys of each group."""
    return [(len(group.keys), group.queries, group.keys.shape[1]) for group in layout.groups]


def test_scores_between_suffixes_are_not_computed() -> None:
    layout = lay_out([(100, [20] * 10)])
    assert shapes(layout) == [(1, 100, 100), (10, 20, 120)]
    assert sum(map(computed_scores, layout.groups)) == 100**2 + 10 * 20 * 120


def test_a_long_suffix_has_a_group_of_its_own() -> None:
    layout = lay_out([(100, [20, 90, 15, 20])])
    assert shapes(layout) == [(1, 100, 100), (1, 90, 190), (3, 20, 120)]


def test_a_prompt_that_is_the_prefix_has_no_suffix() -> None:
    layout = lay_out([(7, [0]), (5, [0, 0])])
    assert shapes(layout) == [(2, 7, 7)]
    assert layout.groups[0].mask is None


def test_a_layout_moves_as_the_batch_does() -> None:
    from accelerate.utils import send_to_device

    moved = send_to_device({"layout": lay_out([(3, [2, 1])])}, torch.device("meta"))["layout"]
    assert isinstance(moved, PackedLayout)
    masks = [group.mask for group in moved.groups if group.mask is not None]
    keys = [group.keys for group in moved.groups]
    tensors = [*masks, *keys, moved.queries, moved.sources]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_without_a_layout_it_is_the_attention_of_transformers() -> None:
    query, key, value = draw_states(6, 4, 2)
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    found, _ = packed_attention(module, query, key, value, mask)
    torch.testing.assert_close(found, attend_masked([(6, [])], query, key, value))


@pytest.mark.parametrize("layout", [lay_out([(3, [2, 1])]), None], ids=["packed", "plain"])
def test_scores_are_scaled_as_the_model_asks(layout: PackedLayout | None) -> None:
    query, key, value = draw_states(6, 2, 2)
    module: Any = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    mask = allowed([(3, [2, 1])])[None, None]
    found, _ = packed_attention(module, query, key, value, mask, scaling=0.1, packed_layout=layout)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.1)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-5, rtol=0)
