"""What a sampler wrote, and in which step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import token_edges
from codd_ppl.sampling.page import RevealedText, reveal_page
from codd_ppl.typing import Float, Int, Tensor

__all__ = ["Generation"]


@dataclass(frozen=True)
class Generation:
    """What a sampler wrote.

    Attributes:
        tokens: (batch, sites) int64, the template with every masked site written ((sites,) for such a template).
        nfe: number of network calls that it took; a call serves the whole batch.
        history: int64 of the shape of ``tokens``, the step (0 .. steps - 1, in the order of generation) in
            which a site was revealed, the last one where it was masked again; -1 where the template gave the token.
        confidence: float of the shape of ``tokens``, the coupled marginal probability p_i(x_i | xt) of each token in
            the step that drew it, 1 where the template gave it; None unless ``generate(record=True)``.
    """

    tokens: Int[Tensor, "*batch sites"]
    nfe: int
    history: Int[Tensor, "*batch sites"]
    confidence: Float[Tensor, "*batch sites"] | None = None

    def to_html(
        self,
        decode: Callable[[list[int]], str],
        graph: FactorGraph | None = None,
        title: str = "Reveal, step by step",
    ) -> str:
        """One self-contained page that plays the reveal (:func:`codd_ppl.sampling.page.reveal_page`).

        Args:
            decode: token ids -> text, such as ``tokenizer.decode``; asked for one token at a time.
            graph: of the coupling, for the arcs between tokens.
            title: of the page.
        """
        edges = () if graph is None else token_edges(graph)
        rows = zip(
            torch.atleast_2d(self.tokens).tolist(), torch.atleast_2d(self.history).tolist(), strict=True
        )
        sure = None if self.confidence is None else torch.atleast_2d(self.confidence).tolist()
        return reveal_page(
            [
                RevealedText(
                    [decode([token]) for token in row], steps, None if sure is None else sure[i], edges
                )
                for i, (row, steps) in enumerate(rows)
            ],
            title,
        )
