"""Starts of expectation maximisation: tables that break the symmetry of the states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from codd_ppl.graphs import FactorGraph
from codd_ppl.potentials.statistics import log_unigram
from codd_ppl.potentials.table import table_shapes
from codd_ppl.typing import Float, Int

__all__ = ["Clones", "RandomStart", "Start"]


@runtime_checkable
class Start(Protocol):
    """Where expectation maximisation starts; any object with this method will do."""

    def tables(
        self, graph: FactorGraph, blocks: Int[Tensor, "blocks sites"], generator: torch.Generator
    ) -> dict[str, Float[Tensor, "..."]]:
        """Tie or factor name -> log-probabilities over the last axis."""


@dataclass(frozen=True)
class RandomStart:
    """Near uniform over latent children, near the frequencies over token children.

    Args:
        noise: standard deviation of the logits of tokens.
        latent_noise: the same of latents.
    """

    noise: float = 1.0
    latent_noise: float = 0.3

    def tables(
        self, graph: FactorGraph, blocks: Int[Tensor, "blocks sites"], generator: torch.Generator
    ) -> dict[str, Float[Tensor, "..."]]:
        """Tie or factor name -> log-probabilities over the last axis."""
        frequency = log_unigram(blocks, token_values(graph)).float()

        def tokens(shape: tuple[int, ...]) -> Tensor:
            return frequency + self.noise * torch.randn(shape, generator=generator)

        return filled(graph, tokens, self.latent_noise, generator)


@dataclass(frozen=True)
class Clones:
    """Every state a clone of one token, frequent tokens having several: a chain starts as a bigram model.

    It learns contexts from there. For graphs where each token has a latent of its own (hidden Markov models, latent
    trees); elsewhere it is :class:`RandomStart`.

    Args:
        own: share of the emissions that is the state's own token; the rest goes by frequency.
        noise: standard deviation of the logits of tokens.
        latent_noise: the same of latents.
    """

    own: float = 0.5
    noise: float = 0.5
    latent_noise: float = 0.3

    def tables(
        self, graph: FactorGraph, blocks: Int[Tensor, "blocks sites"], generator: torch.Generator
    ) -> dict[str, Float[Tensor, "..."]]:
        """Tie or factor name -> log-probabilities over the last axis."""
        if not own_latents(graph):
            return RandomStart(latent_noise=self.latent_noise).tables(graph, blocks, generator)
        vocab = token_values(graph)
        frequency = log_unigram(blocks, vocab).float()
        shares = (0.7 * frequency).softmax(-1).cumsum(-1)

        def tokens(shape: tuple[int, ...]) -> Tensor:
            if len(shape) == 1:
                return frequency
            own = torch.searchsorted(shares, (torch.arange(shape[0]) + 0.5) / shape[0]).clamp(max=vocab - 1)
            mixed = ((1 - self.own) * frequency.exp()).repeat(shape[0], 1)
            mixed[torch.arange(shape[0]), own] += self.own
            return mixed.log_().add_(torch.randn(shape, generator=generator), alpha=self.noise)

        return filled(graph, tokens, self.latent_noise, generator)


def token_values(graph: FactorGraph) -> int:
    """The cardinality of the tokens."""
    return graph.variables[graph.tokens[0]].cardinality


def own_latents(graph: FactorGraph) -> bool:
    """Whether no two tokens have the same parent."""
    parents = [f.scope[0] for f in graph.factors.values() if not graph.variables[f.scope[-1]].latent]
    return len(set(parents)) == len(parents)


def filled(
    graph: FactorGraph,
    tokens: Callable[[tuple[int, ...]], Tensor],
    latent_noise: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Tables over token children as given, up to their norm, those over latent children near uniform."""
    result: dict[str, Tensor] = {}
    shapes = table_shapes(graph)
    for factor in graph.factors.values():
        name = factor.tie or factor.name
        if name in result:
            continue
        if graph.variables[factor.scope[-1]].latent:
            logits = latent_noise * torch.randn(shapes[name], generator=generator)
        else:
            logits = tokens(shapes[name])
        result[name] = logits.log_softmax(-1)
    return result
