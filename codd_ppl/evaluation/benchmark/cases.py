"""Cases of the inference benchmark: sizes, and the random log-potentials that every candidate gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

import torch
from torch import Tensor

__all__ = ["Case", "Inputs", "chains", "make_inputs"]


@dataclass(frozen=True)
class Case:
    """The size of one problem.

    Attributes:
        layout: "shared" (a chain with one transition matrix and evidence at each site, as in a hidden Markov
            model), "full" (a chain with one table for each edge and batch element), "tokens" (a hidden Markov
            model with evidence over a vocabulary) or "tree" (a random tree with a table for each edge and batch
            element).
        batch, sites, states: sizes.
        vocab: values of a token; 0 where there are none.
    """

    layout: str
    batch: int
    sites: int
    states: int
    vocab: int = 0

    @property
    def name(self) -> str:
        """As in the tables: batch, sites, states (and vocabulary)."""
        sizes = [self.batch, self.sites, self.states] + ([self.vocab] if self.vocab else [])
        return f"{self.layout} {','.join(map(str, sizes))}"

    @property
    def bytes(self) -> int:
        """Size of the log-potentials in float32."""
        evidence = self.batch * self.sites * (self.vocab or self.states)
        tables = self.states * self.states + self.states * self.vocab
        if self.layout in ("full", "tree"):
            evidence, tables = 0, self.batch * (self.sites - 1) * self.states**2
        return 4 * (evidence + tables)


@dataclass(frozen=True)
class Inputs:
    """Log-potentials of a case; what a layout doesn't have is None.

    Attributes:
        unary: (batch, sites, states) evidence; for "tokens" (batch, sites, vocab).
        table: (states, states) indexed [value, next value], or (batch, sites - 1, states, states); in a tree
            indexed [parent, child], edge i - 1 belonging to site i.
        emission: (states, vocab) of "tokens".
        parents: of the sites of a tree, -1 for the root, which is site 0.
    """

    case: Case
    table: Tensor
    unary: Tensor | None = None
    emission: Tensor | None = None
    parents: tuple[int, ...] = ()

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that gradients are taken of."""
        return [t for t in (self.unary, self.table, self.emission) if t is not None]

    def requiring_grad(self) -> Inputs:
        """Copies that ask for gradients."""
        own = [None if t is None else t.clone().requires_grad_() for t in (self.unary, self.emission)]
        return Inputs(self.case, self.table.clone().requires_grad_(), own[0], own[1], self.parents)

    @cached_property
    def edges(self) -> Tensor:
        """A chain as one table for each edge, [value, next value], evidence folded in: what some peers ask for."""
        if self.unary is None:
            return self.table
        edges = self.table + self.unary[:, 1:, None, :]
        edges[:, 0] += self.unary[:, 0, :, None]
        return edges


def make_inputs(case: Case, seed: int = 0, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> Inputs:
    """Normal log-potentials with standard deviation ``spread``; rows of shared tables are normalised, as in a HMM."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return spread * torch.randn(shape, generator=generator, dtype=dtype)

    B, N, C, V = case.batch, case.sites, case.states, case.vocab
    if case.layout == "full":
        return Inputs(case, normal(B, N - 1, C, C))
    if case.layout == "tree":
        random = Random(seed)
        parents = (-1, *(random.randrange(i) for i in range(1, N)))
        return Inputs(case, normal(B, N - 1, C, C), parents=parents)
    table = normal(C, C).log_softmax(-1)
    if case.layout == "tokens":
        return Inputs(case, table, normal(B, N, V).log_softmax(-1), normal(C, V).log_softmax(-1))
    return Inputs(case, table, normal(B, N, C))


def chains(layout: str, states: Sequence[int], sites: Sequence[int]) -> list[Case]:
    """The chains of the tables: batch 8; with 1,024 states 4, or 1 where every edge has a table."""
    few = 4 if layout == "shared" else 1
    return [Case(layout, 8 if C < 1024 else few, N, C) for C in states for N in sites]
