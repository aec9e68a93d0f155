"""Item images: format detection, decoding into one table, and reading from that table."""
