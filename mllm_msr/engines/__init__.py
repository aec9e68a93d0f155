"""The places where a model runs, and the store that remembers what models answered."""
