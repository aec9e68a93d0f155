"""Studies: series of DVC experiments, and the table and figure that come of each."""
