"""How much memory a command takes."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[1]


def peak_of(command: Sequence[str]) -> int:
    """Run a command in the project; gives the most memory that it took, in kilobytes.

    It is started by a small process: a process's peak counts that of whoever started it, which
    here is a run of tests.
    """
    measure = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2);"
        " print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    words = [sys.executable, "-c", measure, *command]
    return int(subprocess.run(words, cwd=PROJECT, check=True, stdout=subprocess.PIPE).stdout)
