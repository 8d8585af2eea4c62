"""Emissions of low rank in given vectors of the tokens, fitted to a table of probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.typing import Float

__all__ = ["TiedFit", "fit_tied"]

CHUNK = 1 << 22
"""Entries of the table that are looked at at once."""


@dataclass(frozen=True)
class TiedFit:
    """What was fitted, and how well.

    Attributes:
        projection: D, (width, rank).
        states: e, (states, rank).
        bias: b, (vocab,).
        loss: mean cross-entropy of the table and the fit, bits per token.
        start: the same before, with frequencies alone.
        entropy: of the table, the least that the cross-entropy can be.
    """

    projection: Tensor
    states: Tensor
    bias: Tensor
    loss: float
    start: float
    entropy: float

    @property
    def lost(self) -> float:
        """KL divergence of the table from the fit, bits per token."""
        return self.loss - self.entropy


def fit_tied(
    table: Float[Tensor, "states vocab"],
    weights: Float[Tensor, "states"],
    unembedding: Float[Tensor, "vocab width"],
    rank: int,
    iterations: int = 100,
) -> TiedFit:
    """Minimise the cross-entropy

        - sum_z n_z sum_x P(x | z) log softmax_x(u_x D . e_z + b_x)

    by L-BFGS (Liu and Nocedal 1989) over D, e and b. It is convex in e and b given D, which starts at the leading
    directions of u (weighted by frequency, whitened), with e = 0 and b = log of the frequencies.

    Args:
        table: log P.
        weights: n, how often each state occurs.
        unembedding: u.
        rank: columns of D.
        iterations: of L-BFGS, at most.

    Raises:
        ConfigError: a rank outside of 1 .. width, or iterations < 1.
        ShapeError: sizes that don't fit.
    """
    vocab, width = unembedding.shape
    if table.shape[1] != vocab or weights.shape != table.shape[:1]:
        raise ShapeError(
            f"expected a table (states, {vocab}) and a weight for each state, found {tuple(table.shape)} and "
            f"{tuple(weights.shape)}"
        )
    if not 1 <= rank <= width or iterations < 1:
        raise ConfigError(
            f"expected 1 <= rank <= {width}, the width of the unembedding, and iterations >= 1, found {rank} and "
            f"{iterations}"
        )
    target, share = table.detach().exp(), (weights / weights.sum()).to(table)
    vectors, frequency = unembedding.detach().to(table), share @ target
    bias = frequency.clamp(min=1e-12).log()
    centred = vectors - frequency @ vectors
    size, direction = torch.linalg.eigh(centred.T @ (frequency[:, None] * centred))
    size, direction = size.flip(0)[:rank], direction.flip(1)[:, :rank]
    projection = direction / size.clamp(min=1e-6 * float(size[0])).sqrt()
    leaves = [projection, table.new_zeros(len(table), rank), bias]
    leaves = [leaf.clone(memory_format=torch.contiguous_format).requires_grad_() for leaf in leaves]
    each = max(1, CHUNK // vocab)
    optimizer = torch.optim.LBFGS(
        leaves, max_iter=iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-9
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        features = vectors @ leaves[0]
        leaf, total = features.detach().requires_grad_(), table.new_zeros(())
        for start in range(0, len(table), each):
            some = slice(start, start + each)
            logs = (leaves[1][some] @ leaf.T + leaves[2]).log_softmax(-1)
            part = -(share[some, None] * target[some] * logs).sum()
            part.backward()
            total += part.detach()
        features.backward(leaf.grad)
        return total

    with torch.enable_grad():
        first = float(closure())
        optimizer.step(closure)
        last = float(closure())
    entropy = float(-(share[:, None] * torch.xlogy(target, target)).sum()) / log(2)
    found = [leaf.detach() for leaf in leaves]
    return TiedFit(found[0], found[1], found[2], last / log(2), first / log(2), entropy)
