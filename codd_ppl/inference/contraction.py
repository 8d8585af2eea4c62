"""Contractions of any number of tables: in scaled linear space where that is safe, in log space, or max-product.

Linear space multiplies tables whose largest entry was scaled to 1, so no partial product exceeds the number of terms,
and what is flushed to zero on the way is below (terms x tiny). A result above that over eps has lost no more than a
rounding error. Entries that are exactly zero are checked against the same contraction of which entries are possible
at all; if any other entry is that small, the contraction is done again in log space, by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

import opt_einsum
import torch
from torch import Tensor

from codd_ppl.compiler import Contraction
from codd_ppl.inference.semirings import safe_logsumexp
from codd_ppl.inference.transforms import transforming

__all__ = ["Contract", "log_joint", "max_product", "rows", "slices", "sum_product", "top"]

Contract = Callable[[Contraction, Sequence[Tensor]], Tensor]
"""Contracts tables (batch or 1, *cardinalities of their scope), log in and log out."""

CHUNK = 1 << 24
"""Largest number of entries of a clique times batch that are built at once; a larger batch is taken in slices."""


def top(value: Tensor) -> Tensor:
    """Largest entry of each batch element, (batch or 1, 1, ..), detached; 0 where all are -inf."""
    if not value.numel():
        return value.new_zeros(value.shape[0], *[1] * (value.dim() - 1))
    found = value.detach().flatten(1).amax(1) if value.dim() > 1 else value.detach()
    found = torch.where(torch.isfinite(found), found, 0.0)
    return found.reshape(-1, *[1] * (value.dim() - 1))


def sum_product(contraction: Contraction, logs: Sequence[Tensor]) -> Tensor:
    """log of the sum of the product, (batch or 1, *cardinalities of the output)."""
    tops = [top(t) for t in logs]
    small = [t - m for t, m in zip(logs, tops, strict=True)]
    parts = []
    for few in slices(small, prod(size for _, size in contraction.sizes)):
        part = None if transforming() else _linear(contraction, few)
        parts.append(_in_log_space(contraction, few, safe_logsumexp) if part is None else part)
    result = _joined(parts)
    for m in tops:
        result = result + m.reshape(-1, *[1] * (result.dim() - 1))
    return result


def max_product(contraction: Contraction, logs: Sequence[Tensor]) -> Tensor:
    """log of the largest product instead of the sum."""
    few = slices(logs, prod(size for _, size in contraction.sizes))
    return _joined([_in_log_space(contraction, part, lambda value, dims: value.amax(dims)) for part in few])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _linear(contraction: Contraction, logs: Sequence[Tensor]) -> Tensor | None:
    """The result in log space, or None where linear space may have lost something."""
    result = _einsum(contraction, [t.exp() for t in logs])
    info = torch.finfo(result.dtype)
    floor = info.tiny / info.eps * prod(size for _, size in contraction.sizes)
    if torch.is_grad_enabled() and any(t.requires_grad for t in logs):
        # The derivatives hold powers of 1 / result, which must stay finite, too.
        floor = max(floor, info.tiny**0.25)
    seen = result.detach()
    if bool((seen > floor).all()):
        return result.log()
    possible = _einsum(contraction, [(t.detach() != -torch.inf).to(result.dtype) for t in logs]) > 0
    if not bool(((seen > floor) | ~possible).all()):
        return None
    return torch.where(possible, torch.where(possible, result, 1.0).log(), -torch.inf)


def _einsum(contraction: Contraction, tables: Sequence[Tensor]) -> Tensor:
    batch, sizes = _batch(tables), dict(contraction.sizes)
    inputs, output = contraction.equation.split("->")
    letters, operands = inputs.split(","), []
    for i, table in enumerate(tables):
        shape = [sizes[x] for x in letters[i]]
        if table.shape[0] == 1:
            operands.append(table.reshape(shape))
        else:
            operands.append(table.reshape(table.shape[0], *shape))
            letters[i] = "a" + letters[i]
    output = output if batch == 1 else "a" + output
    equation, path = ",".join(letters) + "->" + output, list(contraction.path)
    found: Tensor = opt_einsum.contract(equation, *operands, optimize=path)
    return found.reshape(batch, *_output_shape(contraction, tables))


def _batch(tables: Sequence[Tensor]) -> int:
    return next((t.shape[0] for t in tables if t.shape[0] != 1), 1)


def _output_shape(contraction: Contraction, tables: Sequence[Tensor]) -> list[int]:
    found = {
        v: n
        for scope, table in zip(contraction.scopes, tables, strict=True)
        for v, n in zip(scope, table.shape[1:], strict=True)
    }
    return [found[v] for v in contraction.output]


def _in_log_space(
    contraction: Contraction, logs: Sequence[Tensor], reduce: Callable[[Tensor, tuple[int, ...]], Tensor]
) -> Tensor:
    inputs, output = contraction.equation.split("->")
    letters = [x for x, _ in contraction.sizes]
    kept = [x for x in letters if x in output]
    dims = tuple(1 + i for i, x in enumerate(letters) if x not in output)
    spread = [_spread(t, x, contraction.sizes) for t, x in zip(logs, inputs.split(","), strict=True)]
    total = sum(spread[1:], spread[0])
    total = total.expand(-1, *(size for _, size in contraction.sizes))
    result = reduce(total, dims) if dims else total
    result = result.permute(0, *(1 + kept.index(x) for x in output))
    return result.reshape(result.shape[0], *_output_shape(contraction, logs))


def slices(logs: Sequence[Tensor], entries: int) -> Iterator[Sequence[Tensor]]:
    """The tables for some batch elements at a time, so that batch times ``entries`` stays below :data:`CHUNK`."""
    batch = _batch(logs)
    width = max(1, CHUNK // max(1, entries))
    if batch <= width:
        yield logs
        return
    for start in range(0, batch, width):
        yield [t if t.shape[0] == 1 else t[start : start + width] for t in logs]


def _spread(table: Tensor, own: str, sizes: tuple[tuple[str, int], ...]) -> Tensor:
    """A table with letters ``own`` (and dimensions of size 1) laid out over all letters, 1 where it has none."""
    order = [x for x, _ in sizes if x in own]
    found = dict(sizes)
    table = table.reshape(table.shape[0], *(found[x] for x in own))
    table = table.permute(0, *(1 + own.index(x) for x in order))
    return table.reshape(table.shape[0], *(size if x in own else 1 for x, size in sizes))


def log_joint(scopes: Sequence[tuple[str, ...]], logs: Sequence[Tensor], shape: dict[str, int]) -> Tensor:
    """Sum of the tables over all variables of ``shape``, (batch or 1, *cardinalities), in that order."""
    total = logs[0].new_zeros(1, *shape.values())
    for scope, table in zip(scopes, logs, strict=True):
        order = [v for v in shape if v in scope]
        table = table.permute(0, *(1 + scope.index(v) for v in order))
        total = total + table.reshape(table.shape[0], *(n if v in scope else 1 for v, n in shape.items()))
    return total


def rows(
    scopes: Sequence[tuple[str, ...]], logs: Sequence[Tensor], given: dict[str, Tensor], rest: dict[str, int]
) -> Tensor:
    """Sum of the tables at given values of some variables, (draws, batch, *cardinalities of the rest)."""
    draws, batch = next(iter(given.values())).shape if given else (1, _batch(logs))
    total = logs[0].new_zeros(draws, batch, *rest.values())
    element = torch.arange(batch, device=total.device)
    for scope, table in zip(scopes, logs, strict=True):
        fixed, free = [v for v in scope if v in given], [v for v in rest if v in scope]
        table = table.permute(0, *(1 + scope.index(v) for v in (*fixed, *free)))
        where = element if table.shape[0] > 1 else torch.zeros_like(element)
        part = table[(where.expand(draws, batch), *(given[v] for v in fixed))]
        total = total + part.reshape(draws, batch, *(n if v in scope else 1 for v, n in rest.items()))
    return total
