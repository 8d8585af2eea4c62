"""Sums of products in log space, and the same with max for sum: exact whatever the spread, fast where it can be.

A sum runs as a matrix product of scaled numbers. Hard constraints leave only unlikely paths, so what matters may be
hundreds of nats below the largest term: entries that come out too small to be trusted are summed again in log space.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from codd_ppl.typing import Float, Int

__all__ = ["MaxProduct", "SumProduct", "Table", "over_edges"]

CHUNK = 1 << 22
"""Entries that are looked at at once where a product isn't a matrix product, or edges are summed."""


def _finite(top: Tensor) -> Tensor:
    """The lowest finite number for -inf: what is subtracted from or added to -inf leaves it there."""
    return top.clamp(min=torch.finfo(top.dtype).min)


class Table:
    """A table of log-weights (batch or 1, in, out) that many vectors are multiplied with; its linear form is kept."""

    def __init__(self, log: Float[Tensor, "batch in out"]) -> None:
        self.log = log

    @cached_property
    def top(self) -> Float[Tensor, "batch 1 out"]:
        """The largest entry for each value behind."""
        return _finite(self.log.amax(-2, keepdim=True))

    @cached_property
    def linear(self) -> Float[Tensor, "batch in out"]:
        """Relative to that."""
        return (self.log - self.top).exp()

    @cached_property
    def transposed(self) -> Table:
        """From behind."""
        return Table(self.log.mT)


class SumProduct:
    """(logsumexp, +)."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def product(
        self, vectors: Float[Tensor, "batch rows in"], table: Table
    ) -> Float[Tensor, "batch rows out"]:
        """log sum_k exp(vectors[.., k] + table[k, ..]), in the table's precision."""
        vectors = vectors.to(table.log.dtype)
        top = _finite(vectors.amax(-1, keepdim=True))
        scaled = (vectors - top).exp()
        if len(table.log) == 1:  # one matrix product for the whole batch
            linear = (scaled.flatten(0, -2) @ table.linear[0]).reshape(*vectors.shape[:-1], -1)
        else:
            linear = scaled @ table.linear
        result = linear.log().add_(top).add_(table.top)
        info = torch.finfo(linear.dtype)
        least = info.tiny / info.eps * vectors.shape[-1]
        if not linear.numel() or bool(linear.amin() > least):
            return result
        doubtful = (linear <= least) & (top > info.min) & (table.top > info.min)
        places = doubtful.nonzero()
        for b, r, n in (part.unbind(1) for part in places.split(max(1, CHUNK // vectors.shape[-1]))):
            column = table.log[b if len(table.log) > 1 else torch.zeros_like(b), :, n]
            result[b, r, n] = torch.logsumexp(vectors[b, r] + column, -1)
        return result

    def segments(self, values: Tensor, index: Tensor, count: int) -> Tensor:
        """log sum exp of those values (batch, edges, n) that have the same index: (batch, count, n)."""
        where = index[None, :, None].expand_as(values)
        top = values.new_full((len(values), count, values.shape[-1]), -torch.inf)
        top = _finite(top.scatter_reduce(1, where, values, "amax"))
        total = torch.zeros_like(top).index_add(1, index, (values - top.gather(1, where)).exp())
        return total.log().add_(top)

    def join(self, one: Tensor, two: Tensor) -> Tensor:
        """The sum of two results."""
        return torch.logaddexp(one, two)

    def choose(self, log: Float[Tensor, "rows n"]) -> Int[Tensor, " rows"]:
        """A draw from each row, in float64; what is impossible is never drawn."""
        weights = torch.softmax(log.double(), -1).cumsum(-1)
        uniform = torch.rand((len(log), 1), generator=self.generator, dtype=torch.float64, device=log.device)
        total = weights[:, -1:]
        target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(weights, target, right=True)[:, 0]


class MaxProduct:
    """(max, +): the same passes find a best assignment."""

    def product(
        self, vectors: Float[Tensor, "batch rows in"], table: Table
    ) -> Float[Tensor, "batch rows out"]:
        """max_k vectors[.., k] + table[k, ..]."""
        width = max(1, CHUNK // max(1, vectors.numel()))
        vectors = vectors.to(table.log.dtype)
        parts = [(vectors[..., None] + part[:, None]).amax(-2) for part in table.log.split(width, dim=-1)]
        return torch.cat(parts, -1)

    def segments(self, values: Tensor, index: Tensor, count: int) -> Tensor:
        """The largest of those values (batch, edges, n) that have the same index: (batch, count, n)."""
        top = values.new_full((len(values), count, values.shape[-1]), -torch.inf)
        return top.scatter_reduce(1, index[None, :, None].expand_as(values), values, "amax")

    def join(self, one: Tensor, two: Tensor) -> Tensor:
        """The larger of two results."""
        return torch.maximum(one, two)

    def choose(self, log: Float[Tensor, "rows n"]) -> Int[Tensor, " rows"]:
        """The best of each row, the first of equals."""
        return log.argmax(-1)


def over_edges(
    algebra: SumProduct | MaxProduct,
    edges: int,
    size: int,
    values: Callable[[slice], Tensor],
    index: Tensor,
    count: int,
) -> Tensor:
    """Segments of values that are made a few edges at a time; ``size`` is the number of entries of one edge."""
    each, result = max(1, CHUNK // max(1, size)), None
    for start in range(0, edges, each):
        part = slice(start, min(edges, start + each))
        found = algebra.segments(values(part), index[part], count)
        result = found if result is None else algebra.join(result, found)
    assert result is not None
    return result
