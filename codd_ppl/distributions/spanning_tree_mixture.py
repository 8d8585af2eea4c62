"""The mixture of the tree laws over all spanning trees, with the network's marginals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codd_ppl.distributions.tree_law import OffsetCouplings, TreeLaw, log1p_exp
from codd_ppl.inference import spanning_trees
from codd_ppl.inference.dynamic_trees import DynamicForest
from codd_ppl.inference.sampling import categorical
from codd_ppl.typing import Bool, Float, Int

__all__ = ["SpanningTreeMixture"]


class SpanningTreeMixture(TreeLaw):
    """Tokens of a set S drawn along a random spanning tree of S:

        p(x_S) = prod_{i in S} q_i(x_i)  sum_T prod_{ij in T} w_ij r_ij(x_i, x_j)  /  sum_T prod_{ij in T} w_ij
               = prod_{i in S} q_i(x_i)  det L_S(w * r(x)) / det L_S(w)

    with r_ij = p_ij / (q_i q_j) (:class:`OffsetCouplings`) and L_S the reduced Laplacian over S (Meila and Jaakkola
    2006, "Tractable Bayesian learning of tree belief networks"). Since p_ij has the marginals q_i and q_j exactly,
    every tree's law is normalised with marginals q_i, and so is the mixture.

    **The law of a set is defined for that set.** ``log_prob(x, sites=S)`` is the mixture over the trees of S itself,
    not the marginal of the law over a larger set (a tree through sites outside of S says something else of S). The
    T-step bound and the sampler draw one set per step, whatever the values, so that any family of laws p_S gives a
    valid bound, provided that the sampler draws from the same one: ``restrict(S).sample()``, as
    :class:`codd_ppl.Sampler` does.

    Args:
        log_q, couplings, tokens, known: see :class:`TreeLaw`.
        coupled: the sites that trees span, the masked ones if None; other masked sites are independent.
    """

    def __init__(
        self,
        log_q: Float[Tensor, "*batch sites vocab"],
        couplings: OffsetCouplings,
        tokens: Int[Tensor, "*batch sites"],
        known: Bool[Tensor, "*batch sites"],
        coupled: Bool[Tensor, "*batch sites"] | None = None,
    ) -> None:
        super().__init__(log_q, couplings, tokens, known)
        self.coupled: Tensor = ~known if coupled is None else coupled & ~known

    def restrict(self, sites: Bool[Tensor, "*batch sites"]) -> SpanningTreeMixture:
        """The law whose trees span the masked ones of ``sites`` only; the rest is independent."""
        return SpanningTreeMixture(self.log_q, self.couplings, self.tokens, self.known, self.coupled & sites)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> SpanningTreeMixture:
        """The same law for a larger batch; nothing is copied."""
        wide = TreeLaw.expand(self, batch_shape)
        assert isinstance(wide, SpanningTreeMixture)
        return wide.restrict(self.coupled.expand(wide.known.shape))

    def _gain(self, value: Tensor, free: Tensor) -> Tensor:
        n, lead = self.sites, free.shape[:-1]
        members = (free & self.coupled).reshape(-1, n)
        batch = self.batch_shape.numel()
        log_beta = self.couplings.log_beta.double().reshape(-1, n, n)
        row, left, right = self._pairs(members)
        own = row % batch if batch else row  # sets that differ between draws come draw by draw
        laws = self.couplings.project(self.log_q.reshape(-1, n, self.vocab_size), own, left, right)
        x = value.reshape(-1, len(members), n) if len(members) else value.new_zeros(0, 0, n)
        beta = log_beta[own, left, right]
        ratio = log1p_exp(beta + laws.at(x[:, row, left], x[:, row, right]))
        weighted = _matrix(ratio, row, left, right, members)
        plain = _matrix(log1p_exp(beta), row, left, right, members)
        total = spanning_trees.log_partition(weighted, members.expand(len(x), *members.shape))
        gain = total - spanning_trees.log_partition(plain, members)
        return gain.reshape(value.shape[:-1]) if lead.numel() else gain.new_zeros(value.shape[:-1])

    def _pairs(self, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row, left and right site of all pairs of members within the tables' reach."""
        place = torch.arange(self.sites, device=members.device)
        offset = place - place[:, None]
        near = (offset > 0) & (offset <= len(self.couplings.tables))
        row, left, right = (members[:, :, None] & members[:, None] & near).nonzero().unbind(-1)
        return row, left, right

    def sample(
        self, sample_shape: Sequence[int] = torch.Size(), generator: torch.Generator | None = None
    ) -> Int[Tensor, "*shape sites"]:
        """Exact joint draws, (*sample_shape, *batch, sites): a tree, then the tokens along it; known ones filled in."""
        with torch.no_grad():
            return self._sample(torch.Size(sample_shape), generator)

    def _sample(self, sample_shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        n, batch = self.sites, self.batch_shape.numel()
        log_q = self.log_q.reshape(batch, n, self.vocab_size)
        log_beta = self.couplings.log_beta.double().reshape(batch, n, n)
        weights = log1p_exp(log_beta)
        members = self.coupled.reshape(batch, n)
        parents = spanning_trees.sample(weights, members, (sample_shape.numel(),), generator)
        parents = parents.reshape(-1, n)
        # An edge carries its table with chance beta / (beta + 1); else its sites are independent, the child a new root.
        row = torch.arange(len(parents), device=parents.device)[:, None] % batch if batch else parents[:, :1]
        site = torch.arange(n, device=parents.device)
        chance = log_beta[row, site, parents.clamp_min(0)].sigmoid()
        coin = torch.rand(chance.shape, generator=generator, dtype=torch.float64, device=chance.device)
        parents = torch.where(coin < chance, parents, -1)
        forest = DynamicForest(parents)
        child = (parents >= 0).nonzero()
        above = parents[child[:, 0], child[:, 1]]
        left, right = torch.minimum(child[:, 1], above), torch.maximum(child[:, 1], above)
        key = ((child[:, 0] % max(1, batch)) * n + left) * n + right
        unique, pair = key.unique(return_inverse=True)  # draws share their pairs
        laws = self.couplings.project(log_q, unique // (n * n), unique // n % n, unique % n)
        number = torch.full((parents.numel(),), -1, dtype=torch.int64, device=parents.device)
        number[child[:, 0] * n + child[:, 1]] = pair
        found: list[Tensor] = []
        for index, level in enumerate(forest.levels):
            where = level.rows % n
            log = log_q[level.rows // n % max(1, batch), where].double()
            if index:
                parent = parents.reshape(-1)[level.rows]
                log = log + laws.given(number[level.rows], found[-1][level.above], parent < where)
            found.append(categorical(log, generator))
        place = torch.cat([level.rows for level in forest.levels] or [parents.reshape(-1)]).argsort()
        drawn = torch.cat(found or [parents.reshape(-1)])[place]
        return drawn.reshape(*sample_shape, *self.batch_shape, n)


def _matrix(value: Tensor, row: Tensor, left: Tensor, right: Tensor, members: Tensor) -> Tensor:
    """Symmetric (*draws, rows, sites, sites) log-weights; 0, the weight of independence, where no pair is given."""
    draws, (rows, n) = value.shape[:-1], members.shape
    flat = value.new_zeros(*draws, rows * n * n)
    flat = flat.index_copy(-1, (row * n + left) * n + right, value)
    upper = flat.reshape(*draws, rows, n, n)
    return upper + upper.mT
