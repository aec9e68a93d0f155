"""LoRA adapters: the layers they may change, and strict loading.

peft only warns when an adapter's keys do not match the model, and the scores are then those of the
base model; here that is an error.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear
from peft.utils import load_peft_weights
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from mllm_msr.core.errors import ModelError
from mllm_msr.core.files import file_digest
from mllm_msr.core.params import LoraParams
from mllm_msr.engines.local import check_finite_weights

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # PEFT's format


class AdapterRecord(BaseModel):
    """The record of a trained adapter in ``training.json``.

    Attributes:
        steps: Optimizer steps of the training.
        model: Identity of the base model.
        lora: The adapter's settings.
        files: SHA-256 of each of its files.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    steps: Annotated[int, Field(ge=0)]
    model: str
    lora: LoraParams
    files: dict[str, str]


class FusedLinear(Linear):  # type: ignore[misc]
    """PEFT's linear layer with LoRA, with fewer passes over its output.

    PEFT computes the output of the base layer, that of the adapter, its product with the scaling
    and the sum: four tensors of the output's size. Here the scaling is applied to the ``rank``
    numbers of a token, and the adapter's product is added in place. Each result is that of PEFT
    up to rounding.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output; what the fused computation does not cover is PEFT's."""
        dtype = _autocast_dtype(x)
        if args or kwargs or not self._can_fuse(dtype):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,) = self.active_adapters
        base = self.get_base_layer()
        bias = None if base.bias is None else base.bias.to(dtype)
        down, up = self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)
        scaling = self.scaling[name]
        return _AddLora.apply(x.to(dtype), base.weight, bias, down, up, scaling)  # type: ignore[no-any-return, no-untyped-call]

    def _can_fuse(self, dtype: torch.dtype) -> bool:
        """Return whether one plain adapter without dropout is active on a frozen base layer."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (name,) = self.active_adapters
        weight = self.get_base_layer().weight
        return (
            name in self.lora_A
            and name not in self.lora_variant
            and self.lora_B[name].bias is None
            and not (self.training and isinstance(self.lora_dropout[name], nn.Dropout))
            and weight.dtype == dtype
            and not weight.requires_grad
        )


class _AddLora(torch.autograd.Function):
    """``x W^T + bias + scaling (x A^T) B^T``; W and bias have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Return the output for inputs of any shape (..., in).

        Args:
            ctx: Of autograd.
            x: Inputs.
            weight: Of the base layer, (out, in).
            bias: Of the base layer, (out,).
            down: The adapter's A, (rank, in).
            up: The adapter's B, (out, rank).
            scaling: Of the adapter's output.
        """
        tokens = x.reshape(-1, x.shape[-1])
        narrow = tokens.mm(down.t()).mul_(scaling)
        output = tokens.mm(weight.t()) if bias is None else bias.addmm(tokens, weight.t())
        ctx.save_for_backward(tokens, weight, down, up, narrow)
        ctx.scaling, ctx.shape = scaling, x.shape
        return output.addmm_(narrow, up.t()).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of inputs, A and B."""
        tokens, weight, down, up, narrow = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        of_narrow = gradient.mm(up).mul_(ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient.mm(weight).addmm_(of_narrow, down).view(ctx.shape)
        return of_x, None, None, of_narrow.t().mm(tokens), gradient.t().mm(narrow), None


def language_layers(model: PreTrainedModel, layers: Sequence[str]) -> str:
    """Return the regular expression for the language model's linear layers of some names.

    It matches no layer of vision tower or projector, even where these have the same names.

    Raises:
        ModelError: A name matches no linear layer of the language model.
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    linear = {
        name.rpartition(".")[2]
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear)
    }
    unknown = sorted(set(layers) - linear)
    if unknown or not layers:
        got = ", ".join(unknown) or "none"
        fix = "correct sft.lora.layers"
        raise ModelError(
            expected=f"layers among {', '.join(sorted(linear))}",
            got=got,
            where="sft.lora",
            fix=fix,
        )
    return rf"{re.escape(prefix)}\..*\.({'|'.join(map(re.escape, layers))})"


def add_adapter(
    model: PreTrainedModel, rank: int, alpha: int, dropout: float, layers: Sequence[str]
) -> PeftModel:
    """Add a new adapter to the language layers; it changes nothing until it is trained."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=language_layers(model, layers),
    )
    return _adapt(model, config)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load an adapter.

    Raises:
        ModelError: The folder has no safetensors adapter, a key does not match the model, or a
            number is infinite or NaN.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        fix = "run the stage sft"
        raise ModelError(
            expected="an adapter in safetensors", got="no such file", where=str(folder), fix=fix
        )
    try:
        config = LoraConfig.from_pretrained(str(folder))
        adapted = _adapt(model, config)
        weights = load_peft_weights(str(folder), device="cpu")
        check_finite_weights(weights.items(), str(folder))
        _compare_keys(set(get_peft_model_state_dict(adapted)), set(weights), folder)
        set_peft_model_state_dict(adapted, weights)
    except (ValueError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        raise _foreign(str(error), folder) from error
    return adapted


def cast_adapter(adapted: PeftModel, dtype: torch.dtype) -> None:
    """Cast an adapter's weights, so that its layers cast neither their inputs nor their outputs."""
    for name, weight in adapted.named_parameters():
        if adapted.base_model.prefix in name:
            weight.data = weight.data.to(dtype)


def adapter_identity(folder: Path) -> str:
    """Return the SHA-256 of an adapter's folder, which is part of response keys."""
    return file_digest(folder)


def record_adapter(folder: Path, model: str, lora: LoraParams) -> dict[str, object]:
    """Return the fields of an :class:`AdapterRecord` without ``steps``.

    Args:
        folder: Of the adapter.
        model: Identity of the base model.
        lora: The adapter's settings.
    """
    files = {name: file_digest(folder / name) for name in ADAPTER_FILES}
    return {"model": model, "lora": lora.model_dump(), "files": files}


def read_record(trained: Path) -> AdapterRecord:
    """Read ``training.json`` of the folder that the stage sft wrote.

    Raises:
        ModelError: It is missing, broken, or has no record of the adapter.
    """
    path = trained / "training.json"
    try:
        return AdapterRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ModelError(
            expected="a trained adapter",
            got="no such file",
            where=str(path),
            fix="run the stage sft",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        got = ": ".join([*map(str, first["loc"]), first["msg"]])
        fix = "run the stage sft again"
        raise ModelError(
            expected="the record of a trained adapter", got=got, where=str(path), fix=fix
        ) from error


def check_adapter(folder: Path, record: AdapterRecord) -> None:
    """Check that an adapter's files are the ones recorded after its training.

    Raises:
        ModelError: A file is missing or has changed since.
    """
    changed = [
        name
        for name in ADAPTER_FILES
        if not (folder / name).is_file() or file_digest(folder / name) != record.files.get(name)
    ]
    if changed:
        got = f"another {' and another '.join(changed)} than training.json records"
        fix = "run the stage sft again, or dvc checkout"
        raise ModelError(
            expected="the adapter that sft trained", got=got, where=str(folder), fix=fix
        )


def _adapt(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Add an adapter to a model.

    Upstream: ``peft.get_peft_model`` (peft>=0.21,<1) reads ``is_gradient_checkpointing``, which
    transformers deprecates with a warning that users can do nothing about. Layers of one's own are
    an experimental part of its interface; they are not saved. Quantized layers keep PEFT's, since
    they are subclasses of ``nn.Linear`` whose weights are packed.
    """
    if not getattr(model, "is_quantized", False):
        config._register_custom_module({nn.Linear: FusedLinear})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return get_peft_model(model, config)


def _autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that matrix products with a tensor have."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _compare_keys(expected: set[str], got: set[str], folder: Path) -> None:
    missing, unexpected = sorted(expected - got), sorted(got - expected)
    if missing or unexpected:
        report = (
            f"{len(missing)} missing ({', '.join(missing[:2])}) and"
            f" {len(unexpected)} unexpected ({', '.join(unexpected[:2])})"
        )
        raise _foreign(report, folder)


def _foreign(got: str, folder: Path) -> ModelError:
    fix = "it was trained for another model; run the stage sft for this one"
    return ModelError(
        expected="an adapter whose every key fits the model",
        got=got,
        where=str(folder),
        fix=fix,
    )
