"""The expectation step: expected counts of every table on a batch of text, tokens by look-up where they are leaves.

Where every token hangs on a latent, z(i) the one of token i, the likelihood is that of the latents alone with the
emission columns of the tokens as their evidence,

    p(x) = sum_z prod_f P_f(z_f) prod_i P(x_i | z(i)),        count(z, v) = sum over i with x_i = v of p(z(i) = z | x),

so that a token costs O(states), whatever the vocabulary, and the latents what the engine's compiled loops cost
(a hidden Markov model: states^2 a token; Baum, Petrie, Soules and Weiss 1970). Other forests take every token's value
as evidence over the vocabulary. Counts are gradients of the log-partition (Eisner 2016, "Inside-outside and
forward-backward algorithms are just backprop").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from codd_ppl.compiler import compile
from codd_ppl.errors import GraphError
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import directed_parents
from codd_ppl.inference import log_partition
from codd_ppl.inference.leaves import Skeleton, skeleton
from codd_ppl.potentials.running_counts import RunningCounts
from codd_ppl.typing import Float, Int

__all__ = ["Expectation", "Expected"]

CHUNK = 1 << 20
"""Entries of evidence that are looked at at once: what the loops go through then stays in the cache."""

FEWEST = 32
"""Blocks that are looked at at once all the same, so that products of matrices pay."""


@dataclass(frozen=True)
class Expected:
    """Expected counts of a batch, summed over its blocks.

    Attributes:
        dense: tie or factor name -> counts, of the table's shape.
        rows: the same for tables of looked-up tokens: the tokens (n,) and what each adds to its column, (n, states).
        log_likelihood: of all blocks together, nats.
    """

    dense: dict[str, Tensor]
    rows: dict[str, tuple[Tensor, Tensor]]
    log_likelihood: float

    def add_to(self, counts: Mapping[str, RunningCounts], weight: float) -> float:
        """Add the counts, multiplied; the log-likelihood, as it is."""
        for name, value in self.dense.items():
            counts[name].add(value, weight)
        for name, (tokens, rows) in self.rows.items():
            counts[name].add_rows(tokens, rows, weight)
        return self.log_likelihood


@dataclass(frozen=True)
class Looked:
    """Tokens with one emission table: their sites, and the place of each one's latent among those with tokens."""

    table: str
    sites: tuple[int, ...]
    block: int
    places: tuple[int, ...]


class Expectation:
    """The expectation step of a directed forest.

    Args:
        graph: see :func:`codd_ppl.graphs.properties.directed_parents`.
        look_up: False: every token's value as evidence over the vocabulary (for tests).

    Attributes:
        model: the latents without their tokens; None where some token is no leaf of a latent.

    Raises:
        GraphError: not a directed forest.
    """

    def __init__(self, graph: FactorGraph, look_up: bool = True) -> None:
        parents = directed_parents(graph)
        if parents is None:
            raise GraphError("Baum-Welch needs scopes that read (parent, child) along a directed forest")
        self.plan, self.sites = compile(graph), graph.tokens
        unary = {f.scope[0] for f in graph.factors.values() if f.order == 1}
        # A root without a unary factor is uniform over its values.
        self.constant = sum(
            log(v.cardinality) for v in graph if parents[v.name] is None and v.name not in unary
        )
        self.model: Skeleton | None = None
        if look_up and not _shared(graph):
            self.model = skeleton(self.plan, self.sites)
        self.looked = _looked(graph, self.model)
        self.width = sum(v.cardinality for v in graph if v.latent or self.model is None)

    @property
    def chunk(self) -> int:
        """Blocks to look at at once."""
        return max(FEWEST, CHUNK // max(1, self.width))

    def __call__(self, tables: Mapping[str, RunningCounts], blocks: Int[Tensor, "blocks sites"]) -> Expected:
        """Expected counts under the tables that these counts make.

        Args:
            tables: tie or factor name -> its counts.
            blocks: a batch; see :attr:`chunk` for how many are wise.
        """
        rows = {part.table for part in self.looked}
        dense = {name: c.table().requires_grad_() for name, c in tables.items() if name not in rows}
        evidence = [e.requires_grad_() for e in self._evidence(tables, blocks)]
        with torch.enable_grad():
            total = self._log_partition(dense, evidence).sum()
            wanted = [*dense.values(), *(evidence if self.model is not None else ())]
            found = torch.autograd.grad(total, wanted)
        counts = dict(zip(dense, found, strict=False))
        posterior, looked = found[len(dense) :], dict[str, tuple[Tensor, Tensor]]()
        for part in self.looked:
            own = posterior[part.block]
            own = own if part.places == tuple(range(own.shape[1])) else own[:, list(part.places)]
            values = blocks if part.sites == tuple(range(blocks.shape[1])) else blocks[:, list(part.sites)]
            looked[part.table] = (values.reshape(-1), own.flatten(0, 1))
        return Expected(counts, looked, float(total.detach()) - len(blocks) * self.constant)

    def log_likelihood(
        self, tables: Mapping[str, RunningCounts], blocks: Int[Tensor, "blocks sites"]
    ) -> Float[Tensor, "blocks"]:
        """log p(x) of each block, nats."""
        rows = {part.table for part in self.looked}
        dense = {name: c.table() for name, c in tables.items() if name not in rows}
        with torch.no_grad():
            found = [
                self._log_partition(dense, self._evidence(tables, part)) for part in blocks.split(self.chunk)
            ]
        return torch.cat(found) - self.constant

    def _evidence(self, tables: Mapping[str, RunningCounts], blocks: Tensor) -> list[Tensor]:
        """Of the latents with tokens, (blocks, latents, states) for each cardinality; or of the tokens."""
        if self.model is None:
            vocab = self.plan.variable[self.sites[0]].cardinality
            dtype = next(iter(tables.values())).dtype
            one_hot = torch.full((*blocks.shape, vocab), -torch.inf, dtype=dtype, device=blocks.device)
            return [one_hot.scatter_(-1, blocks[..., None], 0.0)]
        result: list[Tensor | None] = [None] * len(self.model.latents)
        for part in self.looked:
            values = blocks if part.sites == tuple(range(blocks.shape[1])) else blocks[:, list(part.sites)]
            rows, names = tables[part.table].rows(values), self.model.latents[part.block]
            if part.places != tuple(range(len(names))):
                places = torch.tensor(part.places, device=rows.device)
                room = rows.new_zeros(len(blocks), len(names), rows.shape[-1])
                rows = room.index_add_(1, places, rows)
            before = result[part.block]
            result[part.block] = rows if before is None else before + rows
        return [r for r in result if r is not None]

    def _log_partition(self, dense: dict[str, Tensor], evidence: list[Tensor]) -> Tensor:
        potentials: dict[str | tuple[str, ...], Tensor] = dict(dense.items())
        names = (self.sites,) if self.model is None else self.model.latents
        potentials.update(zip(names, evidence, strict=True))
        return log_partition(self.plan if self.model is None else self.model.core, potentials)


def _shared(graph: FactorGraph) -> bool:
    """Whether tokens and latents are children in the same table."""
    children: dict[bool, set[str]] = {True: set(), False: set()}
    for factor in graph.factors.values():
        children[graph.variables[factor.scope[-1]].latent].add(factor.tie or factor.name)
    return not children[True].isdisjoint(children[False])


def _looked(graph: FactorGraph, model: Skeleton | None) -> tuple[Looked, ...]:
    """The tokens by emission table."""
    if model is None:
        return ()
    site = {name: i for i, name in enumerate(graph.tokens)}
    where = {name: (b, i) for b, names in enumerate(model.latents) for i, name in enumerate(names)}
    users: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for factor in graph.factors.values():
        if factor.scope[-1] in site:
            block, place = where[factor.scope[0]]
            key = (factor.tie or factor.name, block)
            users.setdefault(key, []).append((site[factor.scope[-1]], place))
    return tuple(
        Looked(table, tuple(s for s, _ in pairs), block, tuple(p for _, p in pairs))
        for (table, block), pairs in users.items()
    )
