"""The law of the tokens given that they satisfy a constraint: a chain with an automaton beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from codd_ppl.constraints.backbone import Backbone, Place
from codd_ppl.constraints.layers import Layers
from codd_ppl.constraints.passes import Passes
from codd_ppl.constraints.products import MaxProduct, SumProduct
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.errors import ConfigError, InfeasibleError, ShapeError
from codd_ppl.typing import Bool, Float, Int

__all__ = ["ConstrainedCategorical"]


class ConstrainedCategorical:
    """Tokens of a coupled law that spell a text of a language:

        p(x | x in L) = 1/Z  1[x in L]  sum_z  prod_i exp(log_evidence_i[x_i])  prod_f psi_f(x_f, z_f)

    The state along the sites is the pair (z_i, a_i) of the law's and the automaton's. Tokens that do the same to the
    automaton are summed first, E_c[z] = sum_{x in c} w(x) psi(z, x), so that a site costs

        vocab * states  +  automaton states * states^2  +  automaton edges * states

    and no table of (vocab x automaton states) is built. Draws are exact: backwards messages, then state and token from
    the first site on. Everything is computed without gradients.

    Args:
        prior: the law without the constraint, with the known tokens clamped.
        layers: the automaton, site by site.
        path: the graph of ``prior`` as a path, from :func:`codd_ppl.constraints.backbone.path_of`.
        name: of the constraint, for messages.
    """

    def __init__(
        self, prior: CoupledCategorical, layers: Layers, path: tuple[Place, ...], name: str = "the constraint"
    ) -> None:
        self.prior, self.layers, self.path, self.name = prior, layers, path, name
        self.batch_shape, self.event_shape = prior.batch_shape, prior.event_shape
        self.vocab_size = prior.vocab_size
        self._layers = layers.on(prior.log_evidence.device)

    @cached_property
    def _backbone(self) -> Backbone:
        return Backbone(self.prior, self.path)

    @cached_property
    def _passes(self) -> Passes:
        with torch.no_grad():
            return Passes(self._backbone, self._layers, SumProduct())

    @property
    def log_partition(self) -> Float[Tensor, "*batch"]:
        """log of the sum over all texts of L, in nats, float64; -inf where none is possible.

        Its difference to ``prior.log_partition`` is the log-probability that the law without the constraint would
        satisfy it.
        """
        return self._passes.total.reshape(self.batch_shape)

    def log_prob(
        self, value: Int[Tensor, "*#shape sites"], sites: Bool[Tensor, "*#shape sites"] | None = None
    ) -> Float[Tensor, "*shape"]:
        """Exact log-probability given the constraint, of all sites or of a set of them with the rest summed out.

        Args:
            value: (*sample, *batch, sites) tokens; read only where ``sites``.
            sites: bool, the set; None: all.

        Returns:
            (*sample, *batch) nats, float64; -inf for what breaks the constraint or contradicts what is known.

        Raises:
            ShapeError: shapes that don't broadcast.
            InfeasibleError: no text that satisfies the constraint is possible.
        """
        self._require_feasible()
        chosen = torch.ones_like(value, dtype=torch.bool) if sites is None else sites
        whole = (*self.batch_shape, *self.event_shape)
        try:
            shape = torch.broadcast_shapes(value.shape, chosen.shape, whole)[:-1]
        except RuntimeError:
            raise ShapeError(
                f"expected tokens, and sites if given, of shape (*sample, {', '.join(map(str, whole))}), found "
                f"{tuple(value.shape)} and {tuple(chosen.shape)}"
            ) from None
        value, chosen = torch.broadcast_tensors(value, chosen)
        value, chosen = (t.expand(*shape, value.shape[-1]) for t in (value, chosen))
        clash = (self.prior.known & chosen & (value != self.prior.tokens)).any(-1)
        clamped = self.prior.expand(shape).condition(value, chosen & ~self.prior.known)
        total = self._like(clamped).log_partition - self.log_partition
        return torch.where(clash, -torch.inf, total)

    @cached_property
    def marginals(self) -> Float[Tensor, "*batch sites vocab"]:
        """Probability of each token at each site given constraint and known tokens (one-hot there).

        Raises:
            InfeasibleError: as in :meth:`log_prob`.
        """
        self._require_feasible()
        with torch.no_grad():
            found = self._passes.marginals()
        return found.reshape(*self.batch_shape, *found.shape[1:]).to(self.prior.log_evidence.dtype)

    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Int[Tensor, "*shape sites"]:
        """Exact joint draws, (*sample_shape, *batch, sites); each satisfies the constraint.

        Raises:
            InfeasibleError: as in :meth:`log_prob`.
        """
        self._require_feasible()
        with torch.no_grad():
            drawn = self._passes.decode(prod(sample_shape), SumProduct(generator))
        return drawn.reshape(*sample_shape, *self.batch_shape, -1)

    @property
    def mode(self) -> Int[Tensor, "*batch sites"]:
        """Tokens of a most probable assignment of tokens **and latents** that satisfies the constraint.

        Raises:
            InfeasibleError: as in :meth:`log_prob`.
        """
        self._require_feasible()
        with torch.no_grad():
            algebra = MaxProduct()
            best = Passes(self._backbone, self._layers, algebra).decode(1, algebra)
        return best.reshape(*self.batch_shape, -1)

    def entropy(self, num_samples: int, generator: torch.Generator | None = None) -> Float[Tensor, "*batch"]:
        """Entropy in nats, estimated without bias as the mean of -log p over so many exact draws.

        Raises:
            ConfigError: ``num_samples`` below 1.
            InfeasibleError: as in :meth:`log_prob`.
        """
        if num_samples < 1:
            raise ConfigError(f"expected num_samples >= 1, found {num_samples}")
        return -self.log_prob(self.sample((num_samples,), generator=generator)).mean(0)

    def condition(
        self, value: Int[Tensor, "*#batch sites"], sites: Bool[Tensor, "*#batch sites"] | None = None
    ) -> ConstrainedCategorical:
        """The same law given the tokens at ``sites``; see :meth:`CoupledCategorical.condition`."""
        return self._like(self.prior.condition(value, sites))

    def _like(self, prior: CoupledCategorical) -> ConstrainedCategorical:
        return ConstrainedCategorical(prior, self.layers, self.path, self.name)

    def _require_feasible(self) -> None:
        dead = (self.log_partition == -torch.inf).nonzero().tolist()
        if dead:
            more = f" and {len(dead) - 1} more" if len(dead) > 1 else ""
            raise InfeasibleError(
                f"{self.name}: every text that satisfies it with the known tokens has probability zero (batch element "
                f"{tuple(dead[0])}{more}); the network's logits or the potentials rule out (-inf) what it needs. Relax "
                "the constraint, or give these tokens finite logits and potentials"
            )

    def __repr__(self) -> str:
        return f"ConstrainedCategorical({self.prior!r}, {self.name})"
