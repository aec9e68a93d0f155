"""Output and peak memory of a command."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[1]


def measured(command: Sequence[str]) -> tuple[str, int]:
    """Run a command in the project; return its output and its peak memory in kilobytes.

    A small process starts the command, because a child's peak includes that of its parent, here the
    whole run of tests.
    """
    measure = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        " print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    words = [sys.executable, "-c", measure, *command]
    done = subprocess.run(words, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True)
    *output, peak = done.stdout.splitlines(keepends=True)
    return "".join(output), int(peak)
