"""Measurements, never tests: machines are noisy."""
