"""Free tables: one learnable log-potential per entry of every factor or tie."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from codd_ppl.errors import ConfigError, GraphError, ShapeError
from codd_ppl.graphs import FactorGraph
from codd_ppl.potentials.statistics import check_blocks, log_unigram, pointwise_mutual_information
from codd_ppl.typing import Float, Int

__all__ = ["LARGEST_TABLE", "Potentials", "TablePotentials", "fill_tables", "table_shapes"]

LARGEST_TABLE = 1 << 28
"""Entries of a table above which it is refused: a vocabulary squared needs another kind of potential."""


@runtime_checkable
class Potentials(Protocol):
    """What a coupling asks of its potentials; an ``nn.Module`` of your own may implement it.

    One with an attribute ``needs_ratio`` that is true is called with ``ratio=``, too: the share of masked sites,
    (*batch), float32.
    """

    def __call__(self, hidden: Tensor | None = None) -> dict[str, Tensor]:
        """Log-potentials by factor or tie name, (*batch, *cardinalities of the scope)."""

    def evidence(self) -> Tensor | None:
        """Log-prior of each token value, (vocab,), that completes the tables to a prior; None: complete already."""

    def init_from_corpus(self, blocks: Tensor, *, progress: bool = True, seed: int = 0) -> object:
        """Start from text alone, without a network; blocks are (n, sites) int64."""


def table_shapes(graph: FactorGraph) -> dict[str, tuple[int, ...]]:
    """Shape of the table behind every tie and untied factor, in the order of declaration.

    Raises:
        ConfigError: a table with more than :data:`LARGEST_TABLE` entries.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for factor in graph.factors.values():
        shape = tuple(graph.variables[v].cardinality for v in factor.scope)
        if prod(shape) > LARGEST_TABLE:
            raise ConfigError(
                f"factor {factor.name!r} over {factor.scope} needs a table of {' x '.join(map(str, shape))} = "
                f"{prod(shape):,} entries (at most {LARGEST_TABLE:,}); couple the tokens through latent variables "
                "instead, for instance topologies.hidden_markov(sites, vocab, states=256)"
            )
        shapes.setdefault(factor.tie or factor.name, shape)
    return shapes


class TablePotentials(nn.Module):
    """Free tables, tied or not: log psi_f(x) = table[x], for any graph.

    Token-only factors start at 0 (no coupling) and, from a corpus, at the pointwise mutual information of their
    tokens; with ``evidence``, the unigram log-frequencies, a tree of such tables is the Chow-Liu model of the text
    (Chow and Liu 1968). Tables that touch latents start at small random values to break the symmetry of the states.

    Args:
        graph: the factors; tied ones share a table.
        seed: of the start of latent tables.
    """

    unigram: Tensor

    def __init__(self, graph: FactorGraph, seed: int = 0) -> None:
        super().__init__()
        self.graph = graph
        generator = torch.Generator().manual_seed(seed)
        self.tables = nn.ParameterDict()
        self._keys: dict[str, str] = {}
        for i, (name, shape) in enumerate(table_shapes(graph).items()):
            start = torch.zeros(shape)
            if any(graph.variables[v].latent for v in _users(graph, name)[0]):
                start = 0.1 * torch.randn(shape, generator=generator)
            self._keys[name] = f"table{i}"  # factor names may hold dots and commas, parameter names may not
            self.tables[f"table{i}"] = nn.Parameter(start)
        tokens = {v.cardinality for v in graph if not v.latent}
        self.register_buffer("unigram", torch.zeros(tokens.pop() if len(tokens) == 1 else 0))

    def forward(self, hidden: Tensor | None = None) -> dict[str, Float[Tensor, "..."]]:
        """Factor or tie name -> its table, without batch dimensions; ``hidden`` is not read."""
        return {name: self.tables[key] for name, key in self._keys.items()}

    def evidence(self) -> Float[Tensor, "vocab"] | None:
        """Unigram log-frequencies of the corpus (zeros before :meth:`init_from_corpus`)."""
        return self.unigram if len(self._keys) else None

    def init_from_corpus(
        self,
        blocks: Int[Tensor, "blocks sites"],
        *,
        progress: bool = True,
        seed: int = 0,
        pseudo_count: float | None = None,
    ) -> dict[str, float]:
        """Set every token-only table to the pointwise mutual information of its sites, pooled over a tie.

        Unary factors start at 0 since ``evidence`` holds the token frequencies.

        Args:
            blocks: (n, sites) int64.
            progress, seed: not read; counting is quick and exact.
            pseudo_count: independent draws mixed in, see :func:`pointwise_mutual_information`; the vocabulary's size
                if None. With 0 what never occurs together is impossible (-inf): a hard constraint, to be kept frozen.

        Returns:
            Tie or factor name -> mutual information of its tokens in the corpus, nats.

        Raises:
            ConfigError: a negative ``pseudo_count``.
            GraphError: all factors touch latents, which counts can't start.
            ShapeError, TokenError: blocks that don't fit the graph.
        """
        tokens = [self.graph.variables[name] for name in self.graph.tokens]
        check_blocks(blocks, len(tokens), tokens[0].cardinality)
        if pseudo_count is not None and pseudo_count < 0:
            raise ConfigError(
                f"expected pseudo_count >= 0, or None for the vocabulary's size, found {pseudo_count}"
            )
        site = {v.name: i for i, v in enumerate(tokens)}
        unigram = log_unigram(blocks, tokens[0].cardinality)
        found: dict[str, float] = {}
        latent = []
        for name, key in self._keys.items():
            scopes = _users(self.graph, name)
            if any(v not in site for scope in scopes for v in scope):
                latent.append(name)
                continue
            if len(scopes[0]) == 1:
                continue
            groups = [blocks[:, [site[v] for v in scope]] for scope in scopes]
            table = pointwise_mutual_information(groups, tokens[0].cardinality, unigram, pseudo_count)
            with torch.no_grad():
                self.tables[key].copy_(table)
            outer = table
            for axis in range(table.dim()):
                outer = outer + unigram.reshape([-1 if a == axis else 1 for a in range(table.dim())])
            found[name] = float(torch.where(table == -torch.inf, 0.0, outer.exp() * table).sum())
        if latent and len(latent) == len(self._keys):
            raise GraphError(
                f"counts can't start tables over latent variables ({', '.join(latent[:3])}), and Baum-Welch needs "
                "scopes that read (parent, child) along a directed forest, one parent each, with unary factors on "
                "roots only; reorder the scopes, or train the tables with CoDDModule"
            )
        with torch.no_grad():
            self.unigram.copy_(unigram)
        return found

    def start_from(self, tables: Mapping[str, Float[Tensor, "..."]]) -> None:
        """Start from tables that are there already, instead of counts: hand-made ones, or those of another coupling.

        ``evidence`` stays as it is: zeros, unless :meth:`init_from_corpus` set the frequencies of a text.

        Args:
            tables: tie or factor name -> log-potentials; -inf is impossible (a hard constraint, to be kept frozen).

        Raises:
            ShapeError: a table is missing, or has another shape.
        """
        fill_tables({name: self.tables[key] for name, key in self._keys.items()}, tables)


@torch.no_grad()
def fill_tables(mine: Mapping[str, Tensor], given: Mapping[str, Float[Tensor, "..."]]) -> None:
    """Copy given tables into one's own, all or none.

    Raises:
        ShapeError: a table is missing, or has another shape.
    """
    for name, table in mine.items():
        expected, found = tuple(table.shape), given.get(name)
        if found is None or tuple(found.shape) != expected:
            said = "none" if found is None else f"one of {tuple(found.shape)}"
            raise ShapeError(f"expected a table {name!r} of shape {expected}, found {said}")
    own = {table.untyped_storage().data_ptr() for table in mine.values()}
    sources = [given[name] for name in mine]  # perhaps one's own, turned or swapped
    sources = [t.clone() if t.untyped_storage().data_ptr() in own else t for t in sources]
    for table, source in zip(mine.values(), sources, strict=True):
        table.copy_(source)


def _users(graph: FactorGraph, name: str) -> list[tuple[str, ...]]:
    """Scopes of the factors that use a table."""
    return [f.scope for f in graph.factors.values() if (f.tie or f.name) == name]
