"""Studies: series of DVC experiments, and the table and figure that come of each."""

import sys

from mllm_msr.core.errors import report_interrupts_on_one_line

if sys.argv[0] == "-m":  # as the studies are being started by python -m, and in no other program
    report_interrupts_on_one_line()
