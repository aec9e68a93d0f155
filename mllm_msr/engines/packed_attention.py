"""Attention over packed rows that computes only what their tokens may attend to.

A token of a packed row attends to earlier tokens of the row's shared prefix and of its own suffix.
One attention over the whole row would compute the scores of all pairs of suffixes, only to mask
them. Instead prefixes attend causally to themselves, and each suffix to its prefix and itself, in
groups of similar length. The result is the same.

Upstream: :func:`packed_attention` is registered with transformers' public ``AttentionInterface``.
That models pass further arguments of their forward down to it is documented for this purpose.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "packed_sdpa"  # the name for set_attn_implementation
LAYOUT = "packed_layout"  # the argument of a model's forward with the layout of the rows
SHORTEST = 2 / 3  # of the longest segment of its group
KEYS_PER_GROUP = 32_768  # of several segments, at most: each suffix has a copy of its prefix


class Segment(NamedTuple):
    """A prefix, or the suffix of one prompt.

    Attributes:
        start: Index of its first token.
        length: Its tokens.
        prefix_start: Index of the first token of the prefix that a suffix attends to.
        prefix_length: Its tokens; 0 if the segment is a prefix itself.
    """

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


class Group(NamedTuple):
    """Segments of similar length that attend in one call.

    Attributes:
        queries: Token indices of the segments, padded to the longest, (segments, longest segment).
        keys: Token indices of the segments after those of their prefixes, each padded to the
            longest, (segments, longest prefix + longest segment).
        mask: True where a query attends, (segments, 1, longest segment, longest prefix + longest
            segment); None: causally.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None


class PackedLayout(NamedTuple):
    """Which tokens of packed rows attend to which.

    Attributes:
        groups: All segments.
        sources: The place of each token in the outputs of all groups, padding included, (tokens,).
    """

    groups: list[Group]
    sources: torch.Tensor


def lay_out(rows: Sequence[tuple[int, Sequence[int]]]) -> PackedLayout:
    """Return the layout of rows that follow each other without padding.

    Args:
        rows: Of each row the length of its prefix, at least one, and those of its suffixes; 0 where
            a prompt is the prefix.
    """
    prefixes, suffixes = _segments(rows)
    grouped = [*_group(prefixes), *_group(suffixes)]
    groups = [_make_group(segments) for segments in grouped]
    sources = torch.empty(sum(segment.length for segment in prefixes + suffixes), dtype=torch.long)
    first = 0
    for group, segments in zip(groups, grouped, strict=True):
        for segment in segments:
            places = torch.arange(first, first + segment.length)
            sources[segment.start : segment.start + segment.length] = places
            first += group.queries.shape[1]
    return PackedLayout(groups, sources)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: PackedLayout | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within packed rows; without a layout, as transformers' ``sdpa`` does.

    Args:
        module: The attention module.
        query: (1, heads, tokens, width of a head).
        key: (1, key heads, tokens, width of a head).
        value: As ``key``.
        attention_mask: Not read where there is a layout.
        dropout: Of attention weights.
        scaling: Of the scores.
        packed_layout: Of the rows.
        options: Further arguments of ``sdpa``.

    Returns:
        The output, (1, tokens, heads, width of a head), and no attention weights.
    """
    if packed_layout is None:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
        return output
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    outputs = [
        _attend(group, query, key, value, dropout, scaling) for group in packed_layout.groups
    ]
    return torch.cat(outputs).index_select(0, packed_layout.sources)[None], None


def _attend(
    group: Group,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Return the output of a group's tokens, (segments x longest segment, heads, width).

    Query, key and value are (tokens, heads, width) each.
    """
    queries, keys, values = (
        states.index_select(0, indices.flatten()).view(*indices.shape, *states.shape[1:])
        for states, indices in ((query, group.queries), (key, group.keys), (value, group.keys))
    )
    queries, keys, values = (states.transpose(1, 2) for states in (queries, keys, values))
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if group.mask is None:
        attended = scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=True, **options
        )
    else:  # heads with the same keys become queries of one head, so that no key is repeated
        count, heads, longest, width = queries.shape
        key_heads = keys.shape[1]
        attended = scaled_dot_product_attention(
            queries.reshape(count, key_heads, -1, width),
            keys,
            values,
            attn_mask=group.mask.repeat(1, 1, heads // key_heads, 1),
            **options,
        ).reshape(count, heads, longest, -1)
    return attended.transpose(1, 2).flatten(0, 1)


def _segments(
    rows: Sequence[tuple[int, Sequence[int]]],
) -> tuple[list[Segment], list[Segment]]:
    """Return the prefixes and the suffixes of rows; empty suffixes are left out."""
    prefixes, suffixes, start = list[Segment](), list[Segment](), 0
    for length, others in rows:
        prefixes.append(Segment(start, length))
        start += length
        for suffix in filter(None, others):
            suffixes.append(Segment(start, suffix, prefixes[-1].start, length))
            start += suffix
    return prefixes, suffixes


def _group(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Group segments of similar length."""
    group, longest_prefix = list[Segment](), 0
    for segment in sorted(segments, key=lambda segment: -segment.length):
        longest_prefix = max(longest_prefix, segment.prefix_length)
        if group and (
            segment.length < SHORTEST * group[0].length
            or (longest_prefix + group[0].length) * (len(group) + 1) > KEYS_PER_GROUP
        ):
            yield group
            group, longest_prefix = [], segment.prefix_length
        group.append(segment)
    if group:
        yield group


def _make_group(segments: Sequence[Segment]) -> Group:
    queries, _ = _pad([segment[:2] for segment in segments])
    if not segments[0].prefix_length:
        return Group(queries, queries, None)
    before, is_before = _pad([segment[2:] for segment in segments])
    count, longest = queries.shape
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.cat(
        [is_before[:, None].expand(-1, longest, -1), causal.expand(count, -1, -1)], dim=2
    )
    return Group(queries, torch.cat([before, queries], dim=1), mask[:, None])


def _pad(ranges: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token indices of ranges, and which of them are no padding.

    Args:
        ranges: Start and length of each.

    Returns:
        Two tensors, (ranges, longest range) each. The padding repeats the last token.
    """
    starts, lengths = torch.tensor(ranges).T[:, :, None]
    steps = torch.arange(int(lengths.max()))
    return starts + torch.minimum(steps, lengths - 1), steps < lengths


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
