"""A cache of image features: the output of vision tower and projector, computed once per image.

Neither part is ever trained here, so an image has the same features in all of its prompts.
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
from mllm_msr.engines.budgets import MEMORY_DIVISOR, Budget
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.families import ModelFamily
from mllm_msr.images.gallery import ImageRef

IMAGES_PER_BATCH = 32  # of the vision tower, at most


@dataclass(frozen=True)
class ImageFeatures:
    """The features of one image.

    Attributes:
        tokens: What replaces the embeddings of the image's tokens, in the form of the family's
            model: a tensor, or a list with one tensor per image.
        layers: What is added in each of the first decoder layers, in the same form; empty in
            families without ``layer_features``.
    """

    tokens: Any
    layers: list[Any]

    @property
    def bytes(self) -> int:
        """The memory that the features take."""
        tensors = [part for some in (self.tokens, *self.layers) for part in _tensors(some)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device) -> "ImageFeatures":
        """Move the features to a device; nothing is copied where they are on it already."""
        layers = [_move(layer, device) for layer in self.layers]
        return ImageFeatures(_move(self.tokens, device), layers)


class LruCache:
    """Image features in the memory of one device; the least recently used are evicted."""

    def __init__(self, device: torch.device, capacity: int) -> None:
        """Take a device and the capacity of its cache in bytes."""
        self._device, self._capacity = device, capacity
        self._used, self._largest = 0, 0
        self._features: OrderedDict[str, ImageFeatures] = OrderedDict()  # most recently used last

    def __contains__(self, digest: str) -> bool:
        """Return whether the features of an image are cached."""
        return digest in self._features

    def __getitem__(self, digest: str) -> ImageFeatures:
        """Return the features of an image."""
        self._features.move_to_end(digest)
        return self._features[digest]

    def add(self, features: Mapping[str, ImageFeatures]) -> dict[str, ImageFeatures]:
        """Add features by digest; return those that were evicted."""
        for digest, new in features.items():
            if digest not in self._features:
                self._features[digest] = new.to(self._device)
                self._used += new.bytes
                self._largest = max(self._largest, new.bytes)
            self._features.move_to_end(digest)
        evicted = {}
        while self._used > self._capacity:
            digest, oldest = self._features.popitem(last=False)
            self._used -= oldest.bytes
            evicted[digest] = oldest
        return evicted

    def count_fitting(self) -> int | None:
        """Return how many images fit, by the largest features so far; None before the first."""
        return self._capacity // self._largest if self._largest else None


class ImageFeatureCache:
    """Computes the features of images when they are first needed, and caches what fits.

    Features that the model's device has no room for move to main memory and are copied back from
    there: LLaVA-1.6 takes 24 MB for an image, so a device holds some hundreds. Once half of the
    main memory that was free at the start is in use, by any process, they are dropped instead.

    Attributes:
        computed: How many images the vision tower has computed so far.
    """

    def __init__(
        self,
        encoder: Encoder,
        weights: PreTrainedModel,
        family: ModelFamily,
        budget: Budget,
        capacity: int | None = None,
        main_capacity: int | None = None,
    ) -> None:
        """Take a model with a vision tower.

        Args:
            encoder: The model's encoder, with the images.
            weights: The model.
            family: The model's family.
            budget: Batch sizes.
            capacity: Bytes that features may take on the model's device; None: a quarter of its
                free memory.
            main_capacity: Further bytes in main memory; None: a quarter of what is free, or 0 where
                main memory is the model's device.
        """
        self.computed = 0
        self._encoder, self._model = encoder, weights.base_model
        self._family, self._budget = family, budget
        main, device = torch.device("cpu"), weights.device
        if capacity is None:
            capacity = free_memory(device) // MEMORY_DIVISOR
        if main_capacity is None:
            main_capacity = 0 if device.type == "cpu" else free_memory(main) // MEMORY_DIVISOR
        self._reserve = free_memory(main) // 2
        self._on_device, self._in_main = LruCache(device, capacity), LruCache(main, main_capacity)
        self._queue: dict[str, ImageRef] = {}  # by digest, in the order of their prompts

    def enqueue(self, image_refs: Iterable[ImageRef]) -> None:
        """Queue images that will be needed, in order, so that some are computed ahead.

        The vision tower is faster with many images at once than with the few of one forward.
        """
        self._queue |= {ref.digest: ref for ref in image_refs if not self._is_cached(ref.digest)}

    def get(self, image_refs: Sequence[ImageRef]) -> list[ImageFeatures]:
        """Return the features of images, in their order."""
        digests = [ref.digest for ref in image_refs]
        found = {digest: self._find(digest) for digest in digests if self._is_cached(digest)}
        missing = {ref.digest: ref for ref in image_refs if ref.digest not in found}
        for batch in self._batches(missing):
            computed = self._compute(batch)
            found |= dict(zip((ref.digest for ref in batch), computed, strict=True))
        evicted = self._on_device.add(found)
        if evicted and free_memory(torch.device("cpu")) > self._reserve:
            self._in_main.add(evicted)
        return [found[digest] for digest in digests]

    @contextlib.contextmanager
    def injected(self, image_refs: Sequence[ImageRef]) -> Iterator[None]:
        """Let the model's forward take these images' features instead of computing pixels.

        Upstream: the forward of every multimodal model calls ``self.get_image_features``,
        transformers>=5.23,<6. It is replaced for the block, because an argument for precomputed
        features exists only in later releases of this range.

        Args:
            image_refs: In the order of their tokens, row by row; an image may occur several times.
        """
        found = self.get(image_refs)
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
        """Cut images into batches of the vision tower; queued images fill the last one up."""
        size = self._batch_size()
        for digest in missing:
            self._queue.pop(digest, None)
        ahead = list(islice(self._queue, -len(missing) % size))
        image_refs = [*missing.values(), *map(self._queue.pop, ahead)]
        for start in range(0, len(image_refs), size):
            yield image_refs[start : start + size]

    def _batch_size(self) -> int:
        """Return how many images the vision tower takes at once; no more than the cache holds."""
        if not self._family.batches_images:
            return 1
        largest = self._budget.scale(IMAGES_PER_BATCH)
        fitting = self._on_device.count_fitting()
        return largest if fitting is None else max(1, min(largest, fitting))

    def _is_cached(self, digest: str) -> bool:
        return digest in self._on_device or digest in self._in_main

    def _find(self, digest: str) -> ImageFeatures:
        if digest in self._on_device:
            return self._on_device[digest]
        return self._in_main[digest].to(self._model.device)

    @torch.no_grad()
    def _compute(self, image_refs: Sequence[ImageRef]) -> list[ImageFeatures]:
        outputs = compute_image_features(self._encoder, self._model, image_refs)
        self.computed += len(image_refs)
        if len(image_refs) == 1:
            layers = list(outputs.deepstack_features) if self._family.layer_features else []
            return [ImageFeatures(outputs.pooler_output, layers)]
        return [ImageFeatures([tokens.clone()], []) for tokens in outputs.pooler_output]


def compute_image_features(
    encoder: Encoder, model: PreTrainedModel, image_refs: Sequence[ImageRef]
) -> Any:
    """Run vision tower and projector on images.

    Args:
        encoder: The model's encoder, with the images.
        model: The model below its output layer.
        image_refs: At least one.

    Returns:
        The output of the model's ``get_image_features``: ``last_hidden_state`` of the tower, over
        all patches, and ``pooler_output`` of the projector.
    """
    pixels = {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in encoder.pixels(image_refs).items()
    }
    return model.get_image_features(**pixels, return_dict=True)


def _join(features: Sequence[Any]) -> Any:
    """Join the features of several images as the model returns them for a batch."""
    if torch.is_tensor(features[0]):
        return torch.cat(list(features))
    return [tensor for of_image in features for tensor in of_image]


def _move(features: Any, device: torch.device) -> Any:
    if torch.is_tensor(features):
        return features.to(device)
    return [tensor.to(device) for tensor in features]


def _tensors(features: Any) -> Sequence[torch.Tensor]:
    return [features] if torch.is_tensor(features) else list(features)
