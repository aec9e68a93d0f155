"""The order of training: pairs that share something come together, and otherwise by chance."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

BATCHES_SORTED = 16  # so many batches exchange groups until theirs are of like length


class GroupSampler(Sampler[int]):
    """Gives every example once an epoch, some of the same group one after the other."""

    def __init__(
        self,
        groups: Sequence[Hashable],
        lengths: Sequence[int],
        together: int,
        batch_size: int,
        seed: int,
    ) -> None:
        """Take each example's group; those without one, None, each stand alone.

        Args:
            groups: Such as the image of each pair.
            lengths: Tokens of each example.
            together: Examples of a group that come together, at most.
            batch_size: Examples of a batch. Its groups have as many examples each, of like length,
                since a batch is padded to its longest row.
            seed: Of the order; another epoch has another order.
        """
        super().__init__()
        self._groups, self._lengths, self._together = groups, lengths, together
        self._batch_size, self._seed, self._epoch = batch_size, seed, 0

    def __len__(self) -> int:
        """Count the examples."""
        return len(self._groups)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; called before each."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Give the numbers of the examples."""
        chance = np.random.default_rng([self._seed, self._epoch])
        order = self._sort(self._group(chance))
        size = max(self._batch_size, self._together)  # smaller batches share a group, in turn
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        whole = len(order) // size  # a last one with fewer examples stays the last
        for number in [*chance.permutation(whole).tolist(), *range(whole, len(batches))]:
            yield from batches[number]

    def _group(self, chance: np.random.Generator) -> list[list[int]]:
        """Put examples of one group together, in parts in random order."""
        of_group = defaultdict(list)
        for index in chance.permutation(len(self._groups)).tolist():
            group = self._groups[index]
            of_group[index if group is None else (group,)].append(index)
        groups = [
            some[start : start + self._together]
            for some in of_group.values()
            for start in range(0, len(some), self._together)
        ]
        return [groups[number] for number in chance.permutation(len(groups)).tolist()]

    def _sort(self, groups: list[list[int]]) -> list[int]:
        """Sort by number of examples, and by length those of the same few batches."""
        groups = sorted(groups, key=len)
        window = BATCHES_SORTED * self._batch_size // self._together
        parts = [groups[start : start + window] for start in range(0, len(groups), window)]
        return [
            index
            for part in parts
            for group in sorted(part, key=lambda group: (len(group), self._tokens(group)))
            for index in group
        ]

    def _tokens(self, group: list[int]) -> int:
        return sum(self._lengths[index] for index in group)
