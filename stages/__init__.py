"""One Typer command per stage of ``dvc.yaml``; each only wires library calls together."""

import os
import sys

from mllm_msr.core.errors import end_imports_in_one_line

# Read when torch is loaded (GNU's OpenMP, its own under Linux). Its threads meet after every
# operation and wait there by spinning, for milliseconds by default: with other work on the machine,
# the one that is waited for gets no core meanwhile. Microseconds are enough on a quiet one.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if sys.argv[0] == "-m":  # as a stage is being started by python -m, and in no other program
    end_imports_in_one_line()
