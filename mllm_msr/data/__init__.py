"""From a publisher's raw files to sequences and their candidates."""
