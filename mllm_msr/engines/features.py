"""Image features, computed once: what vision tower and projector make of each picture.

Neither is ever trained here, so that a picture's features are the same for all of its prompts.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from mllm_msr.engines.budgets import Budget
from mllm_msr.engines.devices import free_memory
from mllm_msr.engines.encoding import Encoder
from mllm_msr.prompts import Picture

SHARE_OF_MEMORY = 4  # features take at most one part in four of what is free
PICTURES_AT_ONCE = 32
# Families whose outputs come apart by picture; those of the others are computed one by one.
BATCHED = frozenset({"llava", "llava_next", "qwen2_5_vl"})


@dataclass(frozen=True)
class Features:
    """Of one picture.

    Attributes:
        tokens: What replaces the image's tokens, as the family's model has it: a tensor, or one
            tensor per image.
        layers: What is added in each of the first decoder layers (Qwen3-VL), likewise.
    """

    tokens: Any
    layers: list[Any]

    @property
    def bytes(self) -> int:
        """How much memory the features take."""
        held = [part for some in (self.tokens, *self.layers) for part in _parts(some)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


class ImageFeatures:
    """Computes the features of pictures when they are first needed, and keeps what fits.

    Attributes:
        computed: How many pictures the vision tower has seen so far.
    """

    def __init__(
        self, encoder: Encoder, weights: PreTrainedModel, budget: Budget, room: int | None = None
    ) -> None:
        """Take the model that sees.

        Args:
            encoder: The model's encoder, with the pictures.
            weights: The model.
            budget: What it may compute at once.
            room: Bytes that features may take; None: a quarter of the memory that is free.
        """
        self.computed = 0
        self._encoder, self._model, self._budget = encoder, weights.base_model, budget
        self._room = free_memory(weights.device) // SHARE_OF_MEMORY if room is None else room
        self._kept: OrderedDict[str, Features] = OrderedDict()  # by digest, the latest used last
        self._taken = 0
        self._coming: dict[str, Picture] = {}  # by digest, in order

    def expect(self, pictures: Iterable[Picture]) -> None:
        """Say which pictures will be asked for, in order; some are then computed ahead.

        The vision tower is quicker with many at once than with the few of a forward.
        """
        self._coming |= {p.digest: p for p in pictures if p.digest not in self._kept}

    def of(self, pictures: Sequence[Picture]) -> list[Features]:
        """Give the features of pictures, in their order."""
        found = {p.digest: self._kept[p.digest] for p in pictures if p.digest in self._kept}
        missing = {p.digest: p for p in pictures if p.digest not in found}
        for batch in self._batches(missing):
            found |= dict(zip((p.digest for p in batch), self._compute(batch), strict=True))
        self._keep(found)
        return [found[picture.digest] for picture in pictures]

    @contextlib.contextmanager
    def shown(self, pictures: Sequence[Picture]) -> Iterator[None]:
        """Let the model's forward take these pictures' features instead of looking at pixels.

        Every family's forward gets them by ``self.get_image_features``; an argument for features
        that were computed before came only with transformers 5.2x.

        Args:
            pictures: In the order of their tokens, row by row; one may be there several times.
        """
        found = self.of(pictures)
        layers = zip(*(features.layers for features in found), strict=True)
        outputs = SimpleNamespace(
            pooler_output=_join([features.tokens for features in found]),
            deepstack_features=[_join(layer) for layer in layers],
        )
        self._model.get_image_features = lambda *_, **__: outputs
        try:
            yield
        finally:
            del self._model.get_image_features

    def _batches(self, missing: Mapping[str, Picture]) -> Iterator[list[Picture]]:
        """Cut pictures into batches that the vision tower takes at once, the last one filled up."""
        size = self._count_at_once()
        for digest in missing:
            self._coming.pop(digest, None)
        ahead = list(islice(self._coming, -len(missing) % size))
        pictures = [*missing.values(), *map(self._coming.pop, ahead)]
        for start in range(0, len(pictures), size):
            yield pictures[start : start + size]

    def _count_at_once(self) -> int:
        """Count the pictures that the tower sees at once: as memory and room for features allow."""
        if self._encoder.config.model_type not in BATCHED:
            return 1
        most = self._budget.shrink(PICTURES_AT_ONCE)
        if not self._kept:
            return most  # how large features are, the first ones say
        return max(1, min(most, self._room * len(self._kept) // self._taken))

    def _keep(self, features: Mapping[str, Features]) -> None:
        """Keep features, and forget those that were not used for longest where room is lacking."""
        for digest, new in features.items():
            if digest not in self._kept:
                self._kept[digest] = new
                self._taken += new.bytes
            self._kept.move_to_end(digest)
        while self._taken > self._room and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._taken -= oldest.bytes

    @torch.no_grad()
    def _compute(self, pictures: Sequence[Picture]) -> list[Features]:
        outputs = look(self._encoder, self._model, pictures)
        self.computed += len(pictures)
        if len(pictures) == 1:
            layers = list(getattr(outputs, "deepstack_features", None) or [])
            return [Features(outputs.pooler_output, layers)]
        return [Features([tokens.clone()], []) for tokens in outputs.pooler_output]


def look(encoder: Encoder, model: PreTrainedModel, pictures: Sequence[Picture]) -> Any:
    """Give what vision tower and projector make of pictures, as the family's model has it.

    Args:
        encoder: The model's encoder, with the pictures.
        model: The model below its output layer.
        pictures: At least one.

    Returns:
        ``last_hidden_state`` of the tower, over all patches, and the projector's
        ``pooler_output``.
    """
    pixels = {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in encoder.pixels(pictures).items()
    }
    return model.get_image_features(**pixels, return_dict=True)


def _join(some: Sequence[Any]) -> Any:
    """Put the features of several pictures together, as the model would give them at once."""
    if torch.is_tensor(some[0]):
        return torch.cat(list(some))
    return [part for features in some for part in features]


def _parts(features: Any) -> Sequence[torch.Tensor]:
    return [features] if torch.is_tensor(features) else list(features)
