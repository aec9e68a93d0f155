"""Studies: series of DVC experiments, with a table and a figure of each."""

import sys

from mllm_msr.core.errors import end_imports_in_one_line

if sys.argv[0] == "-m":  # started by python -m mllm_msr.study, not imported by another program
    end_imports_in_one_line()
