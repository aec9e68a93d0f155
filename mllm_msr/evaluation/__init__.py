"""Ranking metrics, paired tests, and the table that compares all scorers."""
