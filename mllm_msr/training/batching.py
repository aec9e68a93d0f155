"""The order of training: groups of pairs, such as those of one image, in random order."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

BATCHES_SORTED = 16  # groups are sorted by length within a window of this many batches


class GroupSampler(Sampler[int]):
    """Yields every example once per epoch, some of each group in a row."""

    def __init__(
        self,
        groups: Sequence[Hashable],
        lengths: Sequence[int],
        together: int,
        batch_size: int,
        seed: int,
    ) -> None:
        """Take the groups and the size of batches.

        Args:
            groups: The group of each example, such as its image; None: a group of its own.
            lengths: Tokens of each example.
            together: Examples of a group in a row, at most.
            batch_size: Examples of a batch. Groups of a batch have similar numbers of examples and
                similar lengths, since a batch is padded to its longest row.
            seed: Of the order, together with the epoch.
        """
        super().__init__()
        self._groups, self._lengths, self._together = groups, lengths, together
        self._batch_size, self._seed, self._epoch = batch_size, seed, 0

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._groups)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Trainer calls it before each."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of the examples."""
        rng = np.random.default_rng([self._seed, self._epoch])
        order = self._sort(self._group(rng))
        size = max(self._batch_size, self._together)  # smaller batches share a group, in turn
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        full = len(order) // size  # a smaller last batch stays last
        for number in [*rng.permutation(full).tolist(), *range(full, len(batches))]:
            yield from batches[number]

    def _group(self, rng: np.random.Generator) -> list[list[int]]:
        """Return parts of groups, of at most ``together`` examples, in random order."""
        of_group = defaultdict(list)
        for index in rng.permutation(len(self._groups)).tolist():
            group = self._groups[index]
            of_group[index if group is None else (group,)].append(index)
        groups = [
            some[start : start + self._together]
            for some in of_group.values()
            for start in range(0, len(some), self._together)
        ]
        return [groups[number] for number in rng.permutation(len(groups)).tolist()]

    def _sort(self, groups: list[list[int]]) -> list[int]:
        """Sort groups by number of examples, and by length within a window of batches."""
        groups = sorted(groups, key=len)
        window = max(1, BATCHES_SORTED * self._batch_size // self._together)
        parts = [groups[start : start + window] for start in range(0, len(groups), window)]
        return [
            index
            for part in parts
            for group in sorted(part, key=lambda group: (len(group), self._tokens(group)))
            for index in group
        ]

    def _tokens(self, group: list[int]) -> int:
        return sum(self._lengths[index] for index in group)
