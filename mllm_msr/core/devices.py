"""Device and dtype, chosen in one place; never a parameter of the pipeline.

``MLLM_MSR_DEVICE`` and ``MLLM_MSR_DTYPE`` override what is found.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from accelerate import PartialState

from mllm_msr.core.errors import ModelError, ParamsError

CONTAINER = Path("/sys/fs/cgroup")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a RuntimeError says where memory ran out: of MPS and other accelerators, of a CPU under Linux
# or macOS, under Windows, and of cuBLAS and cuDNN.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "STATUS_ALLOC_FAILED",
)


def find_device() -> torch.device:
    """Give this process's device: what the environment says, else CUDA, MPS or the CPU.

    On a CPU every core is used, which ``accelerate launch`` would otherwise restrict to one.

    Raises:
        ParamsError: ``MLLM_MSR_DEVICE`` is not a device.
    """
    state = PartialState()
    name = os.environ.get("MLLM_MSR_DEVICE", str(state.device))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ParamsError(
            expected="cpu, cuda, mps", got=name, where="MLLM_MSR_DEVICE", fix="set one of these"
        ) from error
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // state.num_processes))
    return device


def find_device_for_small_steps() -> torch.device:
    """Give the device as :func:`find_device`, and of a CPU one core.

    Steps of small networks lose more to threads that wait for each other than they gain: with other
    work on the machine, two threads took a hundred times as long on the pocket world. Sums, too,
    come out the same on any number of cores.
    """
    device = find_device()
    torch.set_num_threads(1)
    return device


def find_dtype(device: torch.device) -> torch.dtype:
    """Give the dtype of the weights: bfloat16 on CUDA, float32 elsewhere.

    A CUDA card that only imitates bfloat16 (T4, V100) gets float32: imitated, it is slower, and
    answers are less exact for it.

    Raises:
        ParamsError: ``MLLM_MSR_DTYPE`` is not a known dtype.
    """
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    name = os.environ.get("MLLM_MSR_DTYPE", "bfloat16" if has_bfloat16 else "float32")
    if name not in DTYPES:
        raise ParamsError(
            expected=", ".join(DTYPES), got=name, where="MLLM_MSR_DTYPE", fix="set one of these"
        )
    return DTYPES[name]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out; only CUDA has an exception of its own for it in torch."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in OUT_OF_MEMORY)


@contextlib.contextmanager
def memory_for(what: str, where: str, fix: str) -> Iterator[None]:
    """Say in one line what memory was too little for, and what to do.

    Raises:
        ModelError: Memory ran out within.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            expected=f"memory for {what}", got="too little", where=where, fix=fix
        ) from error


def return_memory(device: torch.device) -> None:
    """Give back what torch holds of a device's memory and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def free_memory(device: torch.device) -> int:
    """Count the bytes that are free on a device; what torch holds and does not use is free."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return int(min(psutil.virtual_memory().available, _free_in_container()))


def _free_in_container() -> float:
    """Count the bytes that a container's limit leaves (Linux, control groups of version 2)."""
    try:
        most = (CONTAINER / "memory.max").read_text(encoding="ascii").strip()
        used = int((CONTAINER / "memory.current").read_text(encoding="ascii"))
        lines = (CONTAINER / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf  # no container, or another system
    files = dict(line.split() for line in lines)["inactive_file"]  # given back when it is needed
    return math.inf if most == "max" else max(0, int(most) - used + int(files))


def most_tokens(device: torch.device) -> int:
    """Give the tokens of one forward that suit a device, whatever memory it has.

    A CPU is quickest while what a layer computes stays in its caches. What fits into memory besides
    is :attr:`mllm_msr.engines.budgets.Budget.tokens`.
    """
    return 1_024 if device.type == "cpu" else 8_192
