"""The schedule of a training: its epochs and validations, pass by pass.

A training takes its passes from here, and a dry run counts them.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from mllm_msr.training.batching import GroupSampler


class Pass(NamedTuple):
    """One pass over examples.

    Attributes:
        trains: Whether it is an epoch of training, else a validation.
        examples: Indices of the training or validation examples, in the order of the pass.
    """

    trains: bool
    examples: Sequence[int]


def count_validations(epochs: int) -> int:
    """Return the validations of a :class:`Schedule`."""
    return epochs + 1 if epochs else 0


class Schedule:
    """The passes of a training: a validation before the first epoch, and one after each."""

    def __init__(self, epochs: int, order: GroupSampler, validation: int) -> None:
        """Take the parts of a schedule; no pass is taken yet.

        Args:
            epochs: Number of epochs; with none there is no pass at all.
            order: The order of the training examples in each epoch.
            validation: Number of validation examples.
        """
        self.training_examples = len(order)
        self._epochs, self._order, self._validation = epochs, order, validation
        self._left = iter(self)

    def __iter__(self) -> Iterator[Pass]:
        """Yield all passes, taken or not."""
        for epoch in range(self._epochs):
            if epoch == 0:
                yield Pass(False, range(self._validation))
            self._order.set_epoch(epoch)
            yield Pass(True, list(self._order))
            yield Pass(False, range(self._validation))

    def start(self, epoch: float, validated: bool) -> bool:
        """Let the passes that were done before a checkpoint be taken.

        Args:
            epoch: Epochs trained at the checkpoint; a fraction within an epoch.
            validated: Whether the validation after these epochs is done.

        Returns:
            Whether a validation is next.
        """
        done = 2 * int(epoch) + (validated or epoch % 1 > 0)
        self._left = islice(self, done, None)
        return not done % 2

    def take(self, trains: bool) -> Sequence[int]:
        """Return the examples of the next pass.

        Args:
            trains: Whether an epoch of training begins, else a validation; the next pass is one.
        """
        taken = next(self._left, None)
        assert taken is not None, "a training after the end of its schedule"
        assert taken.trains == trains, "a training that does not follow its schedule"
        return taken.examples

    def is_done(self) -> bool:
        """Return whether every pass was taken."""
        return next(self._left, None) is None
