"""Recommendations of a finished run over HTTP: ``mllm-msr serve``."""
