"""Coupling along trees that each input chooses: all spanning trees at once, or the best one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from codd_ppl.coupling import CouplingLayer
from codd_ppl.distributions.maximum_tree import MaximumTree
from codd_ppl.distributions.spanning_tree_mixture import SpanningTreeMixture
from codd_ppl.distributions.tree_law import OffsetCouplings, TreeLaw
from codd_ppl.errors import ConfigError
from codd_ppl.graphs import topologies
from codd_ppl.potentials.offset_pairs import OffsetPairs
from codd_ppl.potentials.statistics import check_blocks
from codd_ppl.typing import Bool, Float, Int

__all__ = ["MaximumTreeCoupling", "SpanningTreeCoupling"]

SHARPNESS = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Factors between mutual information and log beta that are tried on the text."""


class SpanningTreeCoupling(nn.Module):
    """Couples masked tokens by the mixture over all spanning trees, with the network's marginals.

        p(x_S) = prod_{i in S} softmax(l_i)[x_i]  det L_S(w * r(x)) / det L_S(w)

    where r_ij is the table of the offset |i - j|, projected onto the network's marginals of i and j, and w_ij = 1 +
    beta_ij with beta from the offset and, with ``hidden_size``, from the hidden states (Meila and Jaakkola 2006; see
    :class:`SpanningTreeMixture`). The law of a revealed set S is that mixture over S itself, not the marginal of the
    law over a larger set. That is all that the T-step bound and the sampler need: they draw one set per step, whatever
    the values, and NELBO_T with these laws bounds -log p(x0) of what :class:`Sampler` then generates.

    Called like :class:`CouplingLayer`, it fits ``coupled_nelbo``, ``nelbo_table``, ``CoDDModule`` and ``Sampler``.

    Args:
        sites: length of the sequences.
        vocab_size: values of a token.
        max_offset: largest distance at which tokens are coupled.
        hidden_size: width of the denoiser's hidden states, to score edges by them too; None: by the offset alone.
        iterations: of each pair's projection; marginals are exact after any number.
        rank, seed: of the edge scores.

    Raises:
        ConfigError: max_offset outside of 1 .. sites - 1, iterations < 1, tables that are too large.
    """

    def __init__(
        self,
        sites: int,
        vocab_size: int,
        max_offset: int = 8,
        hidden_size: int | None = None,
        iterations: int = 10,
        rank: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= max_offset < sites:
            raise ConfigError(f"expected max_offset from 1 to sites - 1 = {sites - 1}, found {max_offset}")
        if iterations < 1:
            raise ConfigError(f"expected iterations >= 1, found {iterations}")
        self.sites, self.vocab_size, self.iterations = sites, vocab_size, iterations
        self.hidden_size = hidden_size
        self.alone = CouplingLayer(topologies.independent(sites, vocab_size), vocab_size, hidden_size)
        self.potentials = OffsetPairs(vocab_size, max_offset, hidden_size, rank, seed)

    def forward(
        self,
        logits: Float[Tensor, "*batch sites vocab"],
        hidden: Float[Tensor, "*batch sites hidden"] | None = None,
        tokens: Int[Tensor, "*batch sites"] | None = None,
        known: Bool[Tensor, "*batch sites"] | None = None,
    ) -> TreeLaw:
        """The law of the masked tokens; arguments and errors as in :meth:`CouplingLayer.forward`."""
        return self._coupled(logits, self.potentials(self.sites, hidden), hidden, tokens, known)

    def _coupled(
        self,
        logits: Tensor,
        log_beta: Tensor,
        hidden: Tensor | None = None,
        tokens: Tensor | None = None,
        known: Tensor | None = None,
    ) -> TreeLaw:
        alone = self.alone(logits, hidden=hidden, tokens=tokens, known=known)
        couplings = OffsetCouplings(self.potentials.tables, log_beta, self.iterations)
        return self._law(alone.log_evidence, couplings, alone.tokens, alone.known)

    def _law(self, log_q: Tensor, couplings: OffsetCouplings, tokens: Tensor, known: Tensor) -> TreeLaw:
        return SpanningTreeMixture(log_q, couplings, tokens, known)

    def init_from_corpus(
        self,
        blocks: Int[Tensor, "blocks sites"],
        progress: bool = True,
        seed: int = 0,
        sharpness: Sequence[float] = SHARPNESS,
        trials: int = 32,
    ) -> dict[str, float]:
        """Start from text alone: pointwise mutual information per offset, log beta_d = sharpness * I_d.

        The sharpness is the one under which ``trials`` blocks are likeliest when the marginals are the token
        frequencies, all sites and a random half of them taken together.

        Args:
            blocks: (n, sites) int64 clean text.
            progress: not used; counting takes a moment.
            seed: of the blocks and halves that are looked at.
            sharpness: the values to try.
            trials: number of blocks.

        Returns:
            ``"sharpness"``, ``"gain"`` (nats per token over independent tokens) and ``"offset d"``: nats.

        Raises:
            ConfigError: nothing to try.
            ShapeError, TokenError: blocks that don't fit.
        """
        if not len(sharpness) or trials < 1:
            raise ConfigError(
                "expected at least one sharpness and one trial; leave them out for the usual ones"
            )
        check_blocks(blocks, self.sites, self.vocab_size)
        information = self.potentials.init_from_corpus(blocks)
        generator = torch.Generator().manual_seed(seed)
        some = blocks[torch.randperm(len(blocks), generator=generator)[:trials]].to(information.device)
        half = (torch.rand(some.shape, generator=generator) < 0.5).to(some.device)
        counts = torch.bincount(blocks.reshape(-1), minlength=self.vocab_size).to(information.device)
        logits = (counts + 1.0).log().expand(*some.shape, -1)
        gains: dict[float, float] = {}
        with torch.no_grad():
            independent = self.alone(logits)
            for value in sharpness:
                self.potentials.sharpen(value)
                near = self.potentials.by_offset(self.sites)
                dist = self._coupled(logits, near)
                gained = [dist.log_prob(some, s) - independent.log_prob(some, s) for s in (None, half)]
                gains[value] = float((gained[0] + gained[1]).sum() / (some.numel() + half.sum()))
        best = max(gains, key=gains.__getitem__)
        self.potentials.sharpen(best)
        found = {f"offset {d}": float(nats) for d, nats in enumerate(information, start=1)}
        return {"sharpness": best, "gain": gains[best], **found}

    def extra_repr(self) -> str:
        """Sites, vocabulary and reach."""
        return f"sites={self.sites}, vocab_size={self.vocab_size}, max_offset={self.potentials.max_offset}"


class MaximumTreeCoupling(SpanningTreeCoupling):
    """Couples masked tokens along the maximum spanning forest of each input's edge scores log beta_ij.

    One tree per batch element over its masked sites, chosen anew for every input (:class:`MaximumTree`); the law of
    a revealed set is the exact marginal of the tree's. Arguments as in :class:`SpanningTreeCoupling`. The choice of
    the tree has no gradient, the chosen edges' tables and weights have.
    """

    def _law(self, log_q: Tensor, couplings: OffsetCouplings, tokens: Tensor, known: Tensor) -> TreeLaw:
        return MaximumTree(log_q, couplings, tokens, known)
