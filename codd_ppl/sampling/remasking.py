"""Written tokens masked again, so that later steps can correct them: the ReMDM sampler (Wang et al. 2025).

A step from time t to s < t (alpha_t < alpha_s, arXiv:2503.00307) masks each written site again with chance sigma, and
reveals each masked one with chance

    r = (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t),      0 <= sigma <= sigma_max = min(1, (1 - alpha_s) / alpha_t),

so that a site is written at time s with chance alpha_t (1 - sigma) + (1 - alpha_t) r = alpha_s, whatever sigma is: the
masks have the marginals of the process that the network was trained on. The last step has alpha_s = 1, so sigma = 0.
Sites that the template gave are never touched. Where sigma doesn't look at the values, a perfect joint keeps its law.

It corrects a network that saw too little when it wrote, not independent draws: of two tokens that must be equal, drawn
by a perfect network independently, (1 - 1/vocab) / T of the pairs are wrong in the end, and more if sigma > 0,
as sites that are masked together are drawn anew together (the chain of states is in tests/sampling/test_remasking.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from codd_ppl.diffusion.masking import reveal
from codd_ppl.errors import ConfigError
from codd_ppl.typing import Bool, Float, Tensor

__all__ = ["Cap", "Confident", "RemaskState", "Remasking", "Rescale", "remasking_strategy"]


@dataclass(frozen=True)
class RemaskState:
    """What a strategy may look at in one step.

    Attributes:
        open_sites: (batch, sites) bool, the sites that the template left to write.
        written: those of them that hold a token now.
        alpha_t, alpha_s: share of written sites that the process has now, and shall have after the step.
        confidence: (batch, sites) marginal probability of each token when it was drawn, for strategies with
            ``needs_confidence``.
        generator: source of randomness, or None for torch's own.
    """

    open_sites: Bool[Tensor, "batch sites"]
    written: Bool[Tensor, "batch sites"]
    alpha_t: float
    alpha_s: float
    confidence: Float[Tensor, "batch sites"] | None = None
    generator: torch.Generator | None = None

    @property
    def sigma_max(self) -> float:
        """min(1, (1 - alpha_s) / alpha_t)."""
        if self.alpha_t <= 0:
            return 1.0
        return min(1.0, max(0.0, (1 - self.alpha_s) / self.alpha_t))


@runtime_checkable
class Remasking(Protocol):
    """Chooses the written sites that a step masks again, and says how many masked ones make up for it."""

    @property
    def needs_confidence(self) -> bool:
        """Whether it looks at ``state.confidence``, which costs a query of the coupling in every step."""

    def remask(self, state: RemaskState) -> Bool[Tensor, "batch sites"]:
        """Bool (batch, sites), a subset of ``state.written``."""
        ...

    def rate(self, state: RemaskState) -> float | Float[Tensor, " batch"]:
        """The chance r with which each masked site is revealed."""
        ...


@dataclass(frozen=True)
class _Uniform(ABC):
    """The same sigma at every written site."""

    eta: float = 0.04

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"eta: expected a number from 0 to 1, found {self.eta!r}; 0 never masks again")

    @property
    def needs_confidence(self) -> bool:
        """No."""
        return False

    @abstractmethod
    def sigma(self, state: RemaskState) -> float:
        """Chance that a written site is masked again, at most ``state.sigma_max``."""

    def remask(self, state: RemaskState) -> Bool[Tensor, "batch sites"]:
        """Independent coins with chance sigma."""
        return reveal(state.written, self.sigma(state), generator=state.generator)

    def rate(self, state: RemaskState) -> float:
        """r as above, with sigma."""
        if state.alpha_t >= 1:
            return 1.0
        rate = (state.alpha_s - (1 - self.sigma(state)) * state.alpha_t) / (1 - state.alpha_t)
        return min(1.0, max(0.0, rate))


@dataclass(frozen=True)
class Cap(_Uniform):
    """sigma = min(eta, sigma_max): the paper's ReMDM-cap.

    Raises:
        ConfigError: eta outside of [0, 1].
    """

    def sigma(self, state: RemaskState) -> float:
        """min(eta, sigma_max)."""
        return min(self.eta, state.sigma_max)


@dataclass(frozen=True)
class Rescale(_Uniform):
    """sigma = eta sigma_max: the paper's ReMDM-rescale.

    Raises:
        ConfigError: eta outside of [0, 1].
    """

    def sigma(self, state: RemaskState) -> float:
        """eta sigma_max."""
        return self.eta * state.sigma_max


@dataclass(frozen=True)
class Confident(Cap):
    """Doubtful tokens rather than sure ones: the paper's ReMDM-conf.

        sigma_i = sigma n softmax_i(-psi_i),      psi_i the marginal probability of token i when it was drawn,

    over the n written sites of a row, with sigma = min(eta, sigma_max). The paper has sigma times the softmax alone, a
    single token's worth a step. With the factor n as many tokens are masked again as with :class:`Cap`, and r makes up
    for them (exactly while no sigma_i is beyond 1, where it is cut; sigma < 0.36 is enough). As the choice looks at the
    values, a perfect joint is not kept exactly.

    Raises:
        ConfigError: eta outside of [0, 1].
    """

    @property
    def needs_confidence(self) -> bool:
        """Yes."""
        return True

    def remask(self, state: RemaskState) -> Bool[Tensor, "batch sites"]:
        """Independent coins with chances sigma_i."""
        if state.confidence is None:
            raise ConfigError("Confident: expected state.confidence; keep needs_confidence True, or use Cap")
        doubt = (-state.confidence).masked_fill(~state.written, -torch.inf)
        share = doubt.softmax(-1).masked_fill(~state.written, 0.0) * state.written.sum(-1, keepdim=True)
        coin = torch.rand(share.shape, generator=state.generator, device=share.device, dtype=share.dtype)
        return state.written & (coin < self.sigma(state) * share)


def remasking_strategy(name_or_strategy: str | Remasking) -> Remasking:
    """The strategy of that name, with its defaults; an object is handed back as it is.

    Names: ``cap``, ``rescale``, ``confidence``.

    Raises:
        ConfigError: unknown name, or an object without the methods of :class:`Remasking`.
    """
    named: dict[str, Callable[[], Remasking]] = {"cap": Cap, "rescale": Rescale, "confidence": Confident}
    if isinstance(name_or_strategy, str):
        if name_or_strategy not in named:
            raise ConfigError(
                f"remasking: expected one of {', '.join(named)} or an object, found {name_or_strategy!r}. What LLaDA "
                'calls remasking="low_confidence" or "random" is the order of unmasking: pass it as unmasking=, or as '
                "it is to Sampler.from_arguments"
            )
        return named[name_or_strategy]()
    if isinstance(name_or_strategy, type) or not isinstance(name_or_strategy, Remasking):
        raise ConfigError(
            f"remasking: expected a name or an object with remask(state) and rate(state), found {name_or_strategy!r}; "
            "pass one of " + ", ".join(named) + ", or e.g. Cap(eta=0.02)"
        )
    return name_or_strategy
