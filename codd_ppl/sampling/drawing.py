"""How the tokens of a step are drawn: a small object with ``draw(dist, revealed, generator) -> tokens``.

A policy decides *where* to write, a draw *what*. ``Joint`` is the exact joint sample that the T-step bound is about;
at temperature 1 ``Latent`` and ``AnyOrder`` have the same law. Temperature of a coupled law is #P-hard in general,
these are two tractable ways to sharpen one (DESIGN section 3). ``Mode`` and ``KBest`` maximise.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from codd_ppl.errors import ConfigError
from codd_ppl.sampling.names import by_name
from codd_ppl.sampling.policies import unmasking_policy
from codd_ppl.sampling.protocol import (
    JointDistribution,
    LatentDistribution,
    ModalDistribution,
    OrderedDistribution,
    RankedDistribution,
)
from codd_ppl.sampling.unmasking import Confidence, ranks
from codd_ppl.typing import Bool, Float, Int, Tensor

__all__ = ["AnyOrder", "Draw", "Joint", "KBest", "Latent", "Mode", "drawing_method", "k_best"]


@runtime_checkable
class Draw(Protocol):
    """Chooses the tokens of the revealed sites from a joint law."""

    def draw(
        self,
        dist: JointDistribution,
        revealed: Bool[Tensor, "batch sites"],
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch sites"]:
        """Tokens (batch, sites); read at revealed sites only."""
        ...


@dataclass(frozen=True)
class Joint:
    """An exact draw of p(x_S | xt), the law of the bound."""

    def draw(
        self,
        dist: JointDistribution,
        revealed: Bool[Tensor, "batch sites"],
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch sites"]:
        """One joint sample of all masked sites; those outside of S are not used, which sums them out."""
        return dist.sample((), generator=generator)


@dataclass(frozen=True)
class Latent:
    """Latents at temperature 1, tokens sharpened given them:

        z ~ p(z | xt),      x ~ p(x | z, xt)^(1/tau), normalised for this z.

    tau = 1 is an exact joint draw, and made as one. Which mixture component, tense or topic is written stays as random
    as it was; how it is written is sharpened. Without latents (a chain over tokens) it is p(x_M | xt)^(1/tau) itself,
    exactly.

    Raises:
        ConfigError: a temperature not above 0; at the draw, a law without ``sample_sharpened``.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _positive(self.temperature)

    def draw(
        self,
        dist: JointDistribution,
        revealed: Bool[Tensor, "batch sites"],
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch sites"]:
        """One such sample of all masked sites."""
        if not isinstance(dist, LatentDistribution):
            raise _lacks(self, dist, "sample_sharpened(temperature, generator)")
        if self.temperature == 1:
            return dist.sample((), generator=generator)
        return dist.sample_sharpened(self.temperature, generator=generator)


@dataclass(frozen=True)
class AnyOrder:
    """One site after the other, the most reliable first, each sharpened given those before it:

        x_i ~ p(x_i | xt, what was drawn so far)^(1/tau), normalised.

    Only the coupling is asked again, never the network. By the chain rule tau = 1 is an exact joint draw, whatever the
    order, as it is read off the marginals before the first draw; so that is what is made then, in one pass.

    Args:
        temperature: tau of every site.
        order: ``"low_confidence"``, ``"margin"``, ``"entropy"``, or a :class:`Confidence`.
        turns: sites are cut by their rank into so many turns of equal size, first the most reliable ones; within a turn
            they are drawn along the text, forth and back in turn. Along a path the whole then costs ``turns`` + 2
            passes (+ 1 where a projection has left its messages), the strict order one for every three sites or so;
            beside a joint draw from the same logits that is 1.3 to 2.9 times as long with four turns
            (tests/benchmarks/any_order.json). None: the strict order.

    Raises:
        ConfigError: a temperature not above 0, an unknown order, turns < 1; at the draw, a law without
            ``sample_in_turns``.
    """

    temperature: float = 1.0
    order: str | Confidence = "low_confidence"
    turns: int | None = 4
    _confidence: Confidence = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _positive(self.temperature)
        if self.turns is not None and (
            isinstance(self.turns, bool) or not isinstance(self.turns, int) or self.turns < 1
        ):
            raise ConfigError(f"turns: expected an integer of at least 1 or None, found {self.turns!r}")
        policy = unmasking_policy(self.order)
        if not isinstance(policy, Confidence):
            raise ConfigError(
                f"order: expected low_confidence, margin, entropy or a Confidence, found {self.order!r}; "
                f"the order of the sites is read off their marginals"
            )
        object.__setattr__(self, "_confidence", policy)

    def draw(
        self,
        dist: JointDistribution,
        revealed: Bool[Tensor, "batch sites"],
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch sites"]:
        """The revealed sites one by one; the others stay summed out."""
        if not isinstance(dist, OrderedDistribution):
            raise _lacks(self, dist, "sample_in_turns(turns, temperature, generator)")
        if self.temperature == 1:
            return dist.sample((), generator=generator)

        def turns(marginals: Tensor) -> Tensor:
            rank = ranks(self._confidence.confidence(marginals), revealed)
            if self.turns is not None:
                rank = rank * self.turns // revealed.sum(-1, keepdim=True).clamp_min(1)
            return rank.where(revealed, -1)

        return dist.sample_in_turns(turns, self.temperature, generator=generator)


@dataclass(frozen=True)
class Mode:
    """The tokens of a most probable assignment of all masked tokens and latents (max-product)."""

    def draw(
        self,
        dist: JointDistribution,
        revealed: Bool[Tensor, "batch sites"],
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch sites"]:
        """No randomness."""
        if not isinstance(dist, ModalDistribution):
            raise _lacks(self, dist, "mode")
        return dist.mode


@dataclass(frozen=True)
class KBest:
    """The most probable tokens among those of the k best assignments of tokens and latents.

    The most probable *tokens* are NP-hard to find where latents are summed out. This takes the k best assignments,
    which are exact, and of them the one whose revealed tokens have the largest p(x_S | xt), which is exact too: k = 1
    is ``Mode``, and a larger k is never worse. :func:`k_best` gives all of them.

    Raises:
        ConfigError: k < 1; at the draw, a law without ``k_best``.
    """

    k: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ConfigError(f"k: expected an integer of at least 1, found {self.k!r}")

    def draw(
        self,
        dist: JointDistribution,
        revealed: Bool[Tensor, "batch sites"],
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch sites"]:
        """No randomness."""
        return k_best(dist, self.k, revealed)[1][:, 0]


def k_best(
    dist: JointDistribution, k: int, sites: Bool[Tensor, "batch sites"] | None = None
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k sites"]]:
    """Tokens of the k best assignments of tokens and latents, by the exact probability of the tokens.

    Args:
        dist: a law with ``k_best``, such as ``CoupledCategorical``.
        k: at least 1.
        sites: the set S, None: all.

    Returns:
        log p(x_S | xt), descending, and the tokens. What repeats an earlier x_S (latents may differ) has
        log-probability -inf, as has what doesn't exist, whose tokens are those of the best; both come last.

    Raises:
        ConfigError: a law without ``k_best``, or k < 1.
    """
    if not isinstance(dist, RankedDistribution):
        raise _lacks(KBest(), dist, "k_best(k)")
    scores, tokens = dist.k_best(k)
    missing = scores == -torch.inf
    tokens = torch.where(missing[..., None], tokens[:, :1], tokens)
    logs = dist.log_prob(tokens.movedim(1, 0), sites=sites).movedim(0, 1)
    same = (tokens[:, :, None] == tokens[:, None]) | (False if sites is None else ~sites[:, None, None])
    earlier = torch.ones(k, k, dtype=torch.bool, device=tokens.device).tril(-1)
    logs = logs.masked_fill(missing | (same.all(-1) & earlier).any(-1), -torch.inf)
    logs, order = logs.sort(dim=-1, descending=True, stable=True)
    return logs, tokens.gather(1, order[..., None].expand_as(tokens))


def drawing_method(name_or_draw: str | Draw) -> Draw:
    """The draw of that name, with its defaults; an object is handed back as it is.

    Names: ``joint``, ``latent``, ``any_order``, ``mode``, ``k_best``.

    Raises:
        ConfigError: unknown name, or an object without a ``draw`` method.
    """
    named: dict[str, Callable[[], Draw]] = {
        "joint": Joint,
        "latent": Latent,
        "any_order": AnyOrder,
        "mode": Mode,
        "k_best": KBest,
    }
    like = (
        "an object with a method draw(dist, revealed, generator) -> tokens, such as AnyOrder(temperature=0.7)"
    )
    return by_name("drawing", name_or_draw, named, Draw, like)


def _positive(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ConfigError(
            f'temperature: expected a number above 0, found {temperature!r}; for the limit 0 use drawing="mode"'
        )


def _lacks(draw: Any, dist: Any, method: str) -> ConfigError:
    return ConfigError(
        f"drawing: {type(draw).__name__} asks the coupled law for {method}, which {type(dist).__name__} doesn't have; "
        'use drawing="joint", or a CouplingLayer, whose law has it'
    )
