"""Recommendation by a finished run: retrieve from the whole catalogue, then rank by p(yes)."""
