"""One contraction under two semirings: (logsumexp, +) and (max, +).

The sum-product one first multiplies in scaled linear space, where a matrix product does the work. That is exact
to rounding unless something that matters underflows, and this can be seen from the result: an entry that comes
out above tiny/eps can't have lost more than a rounding error to flushed terms. Every result is kept for that one
check; when it fails, the query is run again entirely in log space.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import opt_einsum
import torch
from torch import Tensor

from codd_ppl.compiler import Step
from codd_ppl.inference import native
from codd_ppl.inference.products import absorb_rows
from codd_ppl.inference.tables import StepTable
from codd_ppl.inference.transforms import transforming

__all__ = [
    "LogSemiring",
    "MaxSemiring",
    "joint_batch",
    "log_joint",
    "log_normalized",
    "safe_floor",
    "safe_logsumexp",
]

WIDE = 1024
"""Values of a variable from which on its evidence and table are multiplied in blocks."""

CHUNK = 1 << 24
"""Largest number of entries of a table times batch that log space builds at once."""


def joint_batch(*sizes: int) -> int:
    """The size that batch dimensions of 1 and one other size, which may be 0, broadcast to."""
    return 0 if 0 in sizes else max(sizes)


@lru_cache(maxsize=8)
def safe_floor(dtype: torch.dtype) -> float:
    """What a sum must exceed that can't have lost more than a rounding error to underflow."""
    info = torch.finfo(dtype)
    return info.tiny / info.eps


def _finite(top: Tensor) -> Tensor:
    """0 for what is infinite."""
    return top.nan_to_num(torch.nan, 0.0, 0.0)


def safe_logsumexp(value: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """logsumexp whose value is -inf and whose gradient is 0, not NaN, where every entry is -inf."""
    top = _finite(value.detach().amax(dim, keepdim=True))
    total = (value - top).exp().sum(dim, keepdim=True)
    dead = total == 0
    return torch.where(dead, -torch.inf, torch.where(dead, 1.0, total).log() + top).squeeze(dim)


def log_normalized(value: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Log-probabilities over some dimensions; -inf throughout, with gradient 0, where every entry is -inf.

    The largest entry is taken out first, so that they sum to 1 to rounding however large the entries are.
    """
    top = value.detach().amax(dim, keepdim=True)
    value = value - _finite(top)
    total = value.exp().sum(dim, keepdim=True)
    return value - torch.where(total == 0, 1.0, total).log()


def log_joint(table: StepTable, beliefs: list[Tensor], outer: Tensor | None) -> Tensor:
    """Sum of table, child beliefs and parent message: (batch, messages, *children, parent)."""
    result, order = table.log, table.log.dim() - 2
    for axis, belief in enumerate(beliefs if outer is None else [*beliefs, outer]):
        axis = order - 1 if axis == len(beliefs) else axis
        shape = [1] * order
        shape[axis] = belief.shape[-1]
        result = result + belief.reshape(*belief.shape[:2], *shape)
    return result


def _in_chunks(table: StepTable, beliefs: list[Tensor], outer: Tensor | None, reduce, keep: int) -> Tensor:  # type: ignore[no-untyped-def]
    """``reduce`` the log joint over all table axes but ``keep``, a slice of messages at a time when it is large."""
    order = table.log.dim() - 2
    dims = tuple(2 + d for d in range(order) if d != keep)
    parts = beliefs if outer is None else [*beliefs, outer]
    batch = joint_batch(*(t.shape[0] for t in (*parts, table.log)))
    messages = max(t.shape[1] for t in (*parts, table.log))
    size = prod(table.log.shape[2:])
    if batch * messages * size <= CHUNK:
        return reduce(log_joint(table, beliefs, outer), dims)

    def cut(t: Tensor, dim: int, start: int, width: int) -> Tensor:
        return t if t.shape[dim] == 1 else t.narrow(dim, start, min(width, t.shape[dim] - start))

    dim, length = (1, messages) if messages > 1 else (0, batch)
    if length == 1:
        return reduce(log_joint(table, beliefs, outer), dims)
    width = max(1, length // 2)
    pieces = []
    for start in range(0, length, width):
        part = [cut(t, dim, start, width) for t in parts]
        few = StepTable(cut(table.log, dim, start, width))
        last = None if outer is None else part[-1]
        pieces.append(_in_chunks(few, part[: len(beliefs)], last, reduce, keep))
    return torch.cat(pieces, dim)


class LogSemiring:
    """Sum-product. ``fast`` multiplies in linear space and remembers the smallest results for :meth:`safe`.

    ``stride`` says after how many steps of a path its vector is scaled anew.
    """

    def __init__(self, fast: bool = True, stride: int = 4) -> None:
        self.fast, self.stride = fast, stride
        self._floors: list[Tensor] = []
        self._lost = False

    def safe(self) -> bool:
        """True when no result of the fast route can have lost anything to underflow."""
        if self._lost or not self._floors:
            return not self._lost
        return bool(torch.stack(self._floors).min() > safe_floor(self._floors[0].dtype))

    def up(self, step: Step, table: StepTable, beliefs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Messages to the parents, (batch, messages, parent), and the log scale taken out, (batch, messages)."""
        if self.fast and table.single and not (torch.is_grad_enabled() and beliefs[0].requires_grad):
            (belief,) = beliefs
            if belief.shape[-1] >= WIDE and not table.recorded:
                total, top = absorb_rows(belief.flatten(0, 1), table.stored[0, 0])
                total, top = (t.unflatten(0, belief.shape[:2]) for t in (total, top))
                return self._log(total) + table.scale, top.squeeze(-1)
        tops = [_top(b) for b in beliefs]
        small = [b - t for b, t in zip(beliefs, tops, strict=True)]
        offset = sum(tops[1:], tops[0]).squeeze(-1)
        if not self.fast:
            return _in_chunks(table, small, None, safe_logsumexp, len(beliefs)), offset
        linear = [b.exp() for b in small]
        if len(linear) == 1:
            total = _multiply(linear[0], table.linear)
        else:
            total = _einsum(step.equation, step.path, linear, table.linear)
        return self._log(total) + table.scale, offset

    def down(self, step: Step, table: StepTable, outer: Tensor, beliefs: list[Tensor], child: int) -> Tensor:
        """Messages to one of the children, (batch, messages, child), up to a constant."""
        others = [b - _top(b) for i, b in enumerate(beliefs) if i != child]
        if not self.fast:
            outer = outer - _top(outer)
            spread = list(others)
            spread.insert(child, torch.zeros(1, 1, table.log.shape[2 + child]).to(outer))
            return _in_chunks(table, spread, outer, safe_logsumexp, child)
        outer = outer + table.scale
        linear = (outer - _top(outer)).exp()
        if not others:
            return self._log(_multiply(linear, table.linear.transpose(-1, -2)))
        inputs, output = step.equation.split("->")
        terms = inputs.split(",")
        target = terms.pop(child)
        equation = ",".join([*terms[:-1], output, terms[-1]]) + "->" + target
        return self._log(_einsum(equation, "auto", [*(b.exp() for b in others), linear], table.linear))

    def watch(self, floor: Tensor) -> None:
        """Remember the smallest of some results: relative to products whose factors are at most 1."""
        self._floors.append(floor)

    def watch_number(self, floor: float, dtype: torch.dtype) -> None:
        """The same for a number that is known already, of results in this precision."""
        self._lost = self._lost or not floor > safe_floor(dtype)

    def _log(self, total: Tensor) -> Tensor:
        if total.numel():
            self.watch(total.detach().amin())
        return total.log()


class MaxSemiring:
    """Max-product: the same sweep finds the best assignment's score (Viterbi on chains)."""

    def up(self, step: Step, table: StepTable, beliefs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Best scores of the part below for every parent value, and the largest belief taken out of them.

        Without that the scores would grow with the tree, and rounding with the scores.
        """
        tops = [_top(b) for b in beliefs]
        small = [b - t for b, t in zip(beliefs, tops, strict=True)]
        alone = len(small) == 1 and table.single and not transforming()
        if alone and native.possible(small[0], table.log):
            (belief,), (child, parent) = small, table.log.shape[2:]
            best = belief.new_empty(*belief.shape[:2], parent)
            rows = belief.shape[0] * belief.shape[1]
            native.call(
                "best_rows", rows, child, parent, belief.contiguous(), table.log[0, 0].contiguous(), best
            )
        else:
            best = _in_chunks(table, small, None, lambda joint, dims: joint.amax(dims), len(beliefs))
        return best, sum(tops[1:], tops[0]).squeeze(-1)

    def safe(self) -> bool:
        """Always exact."""
        return True


def _top(value: Tensor) -> Tensor:
    return _finite(value.detach().amax(-1, keepdim=True))


def _multiply(vectors: Tensor, tables: Tensor) -> Tensor:
    """(batch or 1, messages, n) times (batch or 1, messages or 1, n, m), with one matrix product where shared."""
    if tables.shape[1] == 1:
        return vectors @ (tables[0, 0] if tables.shape[0] == 1 else tables[:, 0])
    if tables.shape[0] == 1:
        return torch.einsum("bgn,gnm->bgm", vectors, tables[0])
    return (vectors[..., None, :] @ tables).squeeze(-2)


def _einsum(equation: str, path, linear: list[Tensor], tables: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """opt_einsum contraction of child beliefs with tables that may carry batch and message dimensions."""
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    letters = terms[-1].replace("g", "")
    shared, alone = tables.shape[1] == 1, tables.shape[0] == 1
    terms[-1] = ("" if alone else "b") + ("" if shared else "g") + letters
    tables = tables[0] if alone else tables
    tables = tables.squeeze(-len(letters) - 1) if shared else tables
    batch = joint_batch(*(t.shape[0] for t in linear))
    batch = batch if alone else tables.shape[0]
    messages = max(t.shape[1] for t in linear)
    linear = [t.expand(batch, messages, *t.shape[2:]) for t in linear]
    optimize = path if isinstance(path, str) else list(path)
    return opt_einsum.contract(",".join(terms) + "->" + output, *linear, tables, optimize=optimize)
