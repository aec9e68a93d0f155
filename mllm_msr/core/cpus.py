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
    return min(cpus, _quota())


def _quota() -> int:
    """Return the CPUs of a container's quota, rounded up; a large number without one."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return 1 << 20  # no container, or another system
    return 1 << 20 if quota == "max" else max(1, math.ceil(int(quota) / int(period)))
