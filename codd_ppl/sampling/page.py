"""A page that plays how texts were written: one file, without a network or anything beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from codd_ppl.errors import ShapeError

__all__ = ["RevealedText", "reveal_page"]

DIGITS = 4


@dataclass(frozen=True)
class RevealedText:
    """What the page shows of one text.

    Attributes:
        pieces: string of each token, in reading order.
        history: the step in which each was written, from 0 on; -1: given.
        confidence: probability that each had when it was drawn; read where ``history`` is not -1.
        edges: pairs of places that the coupling ties (:func:`codd_ppl.graphs.properties.token_edges`).

    Raises:
        ShapeError: lengths that differ.
    """

    pieces: Sequence[str]
    history: Sequence[int]
    confidence: Sequence[float] | None = None
    edges: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        lengths = [len(self.pieces), len(self.history)]
        lengths += [] if self.confidence is None else [len(self.confidence)]
        if len(set(lengths)) > 1:
            raise ShapeError(
                f"expected as many steps (and confidences) as pieces, found {lengths}; decode every token by itself"
            )


def reveal_page(texts: Sequence[RevealedText], title: str = "Reveal, step by step") -> str:
    """HTML: the tokens of each text, masked at first, appear with a slider, the arrow keys or by themselves.

    Those of the step are outlined (they were drawn together), the colour is the confidence, and pointing at a token
    draws arcs to those that the coupling ties it to.

    Raises:
        ShapeError: no text.
    """
    if not texts:
        raise ShapeError("expected at least one text, found none; write some first")
    data = {"title": title, "samples": [_sample(text) for text in texts]}
    # in a script element only "<" can end the text too early
    found = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = files("codd_ppl.sampling").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", found)


def _sample(text: RevealedText) -> dict[str, Any]:
    count, sure = len(text.pieces), text.confidence
    return {
        "pieces": list(text.pieces),
        "history": list(text.history),
        "steps": max(text.history, default=-1) + 1,
        "confidence": None if sure is None else [round(min(max(c, 0.0), 1.0), DIGITS) for c in sure],
        "edges": [list(edge) for edge in text.edges if max(edge) < count],
    }
