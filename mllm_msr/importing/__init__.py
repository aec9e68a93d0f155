"""Import of models from other file formats into ordinary model folders."""
