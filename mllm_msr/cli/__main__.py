"""``python -m mllm_msr.cli``: the command line where ``mllm-msr`` is not on the path."""

from mllm_msr.cli import main

if __name__ == "__main__":
    main()
