"""Evidence over a large vocabulary times an emission table, and draws from rows of such products.

With evidence u (rows, vocab) in log space and a table P (vocab, states) in scaled linear space:

    m(r, z) = sum_x exp(u(r, x) - max u(r, .)) P(x, z),        p(x | r, z) proportional to exp(u(r, x)) P(x, z).

On a CPU both go through the vocabulary, or the rows, a block at a time: what is between the evidence and the product
then stays in the cache, where fresh memory for (rows, vocab) costs as much as the exponentials. Tables in bfloat16 are
multiplied with sums in float32; the evidence is rounded to bfloat16 only where a device has a product for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["absorb_rows", "draw_rows", "invert", "times", "transposed_times"]

BLOCK = 1 << 20
"""Entries (rows times values) of a block of evidence."""

DRAWS = 1 << 18
"""Entries that a draw looks at at once on a CPU; on other devices sixteen times as many."""

FLAT = 1024
"""Values up to which a cumulative sum is inverted in one go."""


def absorb_rows(log: Tensor, table: Tensor, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Evidence times a table, without a graph.

    Args:
        log: (rows, vocab) log-evidence.
        table: (vocab, states), float or bfloat16.
        where: the rows that count, None: all.

    Returns:
        m as above (rows, states), and the largest entry of each row (rows, 1), 0 where all are -inf.
    """
    log, table = log.detach(), table.detach()
    top = log.amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, 0.0)
    top = top if where is None else top[where]
    rows, vocab = len(top), log.shape[1]
    width = vocab if log.device.type != "cpu" else min(vocab, max(512, BLOCK // max(1, rows)))
    if width == vocab and where is None:
        return times((log - top).exp_(), table), top
    result = log.new_zeros(rows, table.shape[1])
    room = log.new_empty(rows, width)
    for start in range(0, vocab, width):
        part = log[:, start : start + width]
        block = room[:, : part.shape[1]]
        if where is None:
            torch.sub(part, top, out=block)
        else:
            torch.index_select(part, 0, where, out=block).sub_(top)
        result.addmm_(block.exp_(), table[start : start + width].to(log.dtype))
    return result, top


def times(weights: Tensor, table: Tensor) -> Tensor:
    """(rows, vocab) times (vocab, states), differentiable in the weights."""
    if table.dtype == weights.dtype:
        return weights @ table
    if weights.is_cuda and not (torch.is_grad_enabled() and weights.requires_grad):
        return torch.mm(weights.to(table.dtype), table, out_dtype=weights.dtype)
    each = max(1, BLOCK // table.shape[1])
    pairs = zip(weights.split(each, 1), table.split(each), strict=True)
    return sum((w @ t.to(w.dtype) for w, t in pairs), weights.new_zeros(()))


def transposed_times(states: Tensor, table: Tensor) -> Tensor:
    """(rows, states) times the transposed table (states, vocab), differentiable in the first."""
    if table.dtype == states.dtype:
        return states @ table.T
    return torch.cat([states @ t.T.to(states.dtype) for t in table.split(max(1, BLOCK // table.shape[1]))], 1)


def draw_rows(
    table: Tensor,
    states: Tensor,
    log: Tensor,
    where: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Values x given the state of each row, by inverting cumulative sums; one of weight 0 is never drawn.

    Args:
        table: (tables, vocab, states) in linear space; row r uses table r modulo their number.
        states: (draws, rows).
        log: (*, vocab) log-evidence; -inf is legal.
        where: places of the rows in ``log``, None: all in order, over and over if there are fewer.
        generator: torch's global one by default.

    Returns:
        (draws, rows) int64; any value where a row has no weight at all.
    """
    draws, rows = states.shape
    vocab, by_state = log.shape[1], table.transpose(1, 2)
    uniform = torch.rand(states.shape, generator=generator, dtype=torch.float64, device=log.device)
    uniform = uniform * (1 - 2**-50)  # stays below 1 when multiplied by a sum
    which = torch.arange(rows, device=log.device)
    where, which = which % len(log) if where is None else where, which % len(table)
    most = DRAWS if log.device.type == "cpu" else DRAWS << 4
    each = max(1, min(rows, most // vocab))
    few = max(1, most // (each * vocab))
    result = torch.empty_like(states)
    for start in range(0, rows, each):
        some = slice(start, start + each)
        evidence = log[where[some]]
        top = evidence.amax(-1, keepdim=True)
        evidence = evidence.sub_(torch.where(torch.isfinite(top), top, 0.0)).exp_()
        for first in range(0, draws, few):
            part = slice(first, first + few)
            weights = by_state[which[some], states[part, some]].to(log.dtype).mul_(evidence)
            found = invert(weights.flatten(0, 1), uniform[part, some].reshape(-1))
            result[part, some] = found.view(-1, found.numel() // weights.shape[0]) if found.numel() else found
    return result


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The values at which cumulative sums exceed parts of the totals.

    Rows of many values are summed up in blocks first, then within the one block where the value is. All sums are in
    float64.

    Args:
        weights: (rows, n), not negative.
        uniform: (rows,) float64, from 0 to less than 1 by more than rounding.

    Returns:
        (rows,) int64, of positive weight where a row has any.
    """
    rows, size = weights.shape
    if size <= FLAT:
        total = weights.cumsum(-1, dtype=torch.float64)
        found = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)[:, 0]
        return found.clamp_(max=size - 1)
    width = 1 << (size.bit_length() // 2)
    blocks = -(-size // width)
    double = weights.new_zeros(rows, blocks * width, dtype=torch.float64)
    double[:, :size] = weights
    parts = double.view(rows, blocks, width)
    total = parts.sum(-1).cumsum(-1)
    target = uniform[:, None] * total[:, -1:]
    block = torch.searchsorted(total, target, right=True).clamp_(max=blocks - 1)
    before = torch.where(block > 0, total.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = parts[torch.arange(rows, device=block.device), block[:, 0]].cumsum(-1)
    # The block's own sum may differ from its share of the whole by rounding.
    last = torch.nextafter(inside[:, -1:], inside.new_zeros(()))
    found = torch.searchsorted(inside, torch.minimum(target - before, last), right=True)
    return (block * width + found)[:, 0].clamp_(max=size - 1)
