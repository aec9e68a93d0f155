"""Loads processors (tokenizer and image processor of a model) without torchvision.

The processors of Qwen2.5-VL, Qwen3-VL, SmolVLM and many other models contain a video processor,
which transformers builds only with torchvision. No prompt here has a video, so a processor is
assembled from its parts without the video processor. Image processors always use Pillow and NumPy:
pixel values are then the same whether or not torchvision is installed.

Upstream: assembling a processor relies on what ``AutoProcessor`` of
``transformers.models.auto.processing_auto`` does itself, transformers>=5.23,<6:

- ``get_processor_dict``, ``get_attributes``, ``from_args_and_dict`` and
  ``check_argument_for_proper_class`` of ``transformers.processing_utils.ProcessorMixin``;
- ``get_image_processor_config`` of ``transformers.models.auto.image_processing_auto``;
- ``is_dummy`` of classes whose library is not installed (``transformers.utils.import_utils``).

``AutoProcessor`` has no way to leave a part out.
"""

from collections.abc import Callable
from typing import Any, Never

import transformers
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.image_processing_auto import get_image_processor_config

from mllm_msr.core.errors import ModelError


def load_processor(
    folder_or_name: str, revision: str | None = None
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Load the processor of a model that takes images, or the tokenizer of one that does not.

    The model's configuration decides between the two; no code of the model's folder runs.

    Args:
        folder_or_name: Folder of a saved model, or its name on the hub.
        revision: Branch, tag or commit of a model on the hub; None: the main branch.

    Returns:
        A processor for text and images that refuses videos, or a tokenizer.

    Raises:
        ModelError: The installed transformers cannot build the processor's class.
        OSError: The model or one of its files does not exist.
    """
    config = AutoConfig.from_pretrained(
        folder_or_name, revision=revision or "main", trust_remote_code=False
    )
    if not takes_images(config):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder_or_name, revision=revision or "main", trust_remote_code=False
        )
        return tokenizer
    return _assemble_processor(config, folder_or_name, revision)


def takes_images(config: PretrainedConfig) -> bool:
    """Return whether a model of this configuration loads as an image-text-to-text model."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


class NoVideo:
    """Replaces the video processor of a processor; every call is an error."""

    model_input_names: tuple[str, ...] = ()
    num_frames = None
    fps = None
    _auto_class = None

    def __call__(self, *_: object, **__: object) -> Never:
        """Raise an error.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            expected="text and images only",
            got="a video",
            where="the model's processor",
            fix="send the frames as images, or leave the video out",
        )


class _ImagesOnly(ProcessorMixin):  # type: ignore[misc, unused-ignore]
    """Mixin that lets a processor class accept a :class:`NoVideo`."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> object:
        """Accept :class:`NoVideo`; let transformers check every other part."""
        if isinstance(argument, NoVideo):
            return NoVideo
        check: Callable[[str, object], object] = super().check_argument_for_proper_class
        return check(argument_name, argument)

    def to_dict(self) -> dict[str, Any]:
        """Return the processor's settings without the video processor."""
        description: dict[str, Any] = super().to_dict()
        description.pop("video_processor", None)
        return description


def _assemble_processor(
    config: PretrainedConfig, folder_or_name: str, revision: str | None
) -> ProcessorMixin:
    """Load the parts that the processor's class takes, and build it from them."""
    settings, _ = ProcessorMixin.get_processor_dict(folder_or_name, revision=revision or "main")
    processor_class = _find_processor_class(config, settings, folder_or_name, revision)
    list_parts: Callable[[], list[str]] = processor_class.get_attributes
    parts = {name: _load_part(name, folder_or_name, revision) for name in list_parts()}
    # Some models have the chat template in the tokenizer's settings only.
    settings.setdefault("chat_template", getattr(parts["tokenizer"], "chat_template", None))
    if "video_processor" in parts:
        processor_class = type(processor_class.__name__, (_ImagesOnly, processor_class), {})
    processor: ProcessorMixin = processor_class.from_args_and_dict(list(parts.values()), settings)
    return processor


def _find_processor_class(
    config: PretrainedConfig, settings: dict[str, Any], folder_or_name: str, revision: str | None
) -> type[ProcessorMixin]:
    """Find the class as ``AutoProcessor`` does: by processor settings, image settings, model type.

    Raises:
        ModelError: The class is not part of transformers, or needs a library that is missing.
    """
    image_settings = get_image_processor_config(folder_or_name, revision=revision or "main")
    name = settings.get("processor_class") or image_settings.get("processor_class")
    if name is None and type(config) in PROCESSOR_MAPPING:
        name = getattr(PROCESSOR_MAPPING[type(config)], "__name__", None)
    processor_class: type[ProcessorMixin] | None = getattr(transformers, name or "", None)
    if processor_class is None or getattr(processor_class, "is_dummy", False):
        raise ModelError(
            expected=f"a processor class that transformers {transformers.__version__} can build",
            got=name or f"none named for a {config.model_type} model",
            where=f"model {folder_or_name}",
            fix="choose a model that AutoProcessor loads without remote code",
        )
    return processor_class


def _load_part(name: str, folder_or_name: str, revision: str | None) -> object:
    """Load one part of a processor.

    Args:
        name: The argument of the processor's class that takes the part.
        folder_or_name: Folder or hub name of the model.
        revision: Branch, tag or commit of a hub model.

    Raises:
        ModelError: The part is neither tokenizer nor image, video or audio processor.
    """
    if name == "video_processor":
        return NoVideo()
    loaders: dict[str, tuple[Any, dict[str, str]]] = {
        "tokenizer": (AutoTokenizer, {}),
        "image_processor": (AutoImageProcessor, {"backend": "pil"}),
        "feature_extractor": (AutoFeatureExtractor, {}),
    }
    if name not in loaders:
        raise ModelError(
            expected="a processor made of a tokenizer and an image processor",
            got=f"one that also needs a {name}",
            where=f"model {folder_or_name}",
            fix="choose a model for text and images",
        )
    auto_class, settings = loaders[name]
    part: object = auto_class.from_pretrained(
        folder_or_name, revision=revision or "main", trust_remote_code=False, **settings
    )
    return part
