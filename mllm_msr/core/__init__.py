"""Foundations of every other package: errors, atomic writes, settings, tables, devices."""
