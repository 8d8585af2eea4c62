"""Counts of tokens in text, smoothed: how often each one stands alone, how often several stand together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codd_ppl.errors import ShapeError, TokenError
from codd_ppl.typing import Float, Int

__all__ = [
    "check_blocks",
    "log_unigram",
    "mutual_information",
    "pair_counts",
    "pairwise_mutual_information",
    "pointwise_mutual_information",
]

DENSE = 1 << 22
"""Cells of a table of counts that are counted at once; larger ones by sorting, or in parts."""


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


def pair_counts(
    pairs: Int[Tensor, "n 2"], vocab_size: int
) -> tuple[Int[Tensor, "cells 2"], Float[Tensor, "cells"]]:
    """The distinct pairs, in order, and how often each was seen (float64); only those that were seen take memory."""
    index = pairs[:, 0].long().cpu() * vocab_size + pairs[:, 1].cpu()
    if vocab_size**2 <= DENSE:
        counts = torch.bincount(index, minlength=vocab_size**2)
        cells = counts.nonzero()[:, 0]
        counts = counts[cells]
    else:
        cells, counts = torch.unique(index, return_counts=True)
    return torch.stack((cells // vocab_size, cells % vocab_size), -1), counts.double()


def mutual_information(
    blocks: Int[Tensor, "blocks sites"],
    vocab_size: int,
    offsets: Sequence[int] | None = None,
    correct: bool = True,
) -> dict[int, float]:
    """I(x_i; x_{i+s}) for each offset s, nats, of the pairs of all positions i together.

    With ``correct`` the bias of the plain estimate is taken off to first order (Miller 1955, Madow): each entropy gets
    (values seen - 1) / 2n, so that

        I = sum p log(p / p_left p_right) - (pairs seen - left seen - right seen + 1) / 2n,

    which is about 0, sometimes below, for independent tokens, where the plain estimate has (V - 1)^2 / 2n. (Pairs that
    overlap are no independent draws, and with more possible pairs than n the correction takes off too little.) Only
    the pairs that occur take memory.

    Args:
        blocks: (n, sites) int64 clean text.
        vocab_size: values of a token.
        offsets: distances to look at; 1 to sites - 1, at most 32, if None.
        correct: take the bias off.

    Returns:
        Offset -> nats, the form that ``topologies.chow_liu`` takes.

    Raises:
        ShapeError: blocks that aren't int64 (n, sites), or offsets outside 1 .. sites - 1.
        TokenError: ids outside the vocabulary.
    """
    sites = blocks.shape[-1]
    check_blocks(blocks, sites, vocab_size)
    offsets = range(1, min(sites, 33)) if offsets is None else offsets
    found = {}
    for s in offsets:
        if not 1 <= s < sites:
            raise ShapeError(f"expected offsets from 1 to {sites - 1}, the sites less one, found {s}")
        pairs = torch.stack((blocks[:, :-s].reshape(-1), blocks[:, s:].reshape(-1)), -1)
        cells, counts = pair_counts(pairs, vocab_size)
        left, right = (torch.bincount(column, counts) for column in cells.unbind(-1))
        entropies = [_entropy(c, correct) for c in (left[None], right[None], counts[None])]
        found[s] = float(entropies[0] + entropies[1] - entropies[2])
    return found


def pairwise_mutual_information(
    blocks: Int[Tensor, "blocks sites"], vocab_size: int, correct: bool = True
) -> Float[Tensor, "sites sites"]:
    """I(x_i; x_j) of every pair of sites, nats, float64, where each position has statistics of its own.

    The estimate is that of :func:`mutual_information`, with one sample for each block; the diagonal is I(x_i; x_i) =
    H(x_i). The tables of some pairs are counted at a time, so that memory doesn't grow with the sites; for
    vocabularies of up to a few hundred tokens.

    Raises:
        ShapeError: blocks that aren't int64 (n, sites), or a table of vocab_size^2 that is too large to count.
        TokenError: ids outside the vocabulary.
    """
    sites, cells = blocks.shape[-1], vocab_size**2
    check_blocks(blocks, sites, vocab_size)
    if cells > DENSE:
        raise ShapeError(
            f"expected a vocabulary of at most {int(DENSE**0.5)} tokens for a table of every pair of sites, found "
            f"{vocab_size}; use mutual_information by offset, which counts the pairs that occur only"
        )
    columns = blocks.long().cpu().T.contiguous()
    single = torch.stack([torch.bincount(c, minlength=vocab_size) for c in columns])
    entropies = _entropy(single.double(), correct)
    result = entropies.diag()
    left, right = torch.triu_indices(sites, sites, 1)
    size = max(1, DENSE // max(cells, len(blocks)))
    for i, j in zip(left.split(size), right.split(size), strict=True):
        index = columns[i] * vocab_size + columns[j] + torch.arange(len(i))[:, None] * cells
        counts = torch.bincount(index.reshape(-1), minlength=len(i) * cells).reshape(len(i), cells)
        result[i, j] = entropies[i] + entropies[j] - _entropy(counts.double(), correct)
        result[j, i] = result[i, j]
    return result


def _entropy(counts: Float[Tensor, "rows cells"], correct: bool) -> Float[Tensor, "rows"]:
    """Entropy of the frequencies in each row, nats; with the correction of Miller and Madow if asked for."""
    total = counts.sum(-1)
    entropy = total.log() - torch.special.xlogy(counts, counts).sum(-1) / total
    return entropy + ((counts > 0).sum(-1) - 1) / (2 * total) if correct else entropy
