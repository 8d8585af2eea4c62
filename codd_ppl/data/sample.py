"""Where the text and the model that come with the package lie."""

from importlib.resources import files
from pathlib import Path

__all__ = ["demo_model_path", "sample_text_path"]


def sample_text_path() -> Path:
    """The path of a text to try things on: about 590,000 characters of Shakespeare, as .txt.gz.

    The documents are speeches, between blank lines. Source and licence: ``codd_ppl/data/README.md``.
    """
    return Path(str(files("codd_ppl.data") / "tinyshakespeare_excerpt.txt.gz"))


def demo_model_path() -> Path:
    """The folder of the model that ``codd demo`` shows: a network and a coupling trained on the sample text.

    How it was made and what it reaches: ``models/tinyshakespeare_demo``.
    """
    return Path(str(files("codd_ppl.data") / "demo_model"))
