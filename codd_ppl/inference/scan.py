"""A path of messages in scaled linear space: one product and one matrix product a step, logarithms once for all.

Evidence and tables are scaled to a largest entry of 1, and every few steps so is the vector that goes along (Rabiner
1989, "A tutorial on hidden Markov models", section V.A, with maxima and less often). That loses nothing as long as no
product that comes out is near the smallest number; :meth:`LogSemiring.safe` sees it from the results.
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

    With lin_k = exp(evidence and messages from elsewhere) and P_k the table, and s_k a scale (often just 1):

        a_k = lin_k * o_{k-1} / s_k,     o_k = a_k P_k.

    Args:
        tables: of the query.
        run: the path.
        base: log of what each child of the run believes without the run, (batch or 1, steps, n).
        semiring: says how often to scale, and collects what the safety check looks at.
    """

    def __init__(self, tables: Tables, run: Run, base: Tensor, semiring: LogSemiring) -> None:
        self.run, self.tables = run, tables.run(run)
        self.steps, self.shared = run.stop - run.start, len(self.tables) == 1
        scales = torch.cat(torch.broadcast_tensors(*(t.scale for t in self.tables)), dim=1)
        carried = base[:, 1:] + (scales if self.shared else scales[:, :-1])
        self.base = torch.cat((base[:, :1].expand(carried.shape[0], -1, -1), carried), dim=1)
        top = self.base.detach().amax(-1, keepdim=True)
        top = torch.where(torch.isfinite(top), top, 0.0)
        batches = {self.base.shape[0], *(t.log.shape[0] for t in self.tables)}
        batch = 0 if 0 in batches else max(batches)
        self.rows = (self.base - top).exp().expand(batch, -1, -1).unbind(1)
        linear = [
            t.linear[0, 0].contiguous() if t.linear.shape[0] == 1 else t.linear[:, 0] for t in self.tables
        ]
        self.linear = linear * self.steps if self.shared else linear
        self.a, self.o, self.scaled = list[Tensor](), list[Tensor](), list[Tensor]()
        a, stride = self.rows[0], semiring.stride
        for k in range(self.steps):
            if k:
                a = self.rows[k] * self.o[-1]
            if k % stride == 0:
                scale = a.detach().amax(-1, keepdim=True)
                a = a / scale
                self.scaled.append(scale)
            self.a.append(a)
            self.o.append(product(a, self.linear[k]))
        self.offset = _spread([s.log() for s in self.scaled], stride, self.steps) + top[..., 0]
        if self.rows[0].numel():
            smallest = torch.stack(self.o, dim=1).detach().amin(-1) * _spread(
                self.scaled, stride, self.steps, 1.0
            )
            semiring.watch(smallest.amin() / float(base.shape[-1]) ** min(stride, self.steps))

    def message(self, k: int) -> Tensor:
        """The log-message of step k with ``offset[:, k]`` taken out, (batch or 1, 1, n)."""
        return self.o[k].log()[:, None] + self.tables[0 if self.shared else k].scale

    @cached_property
    def messages(self) -> Tensor:
        """All of them, (batch or 1, steps, n)."""
        return torch.stack(self.o, dim=1).log() + torch.cat(
            torch.broadcast_tensors(*(t.scale for t in self.tables)), dim=1
        )

    def child(self, k: int) -> Tensor:
        """What the child of step k believes, (batch or 1, 1, n)."""
        own = self.base[:, k : k + 1]
        return own if k == 0 else own + self.o[k - 1].log()[:, None]


class DownScan:
    """Messages along a run away from the root, e_k = outside of step k's parent times its scale, d_k = P_k e_k."""

    def __init__(self, up: UpScan, outer: Tensor, semiring: LogSemiring) -> None:
        self.up = up
        log = outer + up.tables[-1].scale[:, 0]
        top = log.detach().amax(-1, keepdim=True)
        e = (log - torch.where(torch.isfinite(top), top, 0.0)).exp()
        if e.shape[0] == 1:  # the root may lack the batch dimension that the path has
            e = e.expand(up.rows[0].shape[0], -1)
        back = [t.transpose(-1, -2) for t in (up.linear[:1] if up.shared else up.linear)]
        back = [
            t.contiguous() if t.dim() == 2 else t for t in back
        ]  # a row times a table is fastest like this
        es, ds, scaled = list[Tensor](), list[Tensor](), list[Tensor]()
        for k in range(up.steps - 1, -1, -1):
            if len(es) % semiring.stride == 0:
                scale = e.detach().amax(-1, keepdim=True)
                e = e / scale
                scaled.append(scale)
            d = product(e, back[0 if up.shared else k])
            es.append(e)
            ds.append(d)
            if k:
                e = up.rows[k] * d
        self.e, self.d = es[::-1], ds[::-1]
        if self.d[0].numel():
            smallest = torch.stack(ds, dim=1).detach().amin(-1) * _spread(
                scaled, semiring.stride, up.steps, 1.0
            )
            semiring.watch(smallest.amin() / float(outer.shape[-1]) ** min(semiring.stride, up.steps))
            semiring.watch(self._belief.detach().sum(-1).amin())

    @cached_property
    def _belief(self) -> Tensor:
        return torch.stack(self.up.a, dim=1) * torch.stack(self.d, dim=1)

    @cached_property
    def marginals(self) -> Tensor:
        """Marginals of the run's children, (batch or 1, steps, n)."""
        return self._belief / self._belief.sum(-1, keepdim=True)

    @cached_property
    def weighted(self) -> Tensor:
        """a_k over its sum with P_k e_k, (batch or 1, steps, child): times P_k and e_k it is the edge's marginal."""
        return torch.stack(self.up.a, dim=1) / self._belief.sum(-1, keepdim=True)

    @cached_property
    def outside(self) -> Tensor:
        """e_k, (batch or 1, steps, parent)."""
        return torch.stack(self.e, dim=1)

    def message(self, k: int) -> Tensor:
        """The log-message of step k to its child up to a constant, (batch or 1, 1, n)."""
        return self.d[k].log()[:, None]

    @cached_property
    def messages(self) -> Tensor:
        """All of them, (batch or 1, steps, n)."""
        return torch.stack(self.d, dim=1).log()

    def outer(self, k: int) -> Tensor:
        """What the parent of step k < last believes without its own step, up to a constant, (batch or 1, 1, n)."""
        table = self.up.tables[0 if self.up.shared else k]
        return self.up.base[:, k + 1 : k + 2] + self.message(k + 1) - table.scale


def product(vector: Tensor, table: Tensor) -> Tensor:
    """(batch, n) times (n, m), or times (batch, n, m) row by row."""
    return vector @ table if table.dim() == 2 else (vector[:, None] @ table)[:, 0]


def _spread(scales: list[Tensor], stride: int, steps: int, fill: float = 0.0) -> Tensor:
    """Scales (batch, 1) of every stride-th step as (batch, steps), ``fill`` in between."""
    if stride == 1:
        return torch.cat(scales, dim=1)
    result = scales[0].new_full((scales[0].shape[0], steps), fill)
    result[:, ::stride] = torch.cat(scales, dim=1)
    return result
