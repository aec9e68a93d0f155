"""Images of items: recognised, decoded, and read from the table of images."""
