"""Taking the sites out of a weighted graph one by one, without a subtraction (star-mesh transform).

With d_k = sum_{j < k} beta_kj the sum over the spanning trees is

    Z(sites <= k; beta) = d_k Z(sites < k; beta'),    beta'_ij = beta_ij + beta_ik beta_kj / d_k

which keeps all digits whatever the spread of the weights (for Markov chains Grassmann, Taksar and Heyman 1985).
Weights are (batch, sites, sites) float64 logarithms, -inf on the diagonal and at sites that are not ``inside``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from codd_ppl.inference.semirings import safe_logsumexp

__all__ = ["Elimination", "edge_marginals", "eliminate", "log_total", "roots"]

SPREAD = 500.0
"""Nats between the largest and the smallest weight of a graph up to which float64 needs no logarithms."""


class Elimination(NamedTuple):
    """What was seen while sites n-1, .., 1 were taken out; row k holds j < k only, -inf elsewhere."""

    log_rows: Tensor  # (batch, n, n)
    log_degrees: Tensor  # (batch, n, 1)


def eliminate(weights: Tensor, inside: Tensor) -> Elimination:
    """Take out the sites n-1, .., 1; in linear space where float64 holds the weights, else by logarithms."""
    n = inside.shape[-1]
    rows: list[Tensor] = []
    if _wide(weights):
        left = weights
        for k in range(n - 1, 0, -1):
            row = left[:, k, :k]
            degree = safe_logsumexp(row, -1)[:, None]
            onward = row - torch.where(degree == -torch.inf, 0.0, degree)
            paths = row[:, :, None] + onward[:, None]
            left = safe_logsumexp(torch.stack([left[:, :k, :k], paths]), 0)
            rows.append(row)
    else:
        top = weights.detach().amax((-2, -1), keepdim=True).clamp_min(-1e300)
        left = (weights - top).exp()
        for k in range(n - 1, 0, -1):
            row = left[:, k, :k]
            left = left[:, :k, :k] + row[:, :, None] * _shares(row)[:, None]
            empty = row == 0
            log_row = torch.where(empty, -torch.inf, torch.where(empty, 1.0, row).log() + top[:, 0])
            rows.append(log_row)
    rows.append(weights[:, 0, :0])
    log_rows = torch.stack([_pad(row, n) for row in reversed(rows)], 1)
    return Elimination(log_rows, safe_logsumexp(log_rows, -1)[..., None])


def log_total(gone: Elimination, inside: Tensor) -> Tensor:
    """(batch) log-sum over the spanning trees, -inf where there is none."""
    counted = inside & ~roots(inside)
    return torch.where(counted, gone.log_degrees[..., 0], 0.0).sum(-1)


def edge_marginals(weights: Tensor, inside: Tensor) -> Tensor:
    """beta_ij R_ij, zero throughout where the members don't hang together; made of differentiable operations.

    With shares p = beta_k / d_k and the resistances R' once k is gone, R_kj = 1/d_k + (R' p)_j - p' R' p / 2. What is
    subtracted is at most n / d_k and R_kj at least 1 / d_k, so that no more than log2(n) bits are lost.
    """
    n = inside.shape[-1]
    if _wide(weights):
        again = torch.is_grad_enabled() and weights.requires_grad
        with torch.enable_grad():
            start = weights if again else weights.detach().requires_grad_()
            total = log_total(eliminate(start, inside), inside)
            sure = torch.where(total == -torch.inf, 0.0, total).sum()
            (found,) = torch.autograd.grad(sure, start, create_graph=again)
        return found + found.mT
    gone = eliminate(weights, inside)
    connected = log_total(gone, inside) > -torch.inf
    top = weights.detach().amax((-2, -1), keepdim=True).clamp_min(-1e300)
    resistance = weights.new_zeros(len(weights), 1, 1)
    for k in range(1, n):
        row = (gone.log_rows[:, k, :k] - top[:, 0]).exp()
        degree = row.sum(-1, keepdim=True)
        share = _shares(row)
        mean = (resistance @ share[..., None])[..., 0]
        new = torch.where(degree > 0, 1 / torch.where(degree > 0, degree, 1.0), 0.0) + mean
        new = new - (share * mean).sum(-1, keepdim=True) / 2
        above = torch.cat([resistance, new[..., None]], -1)
        resistance = torch.cat([above, torch.cat([new, torch.zeros_like(new[:, :1])], -1)[:, None]], 1)
    return torch.where(connected[:, None, None], (weights - top).exp() * resistance, 0.0)


def _shares(row: Tensor) -> Tensor:
    degree = row.sum(-1, keepdim=True)
    return row / torch.where(degree > 0, degree, 1.0)


def _pad(row: Tensor, n: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, n - row.shape[-1]), value=-torch.inf)


def roots(inside: Tensor) -> Tensor:
    """The first member of each graph."""
    return inside & (inside.cumsum(-1) == 1)


def _wide(weights: Tensor) -> bool:
    finite = weights.detach() > -torch.inf
    low = torch.where(finite, weights.detach(), torch.inf).amin((-2, -1))
    return bool((weights.detach().amax((-2, -1)) - low > SPREAD).any()) if weights.numel() else False
