"""Starts a training as several processes: one per GPU, or as ``accelerate config`` says.

One process on one device needs no launcher.
"""

import os
import sys
from pathlib import Path

# One of them is set in every process that accelerate or torchrun started.
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK")


def launch_processes(module: str) -> None:
    """Replace this process by ``accelerate launch``, or return where one process suffices.

    A configuration written by ``accelerate config`` is used as it is. Without one there is one
    process per GPU, unless ``MLLM_MSR_DEVICE`` names another device than all of them.

    Upstream: ``default_config_file`` of ``accelerate.commands.config.config_args`` and the module
    ``accelerate.commands.launch``, accelerate>=1.10,<2. accelerate has no function that returns
    whether the user has configured it.

    Args:
        module: The argument of ``python -m``; it receives this process's arguments.
    """
    if any(name in os.environ for name in LAUNCHED):
        return
    # Only here: they load torch.
    import torch  # noqa: PLC0415
    from accelerate.commands.config.config_args import default_config_file  # noqa: PLC0415

    if Path(default_config_file).expanduser().is_file():
        options = []
    elif (gpus := torch.cuda.device_count()) > 1 and _uses_all_gpus():
        # accelerate's own defaults, which it warns about where they are not spelled out.
        options = ["--multi_gpu", f"--num_processes={gpus}", "--num_machines=1"]
        options += ["--mixed_precision=no", "--dynamo_backend=no"]
    else:
        return
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *options]
    arguments = [*launcher, "-m", module, *sys.argv[1:]]
    # With DVC_STAGE each process would print the stage's first line again.
    environment = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    os.execve(sys.executable, arguments, environment)  # noqa: S606


def _uses_all_gpus() -> bool:
    """Return whether the environment leaves the choice of the GPU to each process."""
    return os.environ.get("MLLM_MSR_DEVICE", "cuda") == "cuda"
