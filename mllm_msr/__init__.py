"""Multimodal sequential recommendation with multimodal large language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_msr.recommendation.recommender import Recommender

__version__ = "0.1.0"
__all__ = ["Recommender", "__version__"]


def __getattr__(name: str) -> Any:
    """Import :class:`Recommender` when it is first asked for, since it loads torch."""
    if name == "Recommender":
        return import_module("mllm_msr.recommendation.recommender").Recommender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
