"""Device, dtype and memory. They depend on the machine and are no settings of the pipeline.

The environment variables ``MLLM_MSR_DEVICE`` and ``MLLM_MSR_DTYPE`` override the automatic choice.
"""

import ctypes
import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from accelerate import PartialState

from mllm_msr.core.cpus import CGROUP, available_cpus
from mllm_msr.core.errors import ParamsError

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Below, float32 on a CPU is fast enough, and the figures of small models stay those of any machine.
LARGE_MODEL = 50_000_000  # parameters
# Of glibc's mallopt, which takes its largest threshold of this kind at 32 MiB.
M_TRIM_THRESHOLD, KEPT_BYTES = -1, 2**30
M_MMAP_THRESHOLD, LARGEST_KEPT = -3, 2**25


def find_device() -> torch.device:
    """Return this process's device: ``MLLM_MSR_DEVICE`` if set, else CUDA, MPS or the CPU.

    On a CPU, let torch use every core that the process may use (``accelerate launch`` restricts it
    to one), within the limits of a batch system or container. Several processes on CPUs know of
    each other only if accelerate is told at first that they are to use these.

    Raises:
        ParamsError: ``MLLM_MSR_DEVICE`` is not a device.
    """
    no_gpu = not torch.accelerator.is_available()
    state = PartialState(cpu=no_gpu or os.environ.get("MLLM_MSR_DEVICE") == "cpu")
    name = os.environ.get("MLLM_MSR_DEVICE", str(state.device))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ParamsError(
            expected="cpu, cuda, mps", got=name, where="MLLM_MSR_DEVICE", fix="set one of these"
        ) from error
    if device.type == "cpu":
        torch.set_num_threads(max(1, available_cpus() // state.num_processes))
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let the C library keep up to 1 GiB of freed memory for the next tensors; glibc only.

    By default it returns the memory of large tensors to the system at once, and each forward pays
    for new pages, which the system fills with zeros.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)


def find_device_for_small_steps() -> torch.device:
    """Return :func:`find_device`, and restrict torch to one CPU thread.

    With small networks, threads cost more in synchronization than they gain: on a busy machine,
    two threads took a hundred times as long as one on the pocket world. One thread also makes the
    sums independent of the number of cores.
    """
    device = find_device()
    torch.set_num_threads(1)
    return device


def find_dtype(device: torch.device, parameters: int) -> torch.dtype:
    """Return the dtype of the weights: ``MLLM_MSR_DTYPE`` if set, else bfloat16 where it pays.

    That is on a GPU that computes in bfloat16, and for large models on a CPU that does. Where
    bfloat16 is only emulated (T4, V100, most CPUs), it is slower and loses precision for nothing.

    Args:
        device: Of the model.
        parameters: Number of the model's parameters.

    Raises:
        ParamsError: ``MLLM_MSR_DTYPE`` is not a known dtype.
    """
    name = os.environ.get("MLLM_MSR_DTYPE")
    if name is None:
        return _choose_dtype(device, parameters)
    if name not in DTYPES:
        raise ParamsError(
            expected=", ".join(DTYPES), got=name, where="MLLM_MSR_DTYPE", fix="set one of these"
        )
    return DTYPES[name]


def _choose_dtype(device: torch.device, parameters: int) -> torch.dtype:
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type == "cpu" and parameters > LARGE_MODEL and _cpu_computes_bfloat16():
        log.warning(
            "computing in bfloat16: the model has %.0f million parameters and the CPU instructions"
            " for it; MLLM_MSR_DTYPE=float32 overrides this",
            parameters / 1e6,
        )
        return torch.bfloat16
    return torch.float32


def _cpu_computes_bfloat16() -> bool:
    """Return whether the CPU has AMX or AVX-512 instructions for products in bfloat16.

    Upstream: ``torch.cpu.get_capabilities``, which torch 2.11 lacks; there the answer is no.
    """
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def release_cached_memory(device: torch.device) -> None:
    """Return the memory that torch caches but does not use to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device, counting what torch caches but does not use as free."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return int(min(psutil.virtual_memory().available, _free_in_cgroup()))


def _free_in_cgroup() -> float:
    """Return the free bytes within a container's limit (Linux, cgroup v2); infinite without one."""
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf  # no container, or another system
    page_cache = int(dict(line.split() for line in lines)["inactive_file"])  # freed on demand
    return math.inf if limit == "max" else max(0, int(limit) - used + page_cache)


def max_forward_tokens(device: torch.device) -> int:
    """Return the most tokens of one forward pass that are efficient on a device.

    A CPU is fastest while a layer's activations stay in its caches. Free memory may allow fewer:
    see :attr:`mllm_msr.engines.budgets.Budget.tokens`.
    """
    return 1_024 if device.type == "cpu" else 8_192
