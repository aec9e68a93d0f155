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
KEYS_PER_GROUP = 32_768  # of several segments, at most: each suffix gets a copy of its prefix


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
        queries: Tokens of the longest segment.
        keys: Token indices of each segment's keys: its prefix, padded to the longest, and then the
            segment itself, padded likewise; (segments, keys).
        mask: True where a query attends, (segments, 1, queries, keys); None: causally.
    """

    queries: int
    keys: torch.Tensor
    mask: torch.Tensor | None


class PackedLayout(NamedTuple):
    """Which tokens of packed rows attend to which.

    Attributes:
        groups: All segments.
        queries: Token indices of the segments of all groups, one after the other, each padded to
            the longest of its group, (queries,).
        sources: The place of each token among the queries, (tokens,).
    """

    groups: list[Group]
    queries: torch.Tensor
    sources: torch.Tensor


def lay_out(rows: Sequence[tuple[int, Sequence[int]]]) -> PackedLayout:
    """Return the layout of rows that follow each other without padding.

    Args:
        rows: Of each row the length of its prefix, at least one, and those of its suffixes; 0 where
            a prompt is the prefix.
    """
    prefixes, suffixes = _segments(rows)
    grouped = [*_group(prefixes), *_group(suffixes)]
    sources = torch.empty(sum(segment.length for segment in prefixes + suffixes), dtype=torch.long)
    groups, queries, first = list[Group](), list[torch.Tensor](), 0
    for segments in grouped:
        of_queries, keys, mask = _index(segments)
        groups.append(Group(of_queries.shape[1], keys, mask))
        queries.append(of_queries.flatten())
        for segment in segments:
            places = torch.arange(first, first + segment.length)
            sources[segment.start : segment.start + segment.length] = places
            first += of_queries.shape[1]
    return PackedLayout(groups, torch.cat(queries), sources)


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
    gathered = query.index_select(0, packed_layout.queries)
    sizes = [len(group.keys) * group.queries for group in packed_layout.groups]
    outputs = [
        _attend(group, queries, key, value, dropout, scaling)
        for group, queries in zip(packed_layout.groups, torch.split(gathered, sizes), strict=True)
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
    """Attend within a group.

    Args:
        group: The group.
        query: Of its segments, (segments x queries, heads, width of a head).
        key: Of all tokens, (tokens, key heads, width of a head).
        value: As ``key``.
        dropout: Of attention weights.
        scaling: Of the scores.

    Returns:
        The output of its segments, of the shape of ``query``.
    """
    count, (heads, width), key_heads = len(group.keys), query.shape[1:], key.shape[1]
    query = query.view(count, -1, heads, width).transpose(1, 2)
    key, value = (
        states.index_select(0, group.keys.flatten()).view(count, -1, *states.shape[1:])
        for states in (key, value)
    )
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if group.mask is None:
        attended = scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True, **options
        )
    else:  # heads with the same keys become queries of one head, so that no key is repeated
        attended = scaled_dot_product_attention(
            query.reshape(count, key_heads, -1, width),
            key,
            value,
            attn_mask=group.mask.repeat(1, 1, heads // key_heads, 1),
            **options,
        ).reshape(count, heads, -1, value.shape[-1])
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


def _index(
    segments: Sequence[Segment],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the token indices of a group's queries and keys, and its mask.

    Returns:
        (segments, queries), (segments, keys) and (segments, 1, queries, keys); see :class:`Group`.
    """
    queries, _ = _pad([segment[:2] for segment in segments])
    if not segments[0].prefix_length:
        return queries, queries, None
    before, is_before = _pad([segment[2:] for segment in segments])
    count, longest = queries.shape
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.cat(
        [is_before[:, None].expand(-1, longest, -1), causal.expand(count, -1, -1)], dim=2
    )
    return queries, torch.cat([before, queries], dim=1), mask[:, None]


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
