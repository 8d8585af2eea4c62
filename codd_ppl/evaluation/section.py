"""The part of a hand-written page that is generated: what stands between two marks, each on a line of its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from textwrap import fill

from codd_ppl.errors import DataError

__all__ = ["BEGIN", "END", "paragraphs", "with_section"]

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def with_section(path: Path, section: str, title: str) -> str:
    """The text of the page with this section between its marks; the rest as it is.

    A page without marks gets them at its end; a page that is missing starts with the title.

    Raises:
        DataError: one mark without the other, twice, or in the wrong order.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {title}\n"
    lines = text.splitlines()
    begins, ends = ([i for i, line in enumerate(lines) if line.strip() == mark] for mark in (BEGIN, END))
    middle = [BEGIN, *section.strip("\n").splitlines(), END]
    if not begins and not ends:
        return "\n".join([*text.rstrip().splitlines(), "", *middle]) + "\n"
    if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0]:
        raise DataError(
            f"{path}: expected {BEGIN} and below it {END}, each once, found them on the lines "
            f"{[i + 1 for i in begins]} and {[i + 1 for i in ends]}; mend the page, or delete both for new ones"
        )
    return "\n".join([*lines[: begins[0]], *middle, *lines[ends[0] + 1 :]]) + "\n"


def paragraphs(parts: Iterable[str]) -> str:
    """Parts of a page with a blank line between them; prose is wrapped, tables, code and pictures are left alone."""
    return "\n\n".join(
        part if part[0] in "|`!" else fill(part, 118, break_on_hyphens=False) for part in parts
    )
