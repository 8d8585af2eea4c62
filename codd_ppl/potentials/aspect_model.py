"""Factorising counts of pairs: a mixture of products fitted to the pairs that occur, however large the vocabulary.

The asymmetric aspect model of Hofmann (1999, "Probabilistic latent semantic indexing"), p(x, y) = sum_r p(r) p(x | r)
p(y | r), whose EM steps are the multiplicative updates of non-negative matrix factorisation under the Kullback-Leibler
divergence (Lee and Seung 2001; Gaussier and Goutte 2005). One component is kept for independent tokens: it is the
smoothing, as exact as that of a table and without its V x V entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codd_ppl.errors import ConfigError
from codd_ppl.typing import Float, Int

__all__ = ["AspectModel", "aspect_model"]

CHUNK = 1 << 22
"""Responsibilities (pairs times components) held at once."""


@dataclass(frozen=True)
class AspectModel:
    """p(x, y) = sum_r weight[r] left[r, x] right[r, y], float64; component 0 is that of independent tokens.

    Attributes:
        weight: (rank,), sums to 1. left, right: (rank, vocab), rows sum to 1.
        divergence: KL(observed || model) in nats before each step, and at the end; it never rises.
    """

    weight: Float[Tensor, "rank"]
    left: Float[Tensor, "rank vocab"]
    right: Float[Tensor, "rank vocab"]
    divergence: list[float]


def aspect_model(
    cells: Int[Tensor, "cells 2"],
    counts: Float[Tensor, "cells"],
    unigram: Float[Tensor, "vocab"],
    rank: int,
    pseudo_count: float | None = None,
    iterations: int = 60,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> AspectModel:
    """Fit by EM, cost cells * rank for each step.

    Component 0 is exp(unigram) on both sides and has a weight of at least pseudo_count / (n + pseudo_count), which is
    what mixing that many independent draws into the counts gives it; the others and their weights are fitted (one
    alone, rank 2, gains next to nothing: it has to keep the token frequencies). Each of them starts near one token on
    the left, frequent tokens having several, and is learned from there.

    Args:
        cells, counts: the distinct pairs and how often each was seen, from ``statistics.pair_counts``.
        unigram: log p(x), from :func:`codd_ppl.potentials.log_unigram`, finite.
        rank: components, 1 for independent tokens only.
        pseudo_count: the vocabulary's size by default, as in ``pointwise_mutual_information``.
        iterations: at most so many steps; fewer when one gains less than ``tolerance`` nats.
        seed: of the random start.

    Raises:
        ConfigError: a setting out of range.
    """
    vocab, n = len(unigram), float(counts.sum())
    kappa = float(vocab if pseudo_count is None else pseudo_count)
    if rank < 1 or iterations < 0 or kappa < 0 or n <= 0:
        raise ConfigError(
            f"expected rank >= 1, iterations >= 0, pseudo_count >= 0 and at least one pair, found rank={rank}, "
            f"iterations={iterations}, pseudo_count={kappa:g} and {n:g} pairs"
        )
    unigram = unigram.double().cpu()
    least = kappa / (n + kappa) if rank > 1 else 1.0
    weight, left, right = _start(unigram, rank, least, seed)
    share = counts / n
    entropy = -float(torch.special.xlogy(share, share).sum())
    divergence: list[float] = []
    for step in range(iterations + 1):
        likelihood, sums = _expect(cells, share, weight, left, right)
        divergence.append(max(0.0, -entropy - likelihood))
        small = len(divergence) > 1 and divergence[-2] - divergence[-1] < tolerance
        if rank == 1 or step == iterations or small:
            break
        weight, left, right = _maximise(sums, least, left, right)
    return AspectModel(weight, left, right, divergence)


def _start(unigram: Tensor, rank: int, least: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vocab, others = len(unigram), rank - 1
    shares = (0.7 * unigram).softmax(-1).cumsum(-1)
    own = torch.searchsorted(shares, (torch.arange(others) + 0.5).double() / max(1, others))
    left = 0.5 * unigram.exp().expand(others, -1)
    left = left.scatter_add(1, own.clamp(max=vocab - 1)[:, None], torch.full((others, 1), 0.5).double())
    noise = torch.randn(others, vocab, generator=generator, dtype=torch.float64)
    right = (unigram + 0.5 * noise).softmax(-1)
    weight = torch.full((others,), (1 - least) / max(1, others), dtype=torch.float64)
    first = unigram.softmax(-1)[None]
    return (
        torch.cat((torch.tensor([least]).double(), weight)),
        torch.cat((first, left / left.sum(-1, keepdim=True))),
        torch.cat((first, right)),
    )


def _expect(
    cells: Tensor, share: Tensor, weight: Tensor, left: Tensor, right: Tensor
) -> tuple[float, tuple[Tensor, Tensor]]:
    """Log-likelihood and expected shares of (token, component) on either side."""
    scaled, columns = (weight[:, None] * left).T.contiguous(), right.T.contiguous()
    sums = torch.zeros_like(scaled), torch.zeros_like(scaled)
    likelihood, size = 0.0, max(1, CHUNK // len(weight))
    for pair, p in zip(cells.split(size), share.split(size), strict=True):
        x, y = pair.unbind(-1)
        joint = scaled[x] * columns[y]
        total = joint.sum(-1)
        likelihood += float((p * total.log()).sum())
        joint = joint * (p / total)[:, None]
        sums[0].index_add_(0, x, joint)
        sums[1].index_add_(0, y, joint)
    return likelihood, sums


def _maximise(
    sums: tuple[Tensor, Tensor], least: float, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """New parameters; the weight of component 0 is held above its floor, and its tables stay."""
    expected = sums[0].sum(0)
    first = max(least, float(expected[0]))
    others = expected[1:] / expected[1:].sum().clamp(min=1e-300) * (1 - first)
    tables = []
    for total, old in zip(sums, (left, right), strict=True):
        mass = total.sum(0)[:, None]
        fresh = torch.where(mass > 0, total.T / mass.clamp(min=1e-300), old)
        tables.append(torch.cat((old[:1], fresh[1:])))
    return torch.cat((expected.new_tensor([first]), others)), tables[0], tables[1]
