"""Baselines that learn: their models, and how a trained one is kept and loaded again."""
