"""Training with sharded weights: FSDP2, ``fully_shard``, as an accelerate configuration asks.

The language model is sharded, decoder layer by decoder layer. Vision tower and projector are not:
they are small, frozen, and run outside the model's forward, once per image and not in all processes
at once. Checkpoints hold the adapter and its optimizer state unsharded, in the files of a training
without sharding, so a training may go on with another number of processes, sharded or not.

Upstream: attributes of ``accelerate.utils.FullyShardedDataParallelPlugin``, accelerate>=1.10,<2.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from mllm_msr.core.errors import ModelError

WHERE = "the configuration of accelerate"


def configure_sharding(
    plugin: FullyShardedDataParallelPlugin, weights: PreTrainedModel, four_bit: bool
) -> None:
    """Choose what is sharded, whatever the configuration says about it.

    Args:
        plugin: The configuration; it is changed.
        weights: The model below the adapter.
        four_bit: Whether the language model's weights are quantized to 4 bits.

    Raises:
        ModelError: FSDP1, or quantized weights, which cannot be sharded.
    """
    if plugin.fsdp_version != 2:
        fix = "set fsdp_config.fsdp_version to 2"
        raise ModelError(expected="FSDP2", got="FSDP1", where=WHERE, fix=fix)
    if four_bit:
        fix = "set recommender.four_bit to false, or use distributed_type: MULTI_GPU"
        raise ModelError(
            expected="weights that FSDP can shard", got="weights of 4 bits", where=WHERE, fix=fix
        )
    decoder = weights.get_decoder()
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted({type(one).__name__ for one in decoder.layers})
    plugin.cpu_ram_efficient_loading = False  # it knows sharded parameters only
    language = {*decoder.parameters(), *weights.get_output_embeddings().parameters()}
    others = [one for one in weights.parameters() if one not in language]
    plugin.ignored_modules = [nn.ParameterList(others)]


def gather_adapter(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """Return the adapter's weights unsharded; all processes must call it."""
    adapter = {name: one for name, one in adapted.state_dict().items() if "lora_" in name}
    return {name: _gather(one) for name, one in adapter.items()}


def load_adapter_weights(adapted: PeftModel, folder: Path) -> None:
    """Read the weights of an adapter in PEFT's format into a sharded one."""
    weights = load_peft_weights(str(folder), device="cpu")
    with torch.no_grad():
        for name, parameter in get_peft_model_state_dict(adapted).items():
            parameter.copy_(_shard(weights[name], parameter))


def gather_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state unsharded; all processes must call it."""
    state = optimizer.state_dict()
    gathered = {
        number: {name: _gather(value) for name, value in moments.items()}
        for number, moments in state["state"].items()
    }
    return state | {"state": gathered}


def shard_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """Return an unsharded state sharded as the optimizer's parameters are.

    It can be the optimizer's pre-hook of ``load_state_dict``.
    """
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    sharded = {
        number: {
            # The number of steps, a scalar, is the same in every process.
            name: _shard(value, parameters[number]) if value.dim() else value
            for name, value in moments.items()
        }
        for number, moments in state["state"].items()
    }
    return state | {"state": sharded}


def _gather(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _shard(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return value.to(like.device)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
