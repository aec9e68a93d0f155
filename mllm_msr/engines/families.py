"""Model families: everything that packing needs to know of a family, declared in one place.

A model belongs to a family by the ``model_type`` of its configuration; a multimodal model has a
second family, that of its language model. A model of an undeclared family works too: each prompt
runs whole, padded, with its image's pixels, as the model's own processor prepares it.

To add a family, append a :class:`ModelFamily` to :data:`FAMILIES` and a small model of it to
``tests/families.py``: tests compare its packed forwards with plain ones. ``docs/extending.md`` has
a worked example.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFamily:
    """What packing prompts with shared prefixes needs to know of a family of models.

    The language model's attention must depend on tokens and position ids alone, and the model must
    pass keyword arguments of its forward down to it, as transformers' own models do.

    Attributes:
        name: The family, as its publisher writes it.
        model_types: The values of ``model_type`` in the configurations of whole model and language
            model.
        takes_images: Whether the model has a vision tower, whose features can be computed once per
            image and passed to later forwards.
        batches_images: Whether the features of several images come as one tensor per image. If not,
            images are computed one at a time.
        layer_features: Whether the vision tower also has features for the first decoder layers
            (Qwen3-VL's DeepStack).
        image_token: The configuration's attribute with the id of the image token.
        mrope: Whether position ids have three axes (time, height and width; Qwen's M-RoPE). If not,
            they have one axis and count the tokens.
    """

    name: str
    model_types: tuple[str, ...]
    takes_images: bool = False
    batches_images: bool = False
    layer_features: bool = False
    image_token: str = "image_token_id"  # noqa: S105  # the name of an attribute
    mrope: bool = False

    @property
    def position_axes(self) -> int:
        """The number of axes of a position id."""
        return 3 if self.mrope else 1


FAMILIES: tuple[ModelFamily, ...] = (
    ModelFamily("Llama", ("llama",)),
    ModelFamily("Mistral", ("mistral",)),
    ModelFamily("Qwen2", ("qwen2",)),
    ModelFamily("LLaVA", ("llava",), takes_images=True, batches_images=True),
    ModelFamily("LLaVA-NeXT", ("llava_next",), takes_images=True, batches_images=True),
    ModelFamily("SmolVLM", ("smolvlm",), takes_images=True),
    ModelFamily(
        "Qwen2.5-VL",
        ("qwen2_5_vl", "qwen2_5_vl_text"),
        takes_images=True,
        batches_images=True,
        mrope=True,
    ),
    ModelFamily(
        "Qwen3-VL",
        ("qwen3_vl", "qwen3_vl_text"),
        takes_images=True,
        layer_features=True,
        mrope=True,
    ),
)


def find_family(config: PretrainedConfig) -> ModelFamily | None:
    """Return the family of a configuration, or None where none is declared; that is logged once.

    Args:
        config: Of a whole model, or of its language model.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    _log_undeclared(config.model_type)
    return None


def is_declared(config: PretrainedConfig) -> bool:
    """Return whether the families of a model and of its language model are both declared."""
    return all(find_family(part) for part in (config, config.get_text_config()))


def supports_packing(config: PretrainedConfig) -> bool:
    """Return whether prompts of a model can share rows.

    Its families must be declared, and every layer must attend to all tokens: a sliding window is
    counted in tokens of the row, which lie further apart in a packed row than in their prompt.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    full = set(kinds) == {"full_attention"} if kinds else not getattr(text, "sliding_window", None)
    return is_declared(config) and full


def image_token_id(config: PretrainedConfig) -> int:
    """Return the id of the token that stands for a patch of an image."""
    declared = [family for family in FAMILIES if config.model_type in family.model_types]
    return int(getattr(config, declared[0].image_token if declared else "image_token_id"))


def mrope_position_ids(
    model: Any, token_ids: torch.Tensor, is_image: torch.Tensor, grid: torch.Tensor | None
) -> torch.Tensor:
    """Return the M-RoPE position ids of one prompt, (3, tokens): time, height and width.

    Upstream: ``get_rope_index`` of ``transformers.models.qwen2_5_vl.modeling_qwen2_5_vl`` and its
    siblings, transformers>=5.23,<6. The model's forward calls it for whole prompts only; in a
    packed row each prompt needs the positions that it has alone.

    Args:
        model: The model below its output layer.
        token_ids: Of the prompt, (tokens,).
        is_image: True at tokens of the image, (tokens,).
        grid: Time steps, rows and columns of the image's patches, (1, 3); None without an image.
    """
    position_ids, _ = model.get_rope_index(
        token_ids[None], mm_token_type_ids=is_image[None].int(), image_grid_thw=grid
    )
    found: torch.Tensor = position_ids[:, 0]
    return found


@functools.cache
def _log_undeclared(model_type: str) -> None:
    log.warning(
        "model type %s: no family in mllm_msr/engines/families.py; prompts run whole, without"
        " shared prefixes",
        model_type,
    )
