"""One file per baseline; a file that is put here is a baseline (docs/extending.md)."""
