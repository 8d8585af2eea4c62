"""A page that plays how a text was revealed: one file, without a network or anything beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files

from codd_ppl.errors import ShapeError
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import token_edges
from codd_ppl.typing import Float, Int, Tensor

__all__ = ["reveal_page"]

DIGITS = 4


def reveal_page(
    pieces: Sequence[Sequence[str]],
    history: Int[Tensor, "batch sites"],
    *,
    steps: int | None = None,
    confidence: Float[Tensor, "batch sites"] | None = None,
    graph: FactorGraph | None = None,
    title: str = "Reveal, step by step",
) -> str:
    """HTML: the tokens of each sample, masked at first, appear with a slider, the arrow keys or by themselves.

    Those of the step are outlined (they were drawn together), the colour is the confidence, and pointing at a token
    draws arcs to those that the coupling ties it to.

    Args:
        pieces: for every sample the string of each of its tokens, in reading order.
        history: the step in which each was revealed, 0 .. steps - 1; -1: given (``Generation.history``).
        steps: number of reverse steps; None: as many as ``history`` has.
        confidence: probability that each token had when it was drawn; read where ``history`` is not -1.
        graph: of the coupling, for the arcs (see :func:`codd_ppl.graphs.properties.token_edges`).
        title: of the page.

    Raises:
        ShapeError: pieces, history and confidence that don't go together, or no sample.
    """
    shape = tuple(history.shape)
    if len(shape) != 2 or not shape[0] or [len(row) for row in pieces] != [shape[1]] * shape[0]:
        raise ShapeError(
            f"expected history of shape (batch, sites) and as many pieces, found {shape} and rows of "
            f"{sorted({len(row) for row in pieces})} pieces in {len(pieces)} samples; decode every token by itself"
        )
    if confidence is not None and tuple(confidence.shape) != shape:
        raise ShapeError(f"confidence: expected {shape} as history has, found {tuple(confidence.shape)}")
    samples = [
        {
            "pieces": list(row),
            "steps": history[i].tolist(),
            "confidence": None if confidence is None else _rounded(confidence[i]),
        }
        for i, row in enumerate(pieces)
    ]
    last = int(history.max()) + 1
    data = {
        "title": title,
        "steps": last if steps is None else max(steps, last),
        "edges": [] if graph is None else _inside(token_edges(graph), shape[1]),
        "samples": samples,
    }
    # in a script element only "<" can end the text too early
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = files("codd_ppl.sampling").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", text)


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), DIGITS) for value in values.nan_to_num(0.0).clamp(0.0, 1.0)]


def _inside(edges: Iterable[tuple[int, int]], sites: int) -> list[list[int]]:
    return [[a, b] for a, b in edges if a < sites and b < sites]
