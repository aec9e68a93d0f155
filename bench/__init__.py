"""Benchmarks of speed and memory. They assert nothing, because machines are noisy."""
