"""Raw files to sequences: readers of datasets, k-core, splits, histories, negative sampling."""
