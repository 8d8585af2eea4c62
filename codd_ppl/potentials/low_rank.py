"""Pairwise tables of low rank, for trees over tokens of a large vocabulary."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn

from codd_ppl.errors import GraphError
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.rank import low_rank_edges
from codd_ppl.potentials.aspect_model import AspectModel, aspect_model
from codd_ppl.potentials.statistics import check_blocks, log_unigram, pair_counts
from codd_ppl.potentials.table import table_shapes
from codd_ppl.typing import Float, Int

__all__ = ["LowRankPotentials"]

LEAST = 1e-6
"""Share of the unigram in every component, so that no entry is -inf and training can move all of them."""


class LowRankPotentials(nn.Module):
    """psi(x, y) = sum_r exp(a[x, r] + b[r, y]) on every edge of a graph that ``topologies.low_rank`` made.

    The sum over r is the engine's, over the latent between the two tokens: (V + V) R for each edge. From a corpus, an
    edge starts at the ratio p(x, y) / (p(x) p(y)) of an aspect model of the pairs that occur, so that with ``evidence``
    (unigram log-frequencies, as in ``TablePotentials``) a tree is the Chow-Liu model of the text at that rank.
    Before, all entries are small random values around a constant psi.

    Args:
        graph: from ``topologies.low_rank``, all its factors being (token, latent) or (latent, token).
        seed: of the random start.

    Raises:
        GraphError: another kind of graph.
    """

    unigram: Tensor

    def __init__(self, graph: FactorGraph, seed: int = 0) -> None:
        super().__init__()
        edges = low_rank_edges(graph)
        if edges is None:
            raise GraphError(
                "LowRankPotentials needs a graph of token - latent - token edges only; make it with "
                "topologies.low_rank(tree, rank), or use TablePotentials"
            )
        self.graph = graph
        self._edges = edges
        self._keys = {name: f"table{i}" for i, name in enumerate(table_shapes(graph))}
        generator = torch.Generator().manual_seed(seed)
        self.tables = nn.ParameterDict()
        for name, shape in table_shapes(graph).items():
            latent = next(e.latent for e in edges if name in e.tables)
            start = 0.1 * torch.randn(shape, generator=generator)
            self.tables[self._keys[name]] = nn.Parameter(
                start - 0.5 * log(graph.variables[latent].cardinality)
            )
        tokens = {v.cardinality for v in graph if not v.latent}
        self.register_buffer("unigram", torch.zeros(tokens.pop() if len(tokens) == 1 else 0))

    def forward(self, hidden: Tensor | None = None) -> dict[str, Float[Tensor, "..."]]:
        """Factor or tie name -> a (vocab, rank) or b (rank, vocab), no batch dimensions; ``hidden`` is not read."""
        return {name: self.tables[key] for name, key in self._keys.items()}

    def evidence(self) -> Float[Tensor, "vocab"]:
        """Unigram log-frequencies of the corpus (zeros before :meth:`init_from_corpus`)."""
        return self.unigram

    def init_from_corpus(
        self,
        blocks: Int[Tensor, "blocks sites"],
        *,
        progress: bool = True,
        seed: int = 0,
        iterations: int = 60,
        pseudo_count: float | None = None,
    ) -> dict[str, AspectModel]:
        """Fit every edge to the pairs of its sites, pooled over a tie; only pairs that occur take memory.

        Args:
            blocks: (n, sites) int64.
            progress: not read; nothing is shown.
            seed: of the start of the aspect models.
            iterations: of EM, at most.
            pseudo_count: independent draws mixed in; the vocabulary's size if None.

        Returns:
            Name of the left table -> the aspect model, with its divergence from the counts at each step.

        Raises:
            ShapeError, TokenError: blocks that don't fit the graph.
            ConfigError: a setting out of range.
        """
        site = {name: i for i, name in enumerate(self.graph.tokens)}
        vocab = self.graph.variables[self.graph.tokens[0]].cardinality
        check_blocks(blocks, len(site), vocab)
        unigram = log_unigram(blocks, vocab)
        groups: dict[tuple[str, str], list[Tensor]] = {}
        for edge in self._edges:
            pairs = blocks[:, [site[edge.left], site[edge.right]]]
            groups.setdefault(edge.tables, []).append(pairs)
        found: dict[str, AspectModel] = {}
        for (left, right), group in groups.items():
            rank = self.tables[self._keys[left]].shape[1]
            cells, counts = pair_counts(torch.cat(group), vocab)
            model = aspect_model(cells, counts, unigram, rank, pseudo_count, iterations, seed=seed)
            a, b = (_log_ratio(model.weight, table, unigram) for table in (model.left, model.right))
            with torch.no_grad():
                self.tables[self._keys[left]].copy_(a.T)
                self.tables[self._keys[right]].copy_(b)
            found[left] = model
        with torch.no_grad():
            self.unigram.copy_(unigram)
        return found


def _log_ratio(weight: Tensor, table: Tensor, unigram: Tensor) -> Float[Tensor, "rank vocab"]:
    """log (weight^1/2 p(x | r) / p(x)), finite."""
    mixed = (1 - LEAST) * table + LEAST * unigram.exp()
    return 0.5 * weight.clamp(min=1e-12).log()[:, None] + mixed.log() - unigram
