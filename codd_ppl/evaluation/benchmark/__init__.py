"""The benchmark of the inference engine: other libraries and straightforward torch code on the same problems."""
