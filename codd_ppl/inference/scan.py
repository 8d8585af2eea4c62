"""A path of messages in scaled linear space: one matrix product a step, logarithms only once for the whole path.

Every vector is divided by its largest entry before it is multiplied with a table whose columns' largest entry is 1
(Rabiner 1989, "A tutorial on hidden Markov models", section V.A, with maxima instead of sums). That loses nothing as
long as no product that comes out is near the smallest number; :meth:`LogSemiring.safe` sees it from the results.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from codd_ppl.compiler.plan import Run
from codd_ppl.inference.semirings import LogSemiring
from codd_ppl.inference.tables import Tables

__all__ = ["DownScan", "UpScan"]


class UpScan:
    """Messages along a run towards the root.

    With lin_k = exp(evidence and messages from elsewhere) and P_k the table, both scaled to a largest entry of 1:

        a_k = lin_k * o_{k-1} / s_k,     o_k = a_k P_k.

    Args:
        tables: of the query.
        run: the path.
        base: log of what each child of the run believes without the run, (batch or 1, steps, n).
        semiring: collects what the safety check looks at.
    """

    def __init__(self, tables: Tables, run: Run, base: Tensor, semiring: LogSemiring) -> None:
        self.run, self.tables = run, [tables.step(i) for i in range(run.start, run.stop)]
        steps = len(self.tables)
        self.shared = all(t is self.tables[0] for t in self.tables)
        scales = [t.scale for t in (self.tables[:1] if self.shared else self.tables)]
        if self.shared:
            carried = base[:, 1:] + scales[0]
        else:
            carried = base[:, 1:] + torch.cat(torch.broadcast_tensors(*scales[:-1]), dim=1)
        first = base[:, :1].expand(carried.shape[0], -1, -1)
        self.base = torch.cat((first, carried), dim=1)
        top = self.base.detach().amax(-1, keepdim=True)
        top = torch.where(torch.isfinite(top), top, 0.0)
        self.rows = (self.base - top).exp().unbind(1)
        a, self.a, self.o, s = self.rows[0], list[Tensor](), list[Tensor](), list[Tensor]()
        for k in range(steps):
            if k:
                a = self.rows[k] * self.o[-1]
            largest = a.detach().amax(-1, keepdim=True)
            a = a / largest
            self.a.append(a)
            s.append(largest)
            self.o.append(self.product(a, k))
        if self.o[-1].numel():
            size = max(o.shape[0] for o in (s[-1], self.o[-1]))
            sums = torch.cat([v.expand(size, 1) for v in s], dim=1)
            self.offset = sums.log() + top[..., 0]
            floor = torch.stack([o.detach().expand(size, -1) for o in self.o], dim=1).amin(-1) * sums
            semiring.watch(floor.amin() / base.shape[-1])
        else:
            self.offset = top[..., 0]

    def product(self, vector: Tensor, k: int) -> Tensor:
        """(batch or 1, child) times the table of step k: (batch, parent)."""
        linear = self.tables[k].linear
        return vector @ linear[0, 0] if linear.shape[0] == 1 else (vector[:, None] @ linear[:, 0])[:, 0]

    def transposed(self, vector: Tensor, k: int) -> Tensor:
        """(batch or 1, parent) times the transposed table of step k: (batch, child)."""
        linear = self.tables[k].linear.transpose(-1, -2)
        return vector @ linear[0, 0] if linear.shape[0] == 1 else (vector[:, None] @ linear[:, 0])[:, 0]

    def message(self, k: int) -> Tensor:
        """The log-message of step k with ``offset[:, k]`` taken out, (batch or 1, 1, n)."""
        return self.o[k].log()[:, None] + self.tables[k].scale

    @cached_property
    def messages(self) -> Tensor:
        """All of them, (batch or 1, steps, n)."""
        scales = self.tables[0].scale if self.shared else _stack([t.scale[:, 0] for t in self.tables])
        return _stack(self.o).log() + scales

    def child(self, k: int) -> Tensor:
        """What the child of step k believes, (batch or 1, 1, n)."""
        own = self.base[:, k : k + 1]
        return own if k == 0 else own + self.o[k - 1].log()[:, None]


class DownScan:
    """Messages along a run away from the root, e_k = outside of step k's parent times its scale, d_k = P_k e_k."""

    def __init__(self, up: UpScan, outer: Tensor, semiring: LogSemiring) -> None:
        self.up = up
        steps = len(up.tables)
        self.e, self.d = [outer] * steps, [outer] * steps
        log = outer + up.tables[-1].scale[:, 0]
        top = log.detach().amax(-1, keepdim=True)
        e, s = (log - torch.where(torch.isfinite(top), top, 0.0)).exp(), list[Tensor]()
        for k in range(steps - 1, -1, -1):
            largest = e.detach().amax(-1, keepdim=True)
            self.e[k] = e / largest
            self.d[k] = up.transposed(self.e[k], k)
            s.append(largest)
            if k:
                e = up.rows[k] * self.d[k]
        if self.d[0].numel():
            size = self.d[0].shape[0]
            floor = torch.stack([d.detach().expand(size, -1) for d in self.d], dim=1).amin(-1)
            floor = floor * torch.cat([v.expand(size, 1) for v in reversed(s)], dim=1)
            semiring.watch(floor.amin() / outer.shape[-1])
            semiring.watch(self._belief.detach().sum(-1).amin())

    @cached_property
    def _belief(self) -> Tensor:
        return _stack(self.up.a) * _stack(self.d)

    @cached_property
    def marginals(self) -> Tensor:
        """Marginals of the run's children, (batch or 1, steps, n)."""
        return self._belief / self._belief.sum(-1, keepdim=True)

    @cached_property
    def weighted(self) -> Tensor:
        """a_k over its sum with P_k e_k, (batch or 1, steps, child): times P_k and e_k it is the edge's marginal."""
        total = (_stack(self.e) * _stack(self.up.o)).sum(-1, keepdim=True)
        return _stack(self.up.a) / total

    @cached_property
    def outside(self) -> Tensor:
        """e_k, (batch or 1, steps, parent)."""
        return _stack(self.e)

    def message(self, k: int) -> Tensor:
        """The log-message of step k to its child up to a constant, (batch or 1, 1, n)."""
        return self.d[k].log()[:, None]

    @cached_property
    def messages(self) -> Tensor:
        """All of them, (batch or 1, steps, n)."""
        return _stack(self.d).log()

    def outer(self, k: int) -> Tensor:
        """What the parent of step k < last believes without its own step, up to a constant, (batch or 1, 1, n)."""
        return self.up.base[:, k + 1 : k + 2] + self.message(k + 1) - self.up.tables[k].scale


def _stack(rows: list[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*rows), dim=1)
