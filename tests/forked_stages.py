"""Run stages in processes forked from this one, which has imported them.

Reads a JSON list per line, a stage and its arguments; prints its exit code, duration and output.
"""

import json
import sys

from bench import faults

if __name__ == "__main__":
    faults.import_everything()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(faults.execute(json.loads(line), counting=False)) + "\n")
        sys.stdout.flush()
