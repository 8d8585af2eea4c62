"""Files that are never half there."""

from __future__ import annotations

import os
from pathlib import Path

from codd_ppl.folders import whole_file

__all__ = ["write_whole"]


def write_whole(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text under a temporary name in the same folder, and rename it; folders are made."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)
