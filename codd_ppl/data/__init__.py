"""A small text that comes with the package, so that the demo and the tests need no download."""

from codd_ppl.data.sample import sample_text_path

__all__ = ["sample_text_path"]
