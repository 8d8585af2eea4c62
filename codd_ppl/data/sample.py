"""Where the text that comes with the package lies."""

from importlib.resources import files
from pathlib import Path

__all__ = ["sample_text_path"]


def sample_text_path() -> Path:
    """The path of a text to try things on: about 590,000 characters of Shakespeare, as .txt.gz.

    The documents are speeches, between blank lines. Source and licence: ``codd_ppl/data/README.md``.
    """
    return Path(str(files("codd_ppl.data") / "tinyshakespeare_excerpt.txt.gz"))
