"""Transforms of the network's logits before they are coupled: temperature, top-k and nucleus.

A transform is any callable (batch, sites, vocab) -> the same shape; -inf rules a token out. What a projected coupling
keeps as its single-site marginals is then the transformed law: the nucleus is the network's, the dependence the
coupling's. Sharpening the *joint* is another thing: see :mod:`codd_ppl.sampling.drawing`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from codd_ppl.errors import ConfigError
from codd_ppl.typing import Float, Tensor

__all__ = ["LogitsTransform", "Temperature", "TopK", "TopP", "chain_of"]

LogitsTransform = Callable[[Tensor], Tensor]
"""(batch, sites, vocab) logits -> logits of the same shape; at least one token of each site stays possible."""


@dataclass(frozen=True)
class Temperature:
    """l / tau: softmax(l / tau) is p^(1/tau), normalised.

    Raises:
        ConfigError: tau not above 0.
    """

    tau: float

    def __post_init__(self) -> None:
        if not 0 < self.tau < float("inf"):
            raise ConfigError(
                f"temperature: expected a number above 0, found {self.tau!r}; for the limit 0 draw with "
                'drawing="mode"'
            )

    def __call__(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Divide."""
        return logits / self.tau


@dataclass(frozen=True)
class TopK:
    """The k most probable tokens of each site; others are ruled out (Fan et al. 2018, arXiv:1805.04833).

    Tokens that tie with the k-th one stay. A k of the vocabulary or more changes nothing.

    Raises:
        ConfigError: k < 1, or not an integer.
    """

    k: int

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ConfigError(
                f"top_k: expected an integer of at least 1, found {self.k!r}; leave it out for all"
            )

    def __call__(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """-inf below the k-th largest."""
        if self.k >= logits.shape[-1]:
            return logits
        least = logits.topk(self.k, dim=-1).values[..., -1:]
        return logits.masked_fill(logits < least, -torch.inf)


@dataclass(frozen=True)
class TopP:
    """The smallest set of most probable tokens whose probability reaches p (Holtzman et al. 2020, arXiv:1904.09751).

    A token stays while those before it have less than p together, so that the first one always does.

    Raises:
        ConfigError: p outside of (0, 1].
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ConfigError(
                f"top_p: expected a probability in (0, 1], found {self.p!r}; 1 keeps every token"
            )

    def __call__(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """-inf outside of the nucleus."""
        if self.p == 1:
            return logits
        ordered, place = logits.sort(dim=-1, descending=True, stable=True)
        share = ordered.softmax(-1)
        out = share.cumsum(-1) - share >= self.p
        out[..., 0] = False
        return logits.masked_fill(torch.zeros_like(out).scatter(-1, place, out), -torch.inf)


def chain_of(transforms: LogitsTransform | Sequence[LogitsTransform] | None) -> tuple[LogitsTransform, ...]:
    """Transforms in the order in which they are applied; one alone and None are fine.

    Raises:
        ConfigError: one that can't be called.
    """
    if transforms is None:
        return ()
    found = tuple(transforms) if isinstance(transforms, Sequence) else (transforms,)
    for transform in found:
        if not callable(transform) or isinstance(transform, type):
            raise ConfigError(
                f"logits: expected callables from logits to logits, found {transform!r}; pass e.g. "
                "logits=[Temperature(0.7), TopP(0.9)]"
            )
    return found
