"""Image features, computed once: what vision tower and projector make of each image.

Neither is ever trained here, so that an image's features are the same for all of its prompts.
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

from mllm_msr.core.devices import free_memory
from mllm_msr.engines.budgets import Budget
from mllm_msr.engines.encoding import Encoder
from mllm_msr.images.gallery import ImageRef

SHARE_OF_MEMORY = 4  # features take at most one part in four of what is free
IMAGES_AT_ONCE = 32
# Families whose outputs come apart by image; those of the others are computed one by one.
BATCHED = frozenset({"llava", "llava_next", "qwen2_5_vl"})


@dataclass(frozen=True)
class Features:
    """Of one image.

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

    def to(self, device: torch.device) -> "Features":
        """Move them; where they are on the device already, they are shared."""
        return Features(_move(self.tokens, device), [_move(layer, device) for layer in self.layers])


class Shelf:
    """Features in the memory of one device, as many as it has room for."""

    def __init__(self, device: torch.device, room: int) -> None:
        """Take so many bytes of a device."""
        self._device, self._room, self._taken, self._largest = device, room, 0, 0
        self._features: OrderedDict[str, Features] = OrderedDict()  # the latest used last

    def __contains__(self, digest: str) -> bool:
        """Tell whether an image's features are here."""
        return digest in self._features

    def __getitem__(self, digest: str) -> Features:
        """Give an image's features."""
        self._features.move_to_end(digest)
        return self._features[digest]

    def keep(self, features: Mapping[str, Features]) -> dict[str, Features]:
        """Keep features; gives those that were not used for longest, where room is lacking."""
        for digest, new in features.items():
            if digest not in self._features:
                self._features[digest] = new.to(self._device)
                self._taken += new.bytes
                self._largest = max(self._largest, new.bytes)
            self._features.move_to_end(digest)
        given_up = {}
        while self._taken > self._room:
            digest, oldest = self._features.popitem(last=False)
            self._taken -= oldest.bytes
            given_up[digest] = oldest
        return given_up

    def count_fitting(self) -> int | None:
        """Count the images that fit, by the largest features so far; None: there were none."""
        return self._room // self._largest if self._largest else None


class ImageFeatures:
    """Computes the features of images when they are first needed, and keeps what fits.

    What the model's device has no room for goes to the main memory, and comes back from there: of
    LLaVA-1.6 an image's features take 24 MB, so that a device holds some hundreds.

    Attributes:
        computed: How many images the vision tower has seen so far.
    """

    def __init__(
        self,
        encoder: Encoder,
        weights: PreTrainedModel,
        budget: Budget,
        room: int | None = None,
        main_room: int | None = None,
    ) -> None:
        """Take the model that sees.

        Args:
            encoder: The model's encoder, with the images.
            weights: The model.
            budget: What it may compute at once.
            room: Bytes that features may take on the model's device; None: a quarter of the memory
                that is free.
            main_room: Further ones in the main memory; None: likewise, or none where that is the
                device.
        """
        self.computed = 0
        self._encoder, self._model, self._budget = encoder, weights.base_model, budget
        main, device = torch.device("cpu"), weights.device
        if room is None:
            room = free_memory(device) // SHARE_OF_MEMORY
        if main_room is None:
            main_room = 0 if device.type == "cpu" else free_memory(main) // SHARE_OF_MEMORY
        self._near, self._far = Shelf(device, room), Shelf(main, main_room)
        self._coming: dict[str, ImageRef] = {}  # by digest, in order

    def expect(self, image_refs: Iterable[ImageRef]) -> None:
        """Say which images will be asked for, in order; some are then computed ahead.

        The vision tower is quicker with many at once than with the few of a forward.
        """
        self._coming |= {p.digest: p for p in image_refs if not self._knows(p.digest)}

    def of(self, image_refs: Sequence[ImageRef]) -> list[Features]:
        """Give the features of images, in their order."""
        found = {p.digest: self._find(p.digest) for p in image_refs if self._knows(p.digest)}
        missing = {p.digest: p for p in image_refs if p.digest not in found}
        for batch in self._batches(missing):
            found |= dict(zip((p.digest for p in batch), self._compute(batch), strict=True))
        self._far.keep(self._near.keep(found))
        return [found[image_ref.digest] for image_ref in image_refs]

    @contextlib.contextmanager
    def shown(self, image_refs: Sequence[ImageRef]) -> Iterator[None]:
        """Let the model's forward take these images' features instead of looking at pixels.

        Every family's forward gets them by ``self.get_image_features``; an argument for features
        that were computed before came only with transformers 5.2x.

        Args:
            image_refs: In the order of their tokens, row by row; one may be there several times.
        """
        found = self.of(image_refs)
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

    def _batches(self, missing: Mapping[str, ImageRef]) -> Iterator[list[ImageRef]]:
        """Cut images into batches that the vision tower takes at once, the last one filled up."""
        size = self._count_at_once()
        for digest in missing:
            self._coming.pop(digest, None)
        ahead = list(islice(self._coming, -len(missing) % size))
        image_refs = [*missing.values(), *map(self._coming.pop, ahead)]
        for start in range(0, len(image_refs), size):
            yield image_refs[start : start + size]

    def _count_at_once(self) -> int:
        """Count the images that the tower sees at once: as memory and room for features allow."""
        if self._encoder.config.model_type not in BATCHED:
            return 1
        most = self._budget.shrink(IMAGES_AT_ONCE)
        fitting = self._near.count_fitting()
        return most if fitting is None else max(1, min(most, fitting))

    def _knows(self, digest: str) -> bool:
        return digest in self._near or digest in self._far

    def _find(self, digest: str) -> Features:
        near = digest in self._near
        return self._near[digest] if near else self._far[digest].to(self._model.device)

    @torch.no_grad()
    def _compute(self, image_refs: Sequence[ImageRef]) -> list[Features]:
        outputs = look(self._encoder, self._model, image_refs)
        self.computed += len(image_refs)
        if len(image_refs) == 1:
            layers = list(getattr(outputs, "deepstack_features", None) or [])
            return [Features(outputs.pooler_output, layers)]
        return [Features([tokens.clone()], []) for tokens in outputs.pooler_output]


def look(encoder: Encoder, model: PreTrainedModel, image_refs: Sequence[ImageRef]) -> Any:
    """Give what vision tower and projector make of images, as the family's model has it.

    Args:
        encoder: The model's encoder, with the images.
        model: The model below its output layer.
        image_refs: At least one.

    Returns:
        ``last_hidden_state`` of the tower, over all patches, and the projector's
        ``pooler_output``.
    """
    pixels = {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in encoder.pixels(image_refs).items()
    }
    return model.get_image_features(**pixels, return_dict=True)


def _join(some: Sequence[Any]) -> Any:
    """Put the features of several images together, as the model would give them at once."""
    if torch.is_tensor(some[0]):
        return torch.cat(list(some))
    return [part for features in some for part in features]


def _move(features: Any, device: torch.device) -> Any:
    if torch.is_tensor(features):
        return features.to(device)
    return [part.to(device) for part in features]


def _parts(features: Any) -> Sequence[torch.Tensor]:
    return [features] if torch.is_tensor(features) else list(features)
