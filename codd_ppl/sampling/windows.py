"""Sequences longer than the graph: the sites that a step reveals, coupled in windows of the graph's length."""

from __future__ import annotations

import torch
from torch import nn

from codd_ppl.diffusion.nelbo import SetDistribution
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.sampling.cover import Cover, minimum_cover
from codd_ppl.sampling.protocol import Coupling, JointDistribution
from codd_ppl.typing import Bool, Float, Int, Tensor

__all__ = ["WindowedCoupling", "WindowedDistribution", "WindowedLaw"]


class WindowedCoupling(nn.Module):
    """A coupling of ``coupling.sites`` tokens, used on sequences of ``sites`` tokens.

    The revealed set S of a step is covered by the fewest windows of the graph's length (:func:`minimum_cover`), and

        p(x_S | xt) = prod_w p_w(x_{S_w} | xt_w)

    where S_w are the sites of S that window w took, p_w is the coupling's law of that window given the known tokens in
    it, and its other masked sites are summed out. Sites of different windows are independent given the known text.
    The windows depend on S, and S is drawn without looking at the values, so that NELBO_T of these laws bounds
    -log p(x0) of what :class:`Sampler` generates with them (:class:`codd_ppl.diffusion.nelbo.SetDistribution`). All
    windows of all rows are one batch: one query of the coupling per step.

    A tied chain needs no windows: :func:`codd_ppl.sampling.extended` puts it on a longer graph, exactly.

    Args:
        coupling: of the windows.
        sites: length of the sequences, at least the coupling's own.

    Raises:
        ConfigError: ``sites`` below those of the coupling.
    """

    def __init__(self, coupling: Coupling, sites: int) -> None:
        super().__init__()
        if sites < coupling.sites:
            raise ConfigError(
                f"sites: expected at least {coupling.sites}, the sites of the coupling, found {sites}; pad the text "
                f"with masks to {coupling.sites} and cut what is written there"
            )
        self.coupling = coupling
        self.sites = sites
        self.vocab_size = coupling.vocab_size

    def forward(
        self,
        logits: Float[Tensor, "batch sites vocab"],
        hidden: Float[Tensor, "batch sites hidden"] | None = None,
        tokens: Int[Tensor, "batch sites"] | None = None,
        known: Bool[Tensor, "batch sites"] | None = None,
    ) -> WindowedDistribution:
        """The laws of the masked tokens; nothing is computed before a set of sites is asked for.

        Raises:
            ShapeError: logits of another shape than (batch, sites, vocab); tokens without known.
        """
        if logits.dim() != 3 or logits.shape[1:] != (self.sites, self.vocab_size):
            raise ShapeError(
                f"expected logits (batch, {self.sites}, {self.vocab_size}), found {tuple(logits.shape)}; flatten the "
                "batch dimensions, or build WindowedCoupling with the sites of the text"
            )
        if (tokens is None) != (known is None):
            raise ShapeError("expected tokens and known together; pass known=xt != mask_token_id")
        if tokens is None or known is None:
            known = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
            tokens = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
        return WindowedDistribution(self.coupling, logits, hidden, tokens, known)


class WindowedDistribution:
    """A law for each set of sites (``restrict``); asked as a whole, it is the law of all masked sites."""

    def __init__(
        self,
        coupling: Coupling,
        logits: Float[Tensor, "batch sites vocab"],
        hidden: Float[Tensor, "batch sites hidden"] | None,
        tokens: Int[Tensor, "batch sites"],
        known: Bool[Tensor, "batch sites"],
    ) -> None:
        self._coupling, self._logits, self._hidden = coupling, logits, hidden
        self.tokens, self.known = torch.where(known, tokens, 0), known

    def restrict(self, sites: Bool[Tensor, "batch sites"]) -> WindowedLaw:
        """The law of the masked ones of ``sites``, each row its own set."""
        return self._law(sites & ~self.known, torch.arange(len(self.known), device=self.known.device))

    @property
    def marginals(self) -> Float[Tensor, "batch sites vocab"]:
        """Single-site marginals of the law of all masked sites; one-hot at known sites."""
        return self.restrict(~self.known).marginals

    @property
    def mode(self) -> Int[Tensor, "batch sites"]:
        """What the coupling calls the mode of each window of the law of all masked sites."""
        return self.restrict(~self.known).mode

    def sample(
        self, sample_shape: tuple[int, ...] = (), *, generator: torch.Generator | None = None
    ) -> Int[Tensor, "*samples batch sites"]:
        """Draws of all masked sites."""
        return self.restrict(~self.known).sample(sample_shape, generator=generator)

    def log_prob(
        self,
        value: Int[Tensor, "*samples batch sites"],
        /,
        sites: Bool[Tensor, "*#samples #batch sites"] | None = None,
    ) -> Float[Tensor, "*samples batch"]:
        """log p(x_S | xt), nats, S the masked ones of ``sites`` (all if None): the law of ``restrict(S)``.

        Known sites in S contribute 0 where they agree with what is known; else the result is -inf.
        """
        chosen = torch.ones_like(self.known) if sites is None else sites
        shape = torch.broadcast_shapes(value.shape, chosen.shape, self.known.shape)
        value, chosen = value.expand(shape), chosen.expand(shape)
        clash = (chosen & self.known & (value != self.tokens)).any(-1)
        batch = torch.arange(len(self.known), device=self.known.device).expand(shape[:-1]).reshape(-1)
        flat = (chosen & ~self.known).reshape(-1, shape[-1])
        found = self._law(flat, batch).log_prob(value.reshape(-1, shape[-1])).reshape(shape[:-1])
        return torch.where(clash, -torch.inf, found)

    def _law(self, sites: Tensor, batch: Tensor) -> WindowedLaw:
        """The law of sets of sites, row r of ``sites`` in batch element ``batch[r]``: one query of the coupling."""
        cover = minimum_cover(sites, self._coupling.sites)
        inner: JointDistribution | None = None
        if len(cover.row):
            where = (batch[cover.row][:, None], cover.place)
            inner = self._coupling(
                self._logits[where],
                hidden=None if self._hidden is None else self._hidden[where],
                tokens=self.tokens[where],
                known=self.known[where],
            )
            if isinstance(inner, SetDistribution):
                inner = inner.restrict(cover.chosen)
        return WindowedLaw(inner, cover, sites, self.tokens[batch], self.known[batch], self._logits)


class WindowedLaw:
    """The product of the windows' laws over one set of sites per row; draws elsewhere are known tokens or 0."""

    def __init__(
        self,
        inner: JointDistribution | None,
        cover: Cover,
        sites: Bool[Tensor, "rows sites"],
        tokens: Int[Tensor, "rows sites"],
        known: Bool[Tensor, "rows sites"],
        like: Float[Tensor, "batch sites vocab"],
    ) -> None:
        self.cover, self.sites = cover, sites
        self._inner, self._tokens, self._known, self._like = inner, tokens, known, like

    def sample(
        self, sample_shape: tuple[int, ...] = (), *, generator: torch.Generator | None = None
    ) -> Int[Tensor, "*samples rows sites"]:
        """Exact joint draws within each window, independent between them; known tokens filled in."""
        if self._inner is None:
            return self._tokens.expand(*sample_shape, *self._tokens.shape).clone()
        return self._scattered(self._inner.sample(sample_shape, generator=generator))

    @property
    def mode(self) -> Int[Tensor, "rows sites"]:
        """The windows' modes, put together."""
        if self._inner is None:
            return self._tokens.clone()
        return self._scattered(self._inner.mode)  # type: ignore[attr-defined]

    @property
    def marginals(self) -> Float[Tensor, "rows sites vocab"]:
        """Single-site marginals; one-hot at known sites, 0 at masked ones outside of the set."""
        vocab = self._like.shape[-1]
        known = nn.functional.one_hot(self._tokens, vocab) * self._known[..., None]
        if self._inner is None:
            return known.to(self._like)
        inside = self._inner.marginals
        result = known.to(inside)
        row, site = self._places()
        result[row, site] = inside[self.cover.chosen]
        return result

    def log_prob(
        self, value: Int[Tensor, "rows sites"], /, sites: Bool[Tensor, "rows sites"] | None = None
    ) -> Float[Tensor, " rows"]:
        """log p of the set's tokens, or of the marginal of some of them, nats."""
        if self._inner is None:
            return self._like.new_zeros(len(self._tokens))
        cover = self.cover
        where = (cover.row[:, None], cover.place)
        chosen = cover.chosen if sites is None else cover.chosen & sites[where]
        inside = torch.where(chosen, value[where], 0)
        found = self._inner.log_prob(inside, sites=chosen)
        return found.new_zeros(len(self._tokens)).index_add(0, cover.row, found)

    def _places(self) -> tuple[Tensor, Tensor]:
        """Row and site of every site of the set, in the order of ``cover.chosen``."""
        cover = self.cover
        row = cover.row[:, None].expand_as(cover.chosen)
        return row[cover.chosen], cover.place[cover.chosen]

    def _scattered(self, inside: Tensor) -> Tensor:
        row, site = self._places()
        result = self._tokens.expand(*inside.shape[:-2], *self._tokens.shape).clone()
        result[..., row, site] = inside[..., self.cover.chosen]
        return result
