"""Scorers to compare with: from counting to collaborative neural models, all on one task."""
