"""One Typer command per stage of ``dvc.yaml``; a stage only wires calls into ``mllm_msr``."""

import os
import sys

from mllm_msr.core.errors import report_interrupts_on_one_line

# GNU OpenMP reads this when torch is loaded. After each operation its threads wait for each other
# by spinning, for milliseconds by default. On a busy machine that takes the core from the thread
# they wait for; on an idle one, microseconds of spinning are enough.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if sys.argv[0] == "-m":  # only while python -m starts a stage, not where a program imports one
    report_interrupts_on_one_line()
