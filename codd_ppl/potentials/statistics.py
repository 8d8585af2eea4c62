"""Counts of tokens in text, smoothed: how often each one stands alone, how often several stand together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codd_ppl.errors import ShapeError, TokenError
from codd_ppl.typing import Float, Int

__all__ = ["check_blocks", "log_unigram", "pointwise_mutual_information"]


def check_blocks(blocks: Int[Tensor, "blocks sites"], sites: int, vocab_size: int) -> None:
    """Blocks of a corpus fit a coupling.

    Raises:
        ShapeError: not an integer matrix with ``sites`` columns and at least one row.
        TokenError: an id outside the vocabulary (a mask token, for instance).
    """
    if blocks.dim() != 2 or blocks.is_floating_point() or blocks.dtype == torch.bool:
        raise ShapeError(
            f"expected blocks of token ids, int64 (n, {sites}), found {blocks.dtype} {tuple(blocks.shape)}"
        )
    if blocks.shape[1] != sites:
        raise ShapeError(
            f"expected blocks of {sites} sites, the length of the coupling's graph, found {blocks.shape[1]}; "
            "cut the text into blocks of that length, or build the graph for the length of the blocks"
        )
    if not len(blocks):
        raise ShapeError("expected at least one block, found none; is the corpus empty?")
    low, high = (int(v) for v in blocks.aminmax())
    if low < 0 or high >= vocab_size:
        raise TokenError(
            f"expected token ids from 0 to {vocab_size - 1} in the blocks, found {low if low < 0 else high}; "
            "a corpus holds clean text only, and its tokenizer must be the coupling's"
        )


def log_unigram(
    tokens: Int[Tensor, "..."], vocab_size: int, pseudo_count: float = 1.0
) -> Float[Tensor, "vocab"]:
    """Log-frequencies (count + pseudo_count) / (n + vocab pseudo_count), float64; no token has chance zero."""
    counts = torch.bincount(tokens.reshape(-1), minlength=vocab_size).double() + pseudo_count
    return (counts / counts.sum()).log()


def pointwise_mutual_information(
    groups: Sequence[Int[Tensor, "n order"]],
    vocab_size: int,
    unigram: Float[Tensor, "vocab"],
    pseudo_count: float | None = None,
) -> Float[Tensor, "..."]:
    """log p(x, y, ..) / (p(x) p(y) ..) of tokens seen together, (vocab,) * order, float64.

    The joint counts are mixed with ``pseudo_count`` draws of independent tokens, so that what was seldom or never
    seen together is shrunk towards 0 (Dirichlet prior whose mean is the independent model):

        p(x, y) = (count(x, y) + pseudo_count p(x) p(y)) / (n + pseudo_count)

    Args:
        groups: tables of tokens seen together, one row each; counts are pooled over the tables.
        vocab_size: values of a token.
        unigram: log p(x), from :func:`log_unigram`.
        pseudo_count: ``vocab_size`` by default.
    """
    order = groups[0].shape[-1]
    kappa = float(vocab_size if pseudo_count is None else pseudo_count)
    total = torch.zeros(vocab_size**order, dtype=torch.float64)
    for rows in groups:
        index = torch.zeros(len(rows), dtype=torch.int64)
        for column in rows.cpu().unbind(-1):
            index = index * vocab_size + column
        total += torch.bincount(index, minlength=vocab_size**order)
    independent = torch.zeros(())
    for _ in range(order):
        independent = independent[..., None] + unigram.double().cpu()
    counts = total.reshape((vocab_size,) * order)
    joint = (counts + kappa * independent.exp()) / (counts.sum() + kappa)
    return joint.log() - independent
