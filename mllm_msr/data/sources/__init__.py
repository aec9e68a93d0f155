"""Readers of raw files, one per publisher's format.

To add a dataset: write a module here with a function of type :data:`Reader`, list it in
:data:`SOURCES`, and add its settings, if any, as a section of ``preprocess`` in
``mllm_msr/core/params.py``.
"""

from mllm_msr.data.sources import amazon, microlens, tables
from mllm_msr.data.sources.parsing import Reader

SOURCES: dict[str, Reader] = {
    "pocket": tables.read_pocket,
    "microlens": microlens.read,
    "amazon": amazon.read,
    "tables": tables.read,
}
"""The reader of each value of ``preprocess.source``.

But for ``prepared``: its tables need no cleaning (:mod:`mllm_msr.data.sources.contract`).
"""
