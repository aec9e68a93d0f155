"""Baselines: scorers to compare with, from counting to neural networks, all on one task."""
