"""Adaptive unmasking: as many sites at once as the coupled law is sure of, so that easy text takes fewer steps.

The policies take a prefix of an order of the masked sites (most confident first), at least one site of each row, and
the longest one that keeps to a threshold. The criteria are monotone in the prefix: adding a site can lower a joint
probability and raise a joint entropy, never the other way. The longest prefix is found by bisection, for all rows
together: log2(masked sites) queries of the coupling and no call of the network. What a step reveals doesn't look at
the values that it will write, so that every step is an exact draw.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import Protocol, runtime_checkable

import torch

from codd_ppl.errors import ConfigError
from codd_ppl.sampling.unmasking import Confidence, Entropy, LowConfidence, RevealState
from codd_ppl.typing import Bool, Int, Tensor

__all__ = [
    "ConfidenceThreshold",
    "EntropyBound",
    "JointConfidence",
    "JointEntropy",
    "ListedDistribution",
    "longest_prefix",
]


def longest_prefix(
    holds: Callable[[Int[Tensor, " batch"]], Bool[Tensor, " batch"]], most: Int[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The largest n from 1 to ``most`` up to which a criterion holds; 1 if it never does (0 where ``most`` is).

    Args:
        holds: asked for one size of each row at a time, ceil(log2 most) times.
        most: largest size of each row.
    """
    low, high = most.clamp(max=1), most
    while bool((low < high).any()):
        middle = (low + high + 1) // 2
        good = holds(middle)
        low, high = torch.where(good & (middle > low), middle, low), torch.where(good, high, middle - 1)
        high = torch.maximum(low, high)
    return low


@dataclass(frozen=True)
class JointConfidence:
    """The longest prefix whose most confident tokens are jointly probable:

        p(x*_S | xt) >= threshold,      x*_i = argmax_v p_i(v),

    with the joint probability exactly as the coupling says, the other masked sites summed out.

    Args:
        threshold: near 1: almost certain sets only.
        order: which sites come first.

    Raises:
        ConfigError: a threshold outside of [0, 1].
    """

    threshold: float = 0.5
    order: Confidence = LowConfidence()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not 0 <= self.threshold <= 1:
            raise ConfigError(
                f"threshold: expected a probability from 0 to 1, found {self.threshold!r}; 0 reveals everything at once"
            )

    def reveal(self, state: RevealState) -> Bool[Tensor, "batch sites"]:
        """That prefix of each row."""
        if not bool(state.masked.any()):
            return state.masked
        rank = self.order.ranks(state)
        best, dist = state.coupled().argmax(-1), state.joint()
        least = log(self.threshold) if self.threshold > 0 else -torch.inf

        def holds(size: Tensor) -> Tensor:
            # A hair of room, for a token that is certain up to rounding.
            return dist.log_prob(best, sites=_first(state, rank, size)) >= least - 1e-6

        return _first(state, rank, longest_prefix(holds, state.masked.sum(-1)))


@runtime_checkable
class ListedDistribution(Protocol):
    """A law that can list all its sequences."""

    def enumerate_support(self) -> Int[Tensor, "sequences batch sites"]:
        """All of them."""


@dataclass(frozen=True)
class JointEntropy:
    """The longest prefix whose tokens have a small joint entropy under the coupling:

        H(x_S | xt) = E[-log p(x_S | xt)] <= threshold.

    Every p(x_S | xt) is exact. The expectation is a mean over exact joint draws, the same ones for all sizes (so that
    the estimate is monotone, too) and unbiased for each: with latents summed out, the entropy itself has no polynomial
    algorithm. ``draws=None`` takes all sequences instead, which is exact, where they are few enough to list.

    Args:
        threshold: in nats, of a step and row.
        draws: number of joint draws, or None.
        order: which sites come first.

    Raises:
        ConfigError: a negative threshold, or draws < 1; at the first step, ``draws=None`` with a law that can't list.
        IntractableError: at the first step, ``draws=None`` with too many sequences.
    """

    threshold: float = 1.0
    draws: int | None = 16
    order: Confidence = Entropy()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        _nats(self.threshold)
        if self.draws is not None and (isinstance(self.draws, bool) or self.draws < 1):
            raise ConfigError(
                f"draws: expected an integer of at least 1, or None for all, found {self.draws!r}"
            )

    def reveal(self, state: RevealState) -> Bool[Tensor, "batch sites"]:
        """That prefix of each row."""
        if not bool(state.masked.any()):
            return state.masked
        rank, dist = self.order.ranks(state), state.joint()
        if self.draws is not None:
            values = dist.sample((self.draws,), generator=state.generator)
            weights = values.new_ones(self.draws, 1).double() / self.draws
        elif isinstance(dist, ListedDistribution):
            values = dist.enumerate_support()
            weights = dist.log_prob(values).double().exp()
        else:
            raise ConfigError(
                f"draws=None lists all sequences, which {type(dist).__name__} can't; give a number of draws, e.g. 16"
            )

        def holds(size: Tensor) -> Tensor:
            logs = dist.log_prob(values, sites=_first(state, rank, size)).double()
            return (
                -(weights * logs.masked_fill(weights.expand_as(logs) == 0, 0.0)).sum(0)
                <= self.threshold + 1e-6
            )

        return _first(state, rank, longest_prefix(holds, state.masked.sum(-1)))


@dataclass(frozen=True)
class EntropyBound:
    """The longest prefix whose tokens can't depend on each other much, as single marginals show:

        sum_{i in S} H(p_i) - max_{i in S} H(p_i) <= threshold,

    an upper bound of the dependence (total correlation) that an independent draw of S would lose: the EB-Sampler of
    Ben-Hamu et al. 2025, arXiv:2505.24857, for networks without a coupling. It asks for no joint query.

    Args:
        threshold: in nats.
        order: which sites come first; with ``Entropy(network_marginals)`` the coupling isn't asked at all.

    Raises:
        ConfigError: a negative threshold.
    """

    threshold: float = 0.5
    order: Confidence = Entropy()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        _nats(self.threshold)

    def reveal(self, state: RevealState) -> Bool[Tensor, "batch sites"]:
        """That prefix of each row."""
        if not bool(state.masked.any()):
            return state.masked
        rank = self.order.ranks(state)
        entropy = torch.special.entr(self.order.marginals(state).double()).sum(-1)
        ordered = torch.zeros_like(entropy).scatter(-1, rank, entropy)
        bound = ordered.cumsum(-1) - ordered.cummax(-1).values
        size = (bound <= self.threshold + 1e-6).long().cumprod(-1).sum(-1).clamp_min(1)
        return _first(state, rank, size)


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Every site whose confidence is at least a threshold, and at least as many as the schedule wants, or one.

    What Fast-dLLM (Wu et al. 2025, arXiv:2505.22618) and diffusers' block refinement do with ``threshold``: each site
    alone, without a look at their joint law.

    Args:
        threshold: in the units of ``order``.
        order: the confidence.
    """

    threshold: float = 0.95
    order: Confidence = LowConfidence()  # noqa: RUF009 - frozen

    def reveal(self, state: RevealState) -> Bool[Tensor, "batch sites"]:
        """Those sites."""
        if not bool(state.masked.any()):
            return state.masked
        sure = self.order.confidence(self.order.marginals(state)) >= self.threshold
        return state.masked & (sure | (self.order.ranks(state) < state.number.clamp_min(1)[:, None]))


def _first(state: RevealState, rank: Tensor, size: Tensor) -> Tensor:
    return state.masked & (rank < size[:, None])


def _nats(threshold: float) -> None:
    if isinstance(threshold, bool) or not 0 <= threshold < float("inf"):
        raise ConfigError(f"threshold: expected nats, a number of at least 0, found {threshold!r}")
