"""What sampling and evaluation ask of a coupling: two sizes, one call, and three queries of its answer.

``CouplingLayer`` and ``CoupledCategorical`` have them. So may an object of your own: nothing is inherited. Some ways to
draw (:mod:`codd_ppl.sampling.drawing`) ask for one method more; each has its protocol here.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

from codd_ppl.typing import Bool, Float, Int, Tensor

__all__ = [
    "CheckedCoupling",
    "Coupling",
    "JointDistribution",
    "LatentDistribution",
    "ModalDistribution",
    "OrderedDistribution",
    "RankedDistribution",
    "WarmCoupling",
]


@runtime_checkable
class JointDistribution(Protocol):
    """p(x_M | xt): a distribution over all sites jointly, with the known ones clamped."""

    @property
    def marginals(self) -> Float[Tensor, "batch sites vocab"]:
        """Single-site probabilities; one-hot at known sites."""

    def log_prob(
        self, value: Int[Tensor, "batch sites"], /, sites: Bool[Tensor, "batch sites"] | None = None
    ) -> Float[Tensor, " batch"]:
        """log p(x_S | xt) in nats, S the masked ones of ``sites`` (all if None)."""

    def sample(
        self, sample_shape: tuple[int, ...] = (), *, generator: torch.Generator | None = None
    ) -> Int[Tensor, "*samples batch sites"]:
        """Exact joint draws, known tokens filled in."""


@runtime_checkable
class LatentDistribution(Protocol):
    """A law with latent variables: tokens may be sharpened given these."""

    def sample_sharpened(
        self, temperature: float, generator: torch.Generator | None = None
    ) -> Int[Tensor, "batch sites"]:
        """Latents z from their law, then tokens from p(x | z)^(1 / temperature), normalised."""


@runtime_checkable
class OrderedDistribution(Protocol):
    """A law that can draw one site after the other, each given those before it."""

    def sample_in_turns(
        self,
        turns: Int[Tensor, "batch sites"] | Callable[[Tensor], Tensor],
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch sites"]:
        """Sites with turn 0 first, then those with turn 1 and so on; negative: not at all.

        ``turns`` may be a callable that reads them off the marginals.
        """


@runtime_checkable
class ModalDistribution(Protocol):
    """A law that knows its most probable assignment."""

    @property
    def mode(self) -> Int[Tensor, "batch sites"]:
        """A most probable assignment, known tokens filled in."""


@runtime_checkable
class RankedDistribution(Protocol):
    """A law that knows its most probable assignments."""

    def k_best(self, k: int) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k sites"]]:
        """Log-probabilities, descending, and tokens of the k best assignments; -inf where there are fewer."""

    def log_prob(
        self, value: Int[Tensor, "*draws batch sites"], /, sites: Bool[Tensor, "batch sites"] | None = None
    ) -> Float[Tensor, "*draws batch"]:
        """log p(x_S | xt) in nats."""


@runtime_checkable
class Coupling(Protocol):
    """Turns the network's answer into a joint distribution over the masked sites."""

    @property
    def sites(self) -> int:
        """Number of tokens of the graph."""

    @property
    def vocab_size(self) -> int:
        """Number of values of a token."""

    def __call__(
        self,
        logits: Float[Tensor, "batch sites vocab"],
        /,
        *,
        hidden: Float[Tensor, "batch sites hidden"] | None,
        tokens: Int[Tensor, "batch sites"],
        known: Bool[Tensor, "batch sites"],
    ) -> JointDistribution:
        """Couple the logits; ``tokens`` is read where ``known`` only."""


@runtime_checkable
class CheckedCoupling(Protocol):
    """A coupling that can tell from the known tokens alone that there is nothing to draw (hard constraints)."""

    def check(self, tokens: Int[Tensor, "batch sites"], known: Bool[Tensor, "batch sites"], /) -> None:
        """Raise ``InfeasibleError`` where the known tokens can't be completed."""


@runtime_checkable
class WarmCoupling(Coupling, Protocol):
    """A coupling whose iterations may start from where those of an earlier step of the same sequences ended."""

    @property
    def warm_starts(self) -> bool:
        """Whether it iterates at all, so that ``start`` is allowed."""

    def __call__(
        self,
        logits: Float[Tensor, "batch sites vocab"],
        /,
        *,
        hidden: Float[Tensor, "batch sites hidden"] | None,
        tokens: Int[Tensor, "batch sites"],
        known: Bool[Tensor, "batch sites"],
        start: JointDistribution | None = None,
    ) -> JointDistribution:
        """Couple the logits; ``start`` is what an earlier call returned."""
