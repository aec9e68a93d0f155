"""Loading what turns prompts and images into a model's inputs, without torchvision.

The processors of Qwen2.5-VL, Qwen3-VL, SmolVLM and many other models hold a video processor, which
transformers builds only with torchvision. This project shows single images to a model and never a
video, so a processor is put together from its parts with the video part left out. Image parts
always run on Pillow and NumPy: pixel values are then the same on a machine that happens to have
torchvision and on one that does not.
"""

from collections.abc import Callable
from typing import Any, Never

import transformers
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

# From the module itself: in transformers 5.17 the package's name for it asks for torchvision.
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,
    get_image_processor_config,
)

from mllm_msr.core.errors import ModelError


def load_processor(
    folder_or_name: str, revision: str | None = None
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Load the processor of a model that takes images, or the tokenizer of one that does not.

    Which of the two is decided by the model's configuration, and no code of the checkout runs.

    Args:
        folder_or_name: Folder of a saved model, or its name on the hub.
        revision: Branch, tag or commit of a model on the hub; the main branch where not given.

    Returns:
        A processor for text and images that refuses videos, or a tokenizer.

    Raises:
        ModelError: The processor's class is not one that the installed transformers can build.
        OSError: The model, or one of its files, is not there.
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
    """Tell whether a model of this configuration loads as an image-and-text model."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


class NoVideo:
    """Stands where a processor holds its video processor, and refuses every use of it."""

    model_input_names: tuple[str, ...] = ()
    num_frames = None
    fps = None
    _auto_class = None

    def __call__(self, *_: object, **__: object) -> Never:
        """Refuse a video.

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
    """Lets a processor class be built around a :class:`NoVideo`."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> object:
        """Accept :class:`NoVideo`; leave every other part to transformers' own check."""
        if isinstance(argument, NoVideo):
            return NoVideo
        check: Callable[[str, object], object] = super().check_argument_for_proper_class
        return check(argument_name, argument)

    def to_dict(self) -> dict[str, Any]:
        """Describe the processor as it is saved, which is without a video part."""
        description: dict[str, Any] = super().to_dict()
        description.pop("video_processor", None)
        return description


def _assemble_processor(
    config: PretrainedConfig, folder_or_name: str, revision: str | None
) -> ProcessorMixin:
    """Load each part that the processor's class asks for and hand them to it, in its order."""
    settings, _ = ProcessorMixin.get_processor_dict(folder_or_name, revision=revision or "main")
    processor_class = _find_processor_class(config, settings, folder_or_name, revision)
    list_parts: Callable[[], list[str]] = processor_class.get_attributes
    parts = {name: _load_part(name, folder_or_name, revision) for name in list_parts()}
    # Some checkouts keep the chat template with the tokenizer alone.
    settings.setdefault("chat_template", getattr(parts["tokenizer"], "chat_template", None))
    if "video_processor" in parts:
        processor_class = type(processor_class.__name__, (_ImagesOnly, processor_class), {})
    processor: ProcessorMixin = processor_class.from_args_and_dict(list(parts.values()), settings)
    return processor


def _find_processor_class(
    config: PretrainedConfig, settings: dict[str, Any], folder_or_name: str, revision: str | None
) -> type[ProcessorMixin]:
    """Find the class where ``AutoProcessor`` does: processor settings, image settings, model type.

    Raises:
        ModelError: The class is none of transformers', or needs a library that is not installed.
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
    """Load one part of a processor by the name of the argument that takes it.

    Raises:
        ModelError: The part is of a kind that this project has no use for.
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
