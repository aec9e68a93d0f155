"""What a command says, and how much memory it takes."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[1]


def measured(command: Sequence[str]) -> tuple[str, int]:
    """Run a command in the project; gives its output and the most memory it took, in kilobytes.

    It is started by a small process: a process's peak counts that of whoever started it, which
    here is a run of tests.
    """
    measure = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        " print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    words = [sys.executable, "-c", measure, *command]
    done = subprocess.run(words, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True)
    *said, peak = done.stdout.splitlines(keepends=True)
    return "".join(said), int(peak)
