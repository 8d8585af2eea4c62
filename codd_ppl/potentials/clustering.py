"""Clusters of tokens and n-grams by the company they keep: k-means over the tokens that stand around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codd_ppl.errors import ConfigError
from codd_ppl.typing import Float, Int

__all__ = ["contexts", "k_means", "suffixes"]

CANDIDATES = 8
"""Points for each cluster from which its first centre is drawn."""


def suffixes(
    blocks: Int[Tensor, "blocks sites"], vocab_size: int, order: int, kept: int
) -> tuple[Int[Tensor, "blocks sites"], int]:
    """The longest frequent n-gram of at most ``order`` tokens that ends at each site, as a number.

    Args:
        blocks: text.
        vocab_size: values of a token.
        order: 1: the tokens themselves.
        kept: so many of the most frequent n-grams of each order above 1.

    Returns:
        The numbers, and how many there are.
    """
    number, total = blocks.cpu().clone(), vocab_size
    longer = number.clone()  # numbers of the (n - 1)-grams that end one site before; -1: not kept
    for _ in range(order - 1):
        code = longer.roll(1, 1) * vocab_size + blocks.cpu()
        code[:, 0] = -1
        code[longer.roll(1, 1) < 0] = -1
        values, inverse, counts = code.reshape(-1).unique(return_inverse=True, return_counts=True)
        counts[values < 0] = 0
        best = counts.argsort(descending=True, stable=True)[:kept]
        best = best[counts[best] > 1]
        place = torch.full_like(counts, -1)
        place[best] = torch.arange(len(best))
        longer = place[inverse].reshape(blocks.shape)
        number = torch.where(longer >= 0, longer + total, number)
        total += len(best)
    return number, total


def contexts(
    blocks: Int[Tensor, "blocks sites"],
    items: Int[Tensor, "blocks sites"],
    count: int,
    offsets: Sequence[int] = (-1, 1),
    neighbours: int = 256,
) -> Float[Tensor, "count features"]:
    """Square roots of how often each frequent token stands around each item.

        feature(v, d, u) = sqrt(p(x_{i+d} = u | item_i = v) / number of d),    p(u | v) = (n(v, u) + p(u)) / (n(v) + 1),

    so that every row has norm 1 and Euclidean distance is Hellinger's; the remaining tokens count as one.
    (Distributional clustering: Pereira, Tishby and Lee 1993.)

    Args:
        blocks: text.
        items: number of the item at each site, tokens or n-grams.
        count: how many items there are.
        offsets: where to look.
        neighbours: so many of the most frequent tokens are told apart.
    """
    blocks = blocks.cpu()
    frequency = torch.bincount(blocks.reshape(-1))
    kept = min(neighbours, len(frequency))
    number = torch.full((len(frequency),), kept)
    number[frequency.argsort(descending=True, stable=True)[:kept]] = torch.arange(kept)
    around, sites, parts = number[blocks], blocks.shape[1], []
    for d in offsets:
        own = items[:, max(0, -d) : sites - max(0, d)].reshape(-1)
        other = around[:, max(0, d) : sites + min(0, d)].reshape(-1)
        pairs = torch.bincount(own * (kept + 1) + other, minlength=count * (kept + 1))
        table = pairs.reshape(count, kept + 1).float()
        overall = table.sum(0) / table.sum().clamp(min=1)
        table = (table + overall) / (table.sum(-1, keepdim=True) + 1)
        parts.append((table / len(offsets)).sqrt())
    return torch.cat(parts, -1)


def k_means(
    points: Float[Tensor, "n features"],
    clusters: int,
    weights: Float[Tensor, "n"] | None = None,
    iterations: int = 20,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "n"], Float[Tensor, "clusters features"]]:
    """Lloyd's algorithm (Lloyd 1982) from k-means++ seeds (Arthur and Vassilvitskii 2007).

        minimise sum_i weight_i |point_i - centre(i)|^2.

    A cluster that loses all its points moves to the point that costs most.

    Args:
        points: what to cluster.
        clusters: from 1 to n.
        weights: of the points, 1 by default.
        iterations: at most; it ends when nothing moves.
        generator: torch's global one by default.

    Returns:
        The cluster of each point, and the centres.

    Raises:
        ConfigError: more clusters than points, or none.
    """
    if not 1 <= clusters <= len(points):
        raise ConfigError(
            f"expected 1 to {len(points)} clusters of {len(points)} points, found {clusters}; ask for fewer"
        )
    weights = torch.ones(len(points)).to(points) if weights is None else weights.to(points)
    centres = points[_seeds(points, weights, clusters, generator)]
    own = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for step in range(max(1, iterations)):
        nearest, cost = _nearest(points, centres)
        if step and torch.equal(nearest, own):
            break
        own = nearest
        mass = torch.zeros(clusters).to(points).index_add_(0, own, weights)
        centres = torch.zeros_like(centres).index_add_(0, own, points * weights[:, None])
        centres = centres / mass.clamp(min=1e-30)[:, None]
        empty = (mass <= 0).nonzero()[:, 0]
        if len(empty):
            centres[empty] = points[(cost * weights).topk(len(empty)).indices]
    return own, centres


def _seeds(points: Tensor, weights: Tensor, clusters: int, generator: torch.Generator | None) -> Tensor:
    """Points drawn one by one, each in proportion to its weighted squared distance from those before.

    Of many points only some, drawn by weight, are looked at.
    """
    some = min(CANDIDATES * clusters, int((weights > 0).sum()))
    if clusters <= some < len(points):
        drawn = torch.multinomial(weights, some, generator=generator)
        return drawn[_seeds(points[drawn], weights[drawn], clusters, generator)]
    norms, least = points.square().sum(-1), torch.full_like(weights, torch.inf)
    chosen = [torch.multinomial(weights, 1, generator=generator)]
    for _ in range(clusters - 1):
        last = points[chosen[-1]]
        distance = (norms + last.square().sum() - 2 * (points @ last[0])).clamp(min=0)
        least = torch.minimum(least, distance)
        chance = least * weights
        chance[torch.cat(chosen)] = 0.0
        if not bool(chance.sum() > 0):  # the others are copies of those chosen
            chance = torch.ones_like(chance).index_fill_(0, torch.cat(chosen), 0.0)
        chosen.append(torch.multinomial(chance, 1, generator=generator))
    return torch.cat(chosen)


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each point, and the squared distance."""
    part, norms = [], centres.square().sum(-1)
    for some in points.split(max(1, (1 << 24) // len(centres))):
        part.append(torch.min(norms - 2 * (some @ centres.T), dim=-1))
    cost = torch.cat([p.values for p in part]) + points.square().sum(-1)
    return torch.cat([p.indices for p in part]), cost.clamp(min=0)
