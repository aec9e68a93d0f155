"""Raw files to sequences: readers of data sets, k-core, splits, histories, negative sampling."""
