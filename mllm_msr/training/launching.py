"""Starts a training as several processes where the machine or the user's configuration asks for it.

One process on one device needs no launcher, and none of its warnings.
"""

import os
import sys
from pathlib import Path

# Either is set in a process that accelerate or torchrun started.
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK")


def launch_processes(module: str) -> None:
    """Replace this process by ``accelerate launch``, or return where one process is right.

    A configuration that ``accelerate config`` wrote is used as it is. Without one there is a
    process for each GPU.

    Args:
        module: What ``python -m`` runs; it gets this process's arguments.
    """
    if any(name in os.environ for name in LAUNCHED):
        return
    # Only here: they load torch.
    import torch  # noqa: PLC0415
    from accelerate.commands.config.config_args import default_config_file  # noqa: PLC0415

    if Path(default_config_file).expanduser().is_file():
        options = []
    elif (gpus := torch.cuda.device_count()) > 1:
        # What accelerate would choose, and warn about.
        options = ["--multi_gpu", f"--num_processes={gpus}", "--num_machines=1"]
        options += ["--mixed_precision=no", "--dynamo_backend=no"]
    else:
        return
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *options]
    arguments = [*launcher, "-m", module, *sys.argv[1:]]
    # By DVC_STAGE each process would announce the stage again.
    environment = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    os.execve(sys.executable, arguments, environment)  # noqa: S606
