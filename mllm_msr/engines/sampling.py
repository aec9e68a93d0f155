"""The order of training: pairs that show one image come together, and otherwise by chance."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

PAIRS_TOGETHER = 4  # of one image, at most; more would make a batch of too few different items


class SharedImageSampler(Sampler[int]):
    """Gives every example once an epoch, a few of the same image one after the other."""

    def __init__(self, images: Sequence[Hashable], seed: int) -> None:
        """Take each example's image; those without one, None, each stand alone.

        Args:
            images: Equal where an image is the same.
            seed: Of the order; another epoch has another order.
        """
        super().__init__()
        self._images, self._seed, self._epoch = images, seed, 0

    def __len__(self) -> int:
        """Count the examples."""
        return len(self._images)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; called before each."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Give the numbers of the examples."""
        chance = np.random.default_rng([self._seed, self._epoch])
        of_image = defaultdict(list)
        for index in chance.permutation(len(self._images)).tolist():
            image = self._images[index]
            of_image[index if image is None else (image,)].append(index)
        groups = [
            some[start : start + PAIRS_TOGETHER]
            for some in of_image.values()
            for start in range(0, len(some), PAIRS_TOGETHER)
        ]
        for number in chance.permutation(len(groups)).tolist():
            yield from groups[number]
