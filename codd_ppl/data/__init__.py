"""A small text and a small model that come with the package, so that the demo and the tests need no download."""

from codd_ppl.data.sample import demo_model_path, sample_text_path

__all__ = ["demo_model_path", "sample_text_path"]
