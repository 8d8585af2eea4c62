"""Starts of expectation maximisation: tables that break the symmetry of the states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from codd_ppl.errors import PotentialsError
from codd_ppl.graphs import FactorGraph
from codd_ppl.potentials.clustering import contexts, k_means, suffixes
from codd_ppl.potentials.statistics import log_unigram
from codd_ppl.potentials.table import table_shapes
from codd_ppl.typing import Float, Int

__all__ = ["Clones", "Clusters", "Given", "RandomStart", "Start"]

AT_ONCE = 1 << 22
"""Entries of a table that random numbers are drawn for at once."""

ITEMS = 10
"""N-grams for each state that a clustering should have."""

LONGEST = 4
"""Order of n-grams to get there."""


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


@dataclass(frozen=True)
class Given:
    """Tables that exist already, of an earlier fit for instance.

    Args:
        given: tie or factor name -> log-probabilities over the last axis.
    """

    given: Mapping[str, Tensor]

    def tables(
        self, graph: FactorGraph, blocks: Int[Tensor, "blocks sites"], generator: torch.Generator
    ) -> dict[str, Float[Tensor, "..."]]:
        """Tie or factor name -> log-probabilities over the last axis.

        Raises:
            PotentialsError: they don't fit the graph.
        """
        shapes = table_shapes(graph)
        found = {name: tuple(value.shape) for name, value in self.given.items()}
        if found != shapes:
            raise PotentialsError(f"expected tables of the shapes {shapes} to start from, found {found}")
        return dict(self.given)


# Held-out bits after one fit in minibatches on Simple Wikipedia, all by the same number of tokens (40 s of a core for
# byte pairs; clustering takes one second of it):
#                                                  random    clones    clusters
#   characters a to z, 128 states, 1.9 M tokens     2.841     2.762     2.719    bits per character
#   4,096 byte pairs, 256 states, 3.2 M tokens      8.068     7.903     7.856    bits per token
@dataclass(frozen=True)
class Clusters:
    """States are clusters of n-grams by the tokens around them; tables are counts of the text with states filled in.

    Every site gets the state of the longest frequent n-gram that ends there (:mod:`codd_ppl.potentials.clustering`).
    For graphs where each token has a latent of its own; tables over other latents start near uniform. Elsewhere
    it is :class:`RandomStart`.

    Args:
        order: of the n-grams; 1 clusters the tokens. None: the smallest from 2 on with ten n-grams for each state.
        offsets: where to look for the tokens around; 0 is the n-gram's last.
        neighbours: so many of the most frequent tokens are told apart there.
        power: of the number of times an n-gram occurs, its weight in k-means.
        own: share of the counts in the tables; the rest goes by frequency.
        noise: standard deviation of the logits.
        blocks: so many of the text's blocks are looked at, drawn by the seed.
    """

    order: int | None = None
    offsets: tuple[int, ...] = (0, 1)
    neighbours: int = 256
    power: float = 1.0
    own: float = 0.9
    noise: float = 0.1
    blocks: int = 20_000

    def tables(
        self, graph: FactorGraph, blocks: Int[Tensor, "blocks sites"], generator: torch.Generator
    ) -> dict[str, Float[Tensor, "..."]]:
        """Tie or factor name -> log-probabilities over the last axis."""
        holders = {f.scope[1]: f.scope[0] for f in graph.factors.values() if f.order == 2}
        site = {holders[x]: i for i, x in enumerate(graph.tokens) if x in holders}
        sizes = {graph.variables[z].cardinality for z in site if graph.variables[z].latent}
        if len(site) < len(graph.tokens) or len(sizes) != 1:
            return RandomStart().tables(graph, blocks, generator)
        blocks = blocks[torch.randperm(len(blocks), generator=generator)[: self.blocks]].long()
        filled_in = self.states(blocks, token_values(graph), sizes.pop(), generator)
        columns = dict(zip(graph.tokens, blocks.unbind(1), strict=True))
        columns |= {z: filled_in[:, i] for z, i in site.items()}
        counts: dict[str, Tensor] = {}
        shapes = table_shapes(graph)
        for factor in graph.factors.values():
            if all(v in columns for v in factor.scope):
                name, code = factor.tie or factor.name, torch.zeros(len(blocks), dtype=torch.int64)
                for v in factor.scope:
                    code = code * graph.variables[v].cardinality + columns[v]
                found = counts.setdefault(
                    name, torch.zeros(shapes[name])
                )  # large: all that follows is in place
                found.view(-1).index_add_(0, code, torch.ones(len(code)))
        for value in counts.values():
            overall = value.flatten(0, -2).sum(0) if value.dim() > 1 else torch.ones_like(value)
            overall = (overall + 1) / (overall + 1).sum()
            value.div_(value.sum(-1, keepdim=True).clamp(min=1)).mul_(self.own)
            value.add_(overall, alpha=1 - self.own).log_()
            for rows in value.split(max(1, AT_ONCE // value.shape[-1])) if value.dim() > 1 else (value,):
                rows.add_(torch.randn(rows.shape, generator=generator), alpha=self.noise)
                rows.sub_(rows.logsumexp(-1, keepdim=True))
        others = [name for name in shapes if name not in counts]
        return counts if not others else RandomStart().tables(graph, blocks, generator) | counts

    def states(
        self, blocks: Int[Tensor, "blocks sites"], vocab_size: int, states: int, generator: torch.Generator
    ) -> Int[Tensor, "blocks sites"]:
        """The state of every site."""
        order = self.order or 2
        items, count = suffixes(blocks, vocab_size, order, ITEMS * states)
        while self.order is None and order < LONGEST and count < ITEMS * states:
            order += 1
            items, count = suffixes(blocks, vocab_size, order, ITEMS * states)
        points = contexts(blocks, items, count, self.offsets, self.neighbours)
        weights = torch.bincount(items.reshape(-1), minlength=count).float().pow(self.power)
        own, _ = k_means(points, min(states, count), weights, generator=generator)
        return own[items]


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
