"""The law along the best tree of each input, with the network's marginals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from codd_ppl.distributions.tree_law import TreeLaw, log1p_exp
from codd_ppl.inference import dynamic_trees
from codd_ppl.inference.dynamic_trees import DynamicForest
from codd_ppl.inference.pair_projection import PairLaws
from codd_ppl.inference.spanning_trees import maximum_spanning_forest
from codd_ppl.typing import Float, Int

__all__ = ["MaximumTree"]


class MaximumTree(TreeLaw):
    """Tokens coupled along the maximum spanning forest of the masked sites, each batch element's own:

        p(x_M) = prod_{i in M} q_i(x_i)  prod_{ij in T} r_ij(x_i, x_j),    T = argmax_T sum_{ij in T} log beta_ij

    with r_ij = p_ij / (q_i q_j) (see :class:`OffsetCouplings`); marginals q_i. Sites beyond each other's reach are in
    different trees. ``log_prob(x, sites=S)`` is the exact marginal of S, one batched query of all trees
    (:mod:`codd_ppl.inference.dynamic_trees`). The choice of T has no gradient; its tables and their weights have.
    """

    @cached_property
    def forest(self) -> DynamicForest:
        """The trees; known sites stand alone."""
        return DynamicForest(maximum_spanning_forest(self.couplings.log_beta, ~self.known))

    @cached_property
    def _tables(self) -> _TreeTables:
        n = self.sites
        parents = self.forest.parents.reshape(-1, n)
        row, child = (parents >= 0).nonzero().unbind(-1)
        parent = parents[row, child]
        left, right = torch.minimum(child, parent), torch.maximum(child, parent)
        laws = self.couplings.project(self.log_q.reshape(-1, n, self.vocab_size), row, left, right)
        number = torch.full((parents.numel(),), -1, dtype=torch.int64, device=parents.device)
        number[row * n + child] = torch.arange(len(row), device=parents.device)
        beta = self.couplings.log_beta.double().reshape(-1, n, n)[row, left, right]
        above = torch.full_like(number, -1)
        above[row * n + child] = row * n + parent
        return _TreeTables(laws, number, above, beta, child < parent)

    @cached_property
    def log_partition(self) -> Float[Tensor, "*batch"]:
        """0 to rounding, since the pairs' laws agree with the marginals."""
        return dynamic_trees.log_partition(self.forest, self.log_q.double(), self._tables)

    def _gain(self, value: Tensor, free: Tensor) -> Tensor:
        shape = value.shape
        if bool((free | self.known).all()):  # nothing to sum out
            return self._tables.at(value).sum(-1)
        forest = DynamicForest(self.forest.parents.expand(shape))
        log_q = self.log_q.double().expand(*shape, self.vocab_size)
        free = free.expand(shape)
        clamped = dynamic_trees.clamp(log_q, value, free)
        # What is clamped has the weight 1 here: the difference to independent tokens is asked for.
        clamped = torch.where(free[..., None] & (clamped > -torch.inf), 0.0, clamped)
        total = dynamic_trees.log_partition(forest, clamped, self._tables)
        return total - self.log_partition

    def sample(
        self, sample_shape: Sequence[int] = torch.Size(), generator: torch.Generator | None = None
    ) -> Int[Tensor, "*shape sites"]:
        """Exact joint draws, (*sample_shape, *batch, sites); known tokens are filled in."""
        return dynamic_trees.sample(
            self.forest, self.log_q.double(), self._tables, tuple(sample_shape), generator
        )


@dataclass(frozen=True, eq=False)
class _TreeTables:
    """log r of the trees' edges, made a level at a time; rows beyond the batch are further draws of it."""

    laws: PairLaws
    number: Tensor  # (batch * sites) which pair hangs the site on its parent
    parent: Tensor  # (batch * sites) row of the parent
    beta: Tensor  # (pairs)
    child_is_left: Tensor  # (pairs)

    def at(self, value: Tensor) -> Tensor:
        """log r of every edge at the values of (*draws, *batch, sites): (*draws, *batch, sites), 0 at roots."""
        hung = (self.number >= 0).nonzero()[:, 0]  # pairs are numbered in this order
        flat = value.reshape(-1, len(self.number)) if len(self.number) else value.reshape(0, 0)
        child, parent = flat[:, hung], flat[:, self.parent[hung]]
        lower = self.child_is_left
        log = self.laws.at(torch.where(lower, child, parent), torch.where(lower, parent, child))
        found = log1p_exp(self.beta + log) - log1p_exp(self.beta)
        return found.new_zeros(flat.shape).index_copy(-1, hung, found).reshape(value.shape)

    def log_tables(self, rows: Tensor, /) -> Tensor:
        pairs = self.number[rows % len(self.number)]
        log = self.laws.dense(pairs)
        log = torch.where(self.child_is_left[pairs, None, None], log, log.mT)
        beta = self.beta[pairs, None, None]
        return log1p_exp(beta + log) - log1p_exp(beta)
