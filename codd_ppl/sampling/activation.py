"""Coupling switched on row by row: off while most of a row is masked, on below a share gamma of masked sites.

Li et al. 2026 (arXiv:2603.00045) couple only below a mask ratio gamma = 0.8: with almost nothing known the first few
sites are far apart and nearly independent, and the coupled draw is paid for little.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from codd_ppl.compiler import compile
from codd_ppl.diffusion.nelbo import SetDistribution
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.errors import ConfigError
from codd_ppl.graphs import topologies
from codd_ppl.sampling.protocol import CheckedCoupling, Coupling, JointDistribution, WarmCoupling
from codd_ppl.typing import Bool, Float, Int, Tensor

__all__ = ["ActivatedCoupling", "RowwiseLaw"]


class ActivatedCoupling(nn.Module):
    """The coupling for rows with a share of masked sites of at most gamma, the product of softmaxes for the others.

        p(x_M | xt) = coupling(..)            if  (masked sites of the row) / sites <= gamma,
                      prod_i softmax(l_i)     else.

    The coupling isn't called for a batch in which it is off everywhere.

    Args:
        coupling: any.
        gamma: the paper's default is 0.8.

    Raises:
        ConfigError: gamma outside of [0, 1]; a coupling with hard constraints, which independent tokens would break.
    """

    def __init__(self, coupling: Coupling, gamma: float = 0.8) -> None:
        super().__init__()
        if isinstance(gamma, bool) or not 0 <= gamma <= 1:
            raise ConfigError(
                f"active_below: expected a share of masked sites from 0 to 1, found {gamma!r}; the paper's is 0.8, and "
                "1 always couples"
            )
        if isinstance(coupling, CheckedCoupling):
            raise ConfigError(
                f"active_below: expected a coupling without hard constraints, found {type(coupling).__name__}; where "
                "the coupling is off tokens are independent and would break them: leave active_below out"
            )
        self.coupling, self.gamma = coupling, gamma
        self.sites, self.vocab_size = coupling.sites, coupling.vocab_size
        self._plan = compile(topologies.independent(self.sites, self.vocab_size))

    @property
    def warm_starts(self) -> bool:
        """As the coupling."""
        return isinstance(self.coupling, WarmCoupling) and self.coupling.warm_starts

    def forward(
        self,
        logits: Float[Tensor, "batch sites vocab"],
        hidden: Float[Tensor, "batch sites hidden"] | None = None,
        *,
        tokens: Int[Tensor, "batch sites"],
        known: Bool[Tensor, "batch sites"],
        start: Any = None,
    ) -> Any:
        """One law, the other, or a :class:`RowwiseLaw` of both. ``start`` is what an earlier call returned."""
        on = (~known).float().mean(-1) <= self.gamma + 1e-6
        every, some = bool(on.all()), bool(on.any())
        alone: CoupledCategorical | None = None
        if not every:
            log_q = logits.float().log_softmax(-1) if logits.element_size() < 4 else logits.log_softmax(-1)
            log_q = log_q.masked_fill(known[..., None], 0.0)
            alone = CoupledCategorical(self._plan, {}, log_q, tokens, known, normalized=True)
        if not some and alone is not None:
            return alone
        start = start.coupled if isinstance(start, RowwiseLaw) else start
        warm = {} if start is None or getattr(start, "plan", None) is self._plan else {"start": start}
        coupled = self.coupling(logits, hidden=hidden, tokens=tokens, known=known, **warm)
        return coupled if alone is None else RowwiseLaw(coupled, alone, on)


class RowwiseLaw:
    """Rows of a batch under one of two laws. It can do what both of them can.

    Args:
        coupled, alone: the laws, each of the whole batch.
        on: (batch,) bool, the rows under ``coupled``.
    """

    def __init__(
        self, coupled: JointDistribution, alone: JointDistribution, on: Bool[Tensor, " batch"]
    ) -> None:
        self.coupled, self.alone, self.on = coupled, alone, on

    def _each(self, query: Callable[[Any], Tensor], behind: int) -> Tensor:
        """A query of both laws, whose batch has so many dimensions behind it."""
        on = self.on.reshape(-1, *[1] * behind)
        return torch.where(on, query(self.coupled), query(self.alone))

    @property
    def marginals(self) -> Float[Tensor, "batch sites vocab"]:
        """As each row's law."""
        return self._each(lambda law: law.marginals, 2)

    def log_prob(
        self,
        value: Int[Tensor, "*draws batch sites"],
        /,
        sites: Bool[Tensor, "*sets batch sites"] | None = None,
    ) -> Float[Tensor, "*draws batch"]:
        """As each row's law."""
        return self._each(lambda law: law.log_prob(value, sites=sites), 0)

    def sample(
        self, sample_shape: tuple[int, ...] = (), *, generator: torch.Generator | None = None
    ) -> Int[Tensor, "*samples batch sites"]:
        """As each row's law."""
        return self._each(lambda law: law.sample(sample_shape, generator=generator), 1)

    def sample_sharpened(
        self, temperature: float, generator: torch.Generator | None = None
    ) -> Int[Tensor, "batch sites"]:
        """As each row's law."""
        return self._each(lambda law: law.sample_sharpened(temperature, generator=generator), 1)

    def sample_in_turns(
        self,
        turns: Int[Tensor, "batch sites"] | Callable[[Tensor], Tensor],
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch sites"]:
        """As each row's law."""
        return self._each(lambda law: law.sample_in_turns(turns, temperature, generator=generator), 1)

    @property
    def mode(self) -> Int[Tensor, "batch sites"]:
        """As each row's law."""
        return self._each(lambda law: law.mode, 1)

    def k_best(self, k: int) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k sites"]]:
        """As each row's law."""
        (scores, tokens), (alone, others) = self.coupled.k_best(k), self.alone.k_best(k)  # type: ignore[attr-defined]
        on = self.on[:, None]
        return torch.where(on, scores, alone), torch.where(on[..., None], tokens, others)

    def restrict(self, sites: Bool[Tensor, "batch sites"]) -> "RowwiseLaw":
        """The law of a set of sites, where the coupled one has a law for each set."""
        law = self.coupled
        return RowwiseLaw(
            law.restrict(sites) if isinstance(law, SetDistribution) else law, self.alone, self.on
        )
