"""The CPUs that a process may use."""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """Return the number of CPUs that this process may use.

    A batch system lowers it by the process's affinity, a container by a quota (Linux, cgroup v2).
    """
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        cpus = len(os.sched_getaffinity(0))
    return int(min(cpus, _quota()))


def _quota() -> float:
    """Return the CPUs of a container's quota, rounded up; infinite without one."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return math.inf  # no container, or another system
    return math.inf if quota == "max" else max(1, math.ceil(int(quota) / int(period)))
