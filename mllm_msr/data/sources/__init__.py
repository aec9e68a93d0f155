"""One reader per publisher's format; all of them write the same three tables."""

from mllm_msr.data.sources import amazon, microlens, tables
from mllm_msr.data.sources.raw import Reader

SOURCES: dict[str, Reader] = {
    "pocket": tables.read_pocket,
    "microlens": microlens.read,
    "amazon": amazon.read,
    "tables": tables.read,
}
"""The reader behind each name of ``preprocess.source``."""
