"""Multimodal sequential recommendation with multimodal large language models."""

__version__ = "0.1.0"
