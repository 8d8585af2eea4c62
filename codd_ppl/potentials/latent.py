"""Conditional probability tables along a directed forest: hidden Markov models, latent trees, mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from codd_ppl.errors import GraphError
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import directed_parents
from codd_ppl.inference.kept import MEMORY, keepable
from codd_ppl.potentials.baum_welch import baum_welch
from codd_ppl.potentials.table import fill_tables, table_shapes
from codd_ppl.potentials.trace import Trace
from codd_ppl.typing import Float, Int

__all__ = ["LatentPotentials"]


class LatentPotentials(nn.Module):
    """log psi(parent, child) = log P(child | parent), so that the graph is a normalised prior over text.

    Every table is the log-softmax of free parameters over its last axis, the child's (``initial``: its only axis):
    the partition function of the prior is 1 (times the number of values of every root that has no unary factor).

    Args:
        graph: a directed forest (scopes (parent, child), unary factors on roots only), such as
            ``topologies.hidden_markov``, ``latent_tree`` or ``star(states=..)``.
        seed: of the random start.

    Raises:
        GraphError: scopes that don't read as a directed forest.
    """

    def __init__(self, graph: FactorGraph, seed: int = 0) -> None:
        super().__init__()
        if directed_parents(graph) is None:
            raise GraphError(
                "LatentPotentials needs scopes that read (parent, child) along a directed forest, one parent for each "
                "variable, with unary factors on roots only; reorder the scopes, or use TablePotentials"
            )
        self.graph = graph
        self._keys = {name: f"table{i}" for i, name in enumerate(table_shapes(graph))}
        generator = torch.Generator().manual_seed(seed)
        self.tables = nn.ParameterDict(
            {
                self._keys[name]: nn.Parameter(torch.randn(shape, generator=generator).mul_(0.5))
                for name, shape in table_shapes(graph).items()
            }
        )

    def forward(self, hidden: Tensor | None = None) -> dict[str, Float[Tensor, "..."]]:
        """Factor or tie name -> log-probabilities, without batch dimensions; ``hidden`` is not read.

        Without gradients those of a large table are kept until its parameters change.
        """
        return {name: _log_softmax(self.tables[key]) for name, key in self._keys.items()}

    def evidence(self) -> None:
        """None: the conditional tables are a complete prior."""
        return None

    def init_from_corpus(
        self, blocks: Int[Tensor, "blocks sites"], *, progress: bool = True, seed: int = 0, **settings: Any
    ) -> Trace:
        """Fit the prior to text by Baum-Welch; interrupting it keeps what was reached.

        Args:
            blocks: (n, sites) int64.
            progress: show a progress bar.
            seed: of the start and the order of the blocks.
            settings: passed to :func:`codd_ppl.potentials.baum_welch` (epochs, batch_size, start, ...).

        Returns:
            The trace of the log-likelihood, nats per token.

        Raises:
            ShapeError, TokenError: blocks that don't fit the graph.
        """
        tables, trace = baum_welch(self.graph, blocks, progress=progress, seed=seed, **settings)
        self.start_from(tables)
        if trace.interrupted:
            raise KeyboardInterrupt
        return trace

    def start_from(self, tables: Mapping[str, Float[Tensor, "..."]]) -> None:
        """Start from tables that are there already.

        Args:
            tables: tie or factor name -> log-probabilities over the last axis; -inf is impossible.

        Raises:
            ShapeError: a table is missing, or has another shape.
        """
        fill_tables({name: self.tables[key] for name, key in self._keys.items()}, tables)


def _log_softmax(table: Tensor) -> Tensor:
    if not keepable(table):
        return table.log_softmax(-1)
    auto = torch.is_autocast_enabled(table.device.type)
    return MEMORY.get(table, ("log_softmax", auto), lambda t: t.log_softmax(-1))
