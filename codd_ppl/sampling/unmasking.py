"""Unmasking policies: which of the masked sites a reverse step reveals.

A policy is any object with ``reveal(state) -> bool (batch, sites)``. It decides *where* to write; *what* is
written there is always an exact joint draw from the coupled distribution. The state predicts lazily: a
policy that never asks for the marginals (the random one) costs no network call in a step that reveals
nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

from codd_ppl.diffusion.masking import reveal as reveal_at_rate
from codd_ppl.errors import ConfigError
from codd_ppl.typing import Bool, Float, Int, Tensor

__all__ = [
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
    "unmasking_policy",
]


@dataclass(frozen=True)
class RevealState:
    """What a policy may look at in one reverse step.

    Attributes:
        masked: (batch, sites) bool, the sites that are still to be written.
        step: index of this step in the order of generation, 0 .. steps - 1.
        steps: number of reverse steps T.
        rate: chance (alpha_{k-1} - alpha_k)/(1 - alpha_k), k = T - step, with which the bound reveals a site.
        number: (batch,) int64, how many sites per row the schedule wants revealed now; over all steps these
            add up to the number of masked sites of the row exactly.
        generator: source of randomness, or None for torch's own.
        coupled: zero-argument callable, marginals (batch, sites, vocab) of the coupled distribution.
        network: zero-argument callable, softmax of the network's logits (batch, sites, vocab).
            The first call of either runs the network; both are computed once a step.
    """

    masked: Bool[Tensor, "batch sites"]
    step: int
    steps: int
    rate: float
    number: Int[Tensor, " batch"]
    generator: torch.Generator | None
    coupled: Callable[[], Tensor] = field(repr=False)
    network: Callable[[], Tensor] = field(repr=False)


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
        return _highest(
            state,
            lambda: torch.rand(
                state.masked.shape,
                generator=state.generator,
                device=state.masked.device,
                dtype=torch.float64,
            ),
        )


@dataclass(frozen=True)
class LowConfidence:
    """Reveal the sites whose most probable token is most probable: confidence max_v p_i(v).

    The unmasking order of MaskGIT (Chang et al. 2022, arXiv:2202.04200), which LLaDA (arXiv:2502.09992) calls
    low-confidence remasking: the low confidences stay masked. Ties go to the left.
    """

    marginals: MarginalsFrom = coupled_marginals

    def reveal(self, state: RevealState) -> Bool[Tensor, "batch sites"]:
        """The ``state.number`` most confident masked sites of each row."""
        return _highest(state, lambda: self.marginals(state).amax(-1))


@dataclass(frozen=True)
class Margin:
    """Reveal the sites with the largest lead of the first token over the second: p_(1) - p_(2).

    Top-k margin of Kim et al. 2025, arXiv:2502.06768. Ties go to the left.
    """

    marginals: MarginalsFrom = coupled_marginals

    def reveal(self, state: RevealState) -> Bool[Tensor, "batch sites"]:
        """The ``state.number`` masked sites of each row with the largest margin."""

        def margin() -> Tensor:
            marginals = self.marginals(state)
            best = marginals.topk(min(2, marginals.shape[-1]), dim=-1).values
            return best[..., 0] - best[..., 1:].sum(-1)

        return _highest(state, margin)


@dataclass(frozen=True)
class Entropy:
    """Reveal the sites of smallest entropy: confidence -H(p_i). Ties go to the left.

    The rule that Dream (Ye et al. 2025, arXiv:2508.15487) calls ``entropy``.
    """

    marginals: MarginalsFrom = coupled_marginals

    def reveal(self, state: RevealState) -> Bool[Tensor, "batch sites"]:
        """The ``state.number`` masked sites of each row with the smallest entropy."""
        return _highest(state, lambda: -torch.special.entr(self.marginals(state)).sum(-1))


def unmasking_policy(name_or_policy: str | UnmaskingPolicy) -> UnmaskingPolicy:
    """The policy of that name, with its defaults; a policy object is handed back as it is.

    Names: ``random``, ``random_order``, ``low_confidence``, ``margin``, ``entropy``.

    Raises:
        ConfigError: unknown name, or an object without a ``reveal`` method.
    """
    named: dict[str, Callable[[], UnmaskingPolicy]] = {
        "random": RandomUnmasking,
        "random_order": RandomOrder,
        "low_confidence": LowConfidence,
        "margin": Margin,
        "entropy": Entropy,
    }
    if isinstance(name_or_policy, str):
        if name_or_policy not in named:
            raise ConfigError(
                f"unmasking: expected one of {', '.join(named)} or a policy object, found {name_or_policy!r}; "
                "pass one of these names, or an object with a method reveal(state) -> bool (batch, sites)"
            )
        return named[name_or_policy]()
    if isinstance(name_or_policy, type) or not isinstance(name_or_policy, UnmaskingPolicy):
        raise ConfigError(
            f"unmasking: expected a name or an object with a method reveal(state), found {name_or_policy!r}; "
            "pass one of " + ", ".join(named) + ", or an instance of a class that has that method"
        )
    return name_or_policy


def _highest(state: RevealState, confidence: Callable[[], Tensor]) -> Bool[Tensor, "batch sites"]:
    """The ``state.number`` masked sites of highest confidence; asks for no marginals where no row wants any."""
    if not bool(state.number.any()):
        return torch.zeros_like(state.masked)
    ranked = confidence().masked_fill(~state.masked, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    return (rank < state.number[:, None]) & state.masked
