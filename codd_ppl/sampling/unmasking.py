"""Unmasking policies: which of the masked sites a reverse step reveals.

A policy is any object with ``reveal(state) -> bool (batch, sites)``. It decides *where* to write; *what* is
written there is always an exact joint draw from the coupled distribution. The state predicts lazily: a
policy that never asks for the marginals (the random one) costs no network call in a step that reveals
nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

from codd_ppl.diffusion.masking import reveal as reveal_at_rate
from codd_ppl.errors import ConfigError
from codd_ppl.sampling.protocol import JointDistribution
from codd_ppl.typing import Bool, Float, Int, Tensor

__all__ = [
    "Confidence",
    "Entropy",
    "LowConfidence",
    "Margin",
    "MarginalsFrom",
    "RandomOrder",
    "RandomUnmasking",
    "RevealState",
    "UnmaskingPolicy",
    "coupled_marginals",
    "network_marginals",
    "ranks",
]


def _no_joint() -> JointDistribution:
    raise ConfigError("this state has no coupled distribution; give RevealState(joint=...) a callable")


@dataclass(frozen=True)
class RevealState:
    """What a policy may look at in one reverse step.

    Attributes:
        masked: (batch, sites) bool, the sites that are still to be written.
        step: index of this step in the order of generation, 0 .. steps - 1.
        steps: number of reverse steps T.
        rate: chance (alpha_{k-1} - alpha_k)/(1 - alpha_k), k = T - step, with which the bound reveals a site; where
            sites are masked again it makes up for these, and may differ between rows.
        number: (batch,) int64, how many sites per row the schedule wants revealed now; over all steps these
            add up to the number of masked sites of the row exactly.
        generator: source of randomness, or None for torch's own.
        coupled: zero-argument callable, marginals (batch, sites, vocab) of the coupled distribution.
        network: zero-argument callable, softmax of the network's logits (batch, sites, vocab).
        joint: zero-argument callable, the coupled distribution itself, for policies that ask it for sets of sites.
            The first call of any of the three runs the network; all are computed once a step.
    """

    masked: Bool[Tensor, "batch sites"]
    step: int
    steps: int
    rate: float | Float[Tensor, " batch"]
    number: Int[Tensor, " batch"]
    generator: torch.Generator | None
    coupled: Callable[[], Tensor] = field(repr=False)
    network: Callable[[], Tensor] = field(repr=False)
    joint: Callable[[], JointDistribution] = field(repr=False, default=_no_joint)


@runtime_checkable
class UnmaskingPolicy(Protocol):
    """Chooses the sites that a step reveals; the sampler reveals all that are left in the last step."""

    def reveal(self, state: RevealState) -> Bool[Tensor, "batch sites"]:
        """Bool (batch, sites), a subset of ``state.masked``; rows may be empty."""
        ...


MarginalsFrom = Callable[[RevealState], Tensor]
"""RevealState -> (batch, sites, vocab) probabilities by which a confidence policy ranks."""


def coupled_marginals(state: RevealState) -> Float[Tensor, "batch sites vocab"]:
    """Rank by the single-site marginals of the coupled distribution."""
    return state.coupled()


def network_marginals(state: RevealState) -> Float[Tensor, "batch sites vocab"]:
    """Rank by the network's own softmax, as samplers without a coupling do."""
    return state.network()


@dataclass(frozen=True)
class RandomUnmasking:
    """The reverse process of the bound: every masked site is revealed independently with the step's rate.

    With it the samples have exactly the law whose negative log-likelihood NELBO_T bounds (Sahoo et al. 2024,
    arXiv:2406.07524). The number of sites per step is random.
    """

    def reveal(self, state: RevealState) -> Bool[Tensor, "batch sites"]:
        """Independent coins with chance ``state.rate``."""
        return reveal_at_rate(state.masked, state.rate, generator=state.generator)


@dataclass(frozen=True)
class RandomOrder:
    """Reveal exactly as many sites as the schedule wants, in a uniformly random order of all sites.

    With as many linear steps as masked sites that is one token at a time. The order ignores the values, so that each
    step is an exact draw given what is known, as with :class:`RandomUnmasking`; the numbers are not random.
    """

    def reveal(self, state: RevealState) -> Bool[Tensor, "batch sites"]:
        """``state.number`` masked sites of each row, every set of that size equally likely."""
        if not bool(state.number.any()):
            return torch.zeros_like(state.masked)
        score = torch.rand(
            state.masked.shape, generator=state.generator, device=state.masked.device, dtype=torch.float64
        )
        return (ranks(score, state.masked) < state.number[:, None]) & state.masked


@dataclass(frozen=True)
class Confidence(ABC):
    """Reveal the sites of highest confidence, a number that a subclass reads off a site's marginals.

    Args:
        marginals: :func:`coupled_marginals` or :func:`network_marginals`.
        temperature: 0: the highest, ties to the left. Else sites are drawn without replacement with chances
            proportional to exp(confidence / temperature) (Gumbel-top-k; Dream's ``alg_temp``).

    Raises:
        ConfigError: a negative temperature.
    """

    marginals: MarginalsFrom = coupled_marginals
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(
                f"temperature: expected 0 or more, found {self.temperature!r}; 0 takes the best"
            )

    @staticmethod
    @abstractmethod
    def confidence(marginals: Float[Tensor, "batch sites vocab"]) -> Float[Tensor, "batch sites"]:
        """The larger, the earlier a site is revealed."""

    def ranks(self, state: RevealState) -> Int[Tensor, "batch sites"]:
        """Place of each masked site in the order of its row, from 0; those of other sites come after."""
        score = self.confidence(self.marginals(state))
        if self.temperature > 0:
            uniform = torch.rand(
                score.shape, generator=state.generator, device=score.device, dtype=torch.float64
            )
            score = score.double() / self.temperature - (-uniform.clamp_min(1e-300).log()).log()
        return ranks(score, state.masked)

    def reveal(self, state: RevealState) -> Bool[Tensor, "batch sites"]:
        """The first ``state.number`` masked sites of each row; asks for no marginals where no row wants any."""
        if not bool(state.number.any()):
            return torch.zeros_like(state.masked)
        return (self.ranks(state) < state.number[:, None]) & state.masked


@dataclass(frozen=True)
class LowConfidence(Confidence):
    """Reveal the sites whose most probable token is most probable: confidence max_v p_i(v).

    The unmasking order of MaskGIT (Chang et al. 2022, arXiv:2202.04200), which LLaDA (arXiv:2502.09992) calls
    low-confidence remasking: the low confidences stay masked.
    """

    @staticmethod
    def confidence(marginals: Float[Tensor, "batch sites vocab"]) -> Float[Tensor, "batch sites"]:
        """max_v p_i(v)."""
        return marginals.amax(-1)


@dataclass(frozen=True)
class Margin(Confidence):
    """Reveal the sites with the largest lead of the first token over the second: p_(1) - p_(2).

    Top-k margin of Kim et al. 2025, arXiv:2502.06768.
    """

    @staticmethod
    def confidence(marginals: Float[Tensor, "batch sites vocab"]) -> Float[Tensor, "batch sites"]:
        """p_(1) - p_(2)."""
        best = marginals.topk(min(2, marginals.shape[-1]), dim=-1).values
        return best[..., 0] - best[..., 1:].sum(-1)


@dataclass(frozen=True)
class Entropy(Confidence):
    """Reveal the sites of smallest entropy: confidence -H(p_i).

    The rule that Dream (Ye et al. 2025, arXiv:2508.15487) calls ``entropy``.
    """

    @staticmethod
    def confidence(marginals: Float[Tensor, "batch sites vocab"]) -> Float[Tensor, "batch sites"]:
        """-H(p_i), nats."""
        return -torch.special.entr(marginals).sum(-1)


def ranks(
    score: Float[Tensor, "batch sites"], among: Bool[Tensor, "batch sites"]
) -> Int[Tensor, "batch sites"]:
    """Place of each site of a set in its row, highest score first, ties to the left; other sites come after."""
    order = score.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1)
