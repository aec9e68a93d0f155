"""The order of training: pairs that show one image come together, and otherwise by chance."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

PAIRS_TOGETHER = 4  # of one image, at most; more would make a batch of too few different items
BATCHES_SORTED = 16  # so many batches exchange groups until theirs are of like size


class SharedImageSampler(Sampler[int]):
    """Gives every example once an epoch, a few of the same image one after the other."""

    def __init__(self, images: Sequence[Hashable], batch_size: int, seed: int) -> None:
        """Take each example's image; those without one, None, each stand alone.

        Args:
            images: Equal where an image is the same.
            batch_size: Examples of a batch. Its groups are of like size, since a batch is padded
                to its longest row.
            seed: Of the order; another epoch has another order.
        """
        super().__init__()
        self._images, self._batch_size = images, batch_size
        self._seed, self._epoch = seed, 0

    def __len__(self) -> int:
        """Count the examples."""
        return len(self._images)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; called before each."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Give the numbers of the examples."""
        chance = np.random.default_rng([self._seed, self._epoch])
        order = self._sort_within_reach(self._group(chance))
        size = max(self._batch_size, PAIRS_TOGETHER)  # smaller batches share a group, in turn
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        whole = len(order) // size  # a last one with fewer examples stays the last
        for number in [*chance.permutation(whole).tolist(), *range(whole, len(batches))]:
            yield from batches[number]

    def _group(self, chance: np.random.Generator) -> list[list[int]]:
        """Put examples of one image together, in groups in random order."""
        of_image = defaultdict(list)
        for index in chance.permutation(len(self._images)).tolist():
            image = self._images[index]
            of_image[index if image is None else (image,)].append(index)
        groups = [
            some[start : start + PAIRS_TOGETHER]
            for some in of_image.values()
            for start in range(0, len(some), PAIRS_TOGETHER)
        ]
        return [groups[number] for number in chance.permutation(len(groups)).tolist()]

    def _sort_within_reach(self, groups: list[list[int]]) -> list[int]:
        """Sort by size, but only groups of the same few batches; gives the examples."""
        window = BATCHES_SORTED * self._batch_size // PAIRS_TOGETHER
        parts = [groups[start : start + window] for start in range(0, len(groups), window)]
        return [index for part in parts for group in sorted(part, key=len) for index in group]
