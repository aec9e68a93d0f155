"""``python -m mllm_msr.store``: the same as ``mllm-msr store``."""

from mllm_msr.cli.store import main

if __name__ == "__main__":
    main()
