"""A path of messages in scaled linear space: one product and one matrix product a step, logarithms once for all.

Evidence and tables are scaled to a largest entry of 1, and every few steps so is the vector that goes along (Rabiner
1989, "A tutorial on hidden Markov models", section V.A, with maxima and less often). That loses nothing as long as no
product that comes out is near the smallest number; :meth:`LogSemiring.safe` sees it from the results.

Arrays are laid out (steps, batch, n); with a table for each batch element, (steps, batch, 1, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from codd_ppl.compiler.plan import Run
from codd_ppl.inference import native
from codd_ppl.inference.path_tables import PathTables
from codd_ppl.inference.semirings import LogSemiring, joint_batch
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

    Attributes:
        a, o: all of them.
        offset: log scales taken out of each message, (batch or 1, steps).
    """

    def __init__(self, tables: Tables, run: Run, base: Tensor, semiring: LogSemiring) -> None:
        self.run, self.steps, stride = run, run.stop - run.start, semiring.stride
        self.inplace = not (torch.is_grad_enabled() and tables.differentiable)
        self.path = path = PathTables(tables, run, self.inplace, base.shape[0])
        self._given = base
        batch = joint_batch(base.shape[0], path.batch)
        if path.native:
            self.rows, self.a, self.o = base.new_empty(3, self.steps, batch, base.shape[2]).unbind(0)
            self.offset = base.new_empty(batch, self.steps)
            out = (self.rows, self.a, self.o, self.offset)
            least = run_native(path, base, out, None, stride, False)
            semiring.watch_number(least, base.dtype)
            if path.logs_only:
                return
        else:
            # The scale of a shared table depends on the parent's value, and so goes along with the parent's evidence.
            log = self.base.transpose(0, 1).expand(-1, batch, -1)
            top = finite_top(log)
            rows = (log - top).exp()
            self.rows = rows if path.batch == 1 else rows[:, :, None]
            scales = self.scan(stride).T
            self.offset = _spread(scales.log(), stride, self.steps, 0.0) + top[..., 0].T
            if self.rows.numel():
                smallest = self.o.detach().amin(-1).reshape(self.steps, -1).T
                floor = (smallest * _spread(scales.detach(), stride, self.steps, 1.0)).amin()
                semiring.watch(floor / float(base.shape[-1]) ** min(stride, self.steps))
        if path.scales is not None:
            self.offset = self.offset + path.scales

    def scan(self, stride: int) -> Tensor:
        """The loop: a and o; returns the scales of every stride-th step, (scales, batch)."""
        path, scaled = self.path, list[Tensor]()
        rows, multiply = self.rows.unbind(0), torch.mm if path.batch == 1 else torch.bmm
        if self.inplace:
            self.a, self.o = torch.empty_like(self.rows), torch.empty_like(self.rows)
            self.a[0].copy_(self.rows[0])
            a, o = self.a.unbind(0), self.o.unbind(0)
            for k in range(self.steps):
                if k:
                    torch.mul(rows[k], o[k - 1], out=a[k])
                if k % stride == 0:
                    scaled.append(a[k].amax(-1, keepdim=True))
                    a[k].div_(scaled[-1])
                multiply(a[k], path.table(k), out=o[k])
        else:
            each, out = list[Tensor](), list[Tensor]()
            for k in range(self.steps):
                vector = rows[k] * out[-1] if k else rows[k]
                if k % stride == 0:
                    scaled.append(vector.detach().amax(-1, keepdim=True))
                    vector = vector / scaled[-1]
                each.append(vector)
                out.append(multiply(vector, path.table(k)))
            self.a, self.o = torch.stack(each), torch.stack(out)
        return torch.stack([s.reshape(-1) for s in scaled])

    @cached_property
    def base(self) -> Tensor:
        """Log of what each child of the run believes without the run, table scales included, (batch or 1, steps, n)."""
        if self.path.gauge is None:
            return self._given
        carried = self._given[:, 1:] + self.path.gauge
        return torch.cat((self._given[:, :1].expand(carried.shape[0], -1, -1), carried), dim=1)

    def message(self, k: int) -> Tensor:
        """The log-message of step k with ``offset[:, k]`` taken out, (batch or 1, 1, n)."""
        log = self.o[k].log().reshape(-1, 1, self.o.shape[-1])
        return log if self.path.gauge is None else log + self.path.gauge

    @cached_property
    def messages(self) -> Tensor:
        """All of them, (batch or 1, steps, n)."""
        log = batch_first(self.o).log()
        return log if self.path.gauge is None else log + self.path.gauge

    def child(self, k: int) -> Tensor:
        """What the child of step k believes, (batch or 1, 1, n)."""
        own = self.base[:, k : k + 1]
        return own if k == 0 else own + self.o[k - 1].log().reshape(-1, 1, own.shape[-1])

    def draw(self, last: Tensor, generator: torch.Generator | None) -> Tensor:
        """Values of the run's children given its last parent's: (draws, batch) -> (steps, draws, batch).

        p(c | p) is proportional to a_k(c) P_k(c, p): one gathered row a step, and its cumulative sum inverted.
        """
        draws, batch = last.shape
        shape = (self.steps, draws, batch, 1)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=last.device)
        if self.path.native:
            return draw_native(self.path, self.a, uniform, last)
        # The largest uniform number is 1 - 2^-53; a little less keeps its product with a sum below that sum.
        targets, value = (uniform * (1 - 2**-50)).unbind(0), last
        a, found = self.a.reshape(self.steps, -1, self.a.shape[-1]).unbind(0), [last] * self.steps
        for k in range(self.steps - 1, -1, -1):
            weights = self.path.rows(k, value).mul_(a[k]).cumsum(-1, dtype=torch.float64)
            target = targets[k] * weights[..., -1:]
            found[k] = value = torch.searchsorted(weights, target, right=True)[..., 0]
        return torch.stack(found)


class DownScan:
    """Messages along a run away from the root, e_k = outside of step k's parent times its scale, d_k = P_k e_k.

    Args:
        up: the upward scan.
        outer: what the last parent believes without the run, (batch or 1, n).
        semiring: as in :class:`UpScan`.
        edges: whether the factors' marginals will be asked for; large tables then give them as the loop goes by.
        weight: of each batch element in them, (batch,), None: 1.
    """

    def __init__(
        self, up: UpScan, outer: Tensor, semiring: LogSemiring, edges: bool, weight: Tensor | None
    ) -> None:
        self.up, path, stride = up, up.path, semiring.stride
        # The last parent alone may have evidence for each batch element.
        batch = joint_batch(outer.shape[0], up.rows.shape[1])
        self.cached: dict[bool, Tensor] = {}  # kept here by counts.py
        streamed = edges and up.inplace and not path.kept and path.batch == batch
        streamed = streamed and (weight is None or len(weight) == batch)
        self.edges = path.edges_buffer() if streamed else None
        if path.native:
            self.e, self.d = outer.new_empty(2, up.steps, batch, outer.shape[-1]).unbind(0)
            self.marginals = outer.new_empty(batch, up.steps + 1, outer.shape[-1])
            self.weighted = outer.new_empty(batch, up.steps, outer.shape[-1])
            rows, inner, last = (v.expand(-1, batch, -1).contiguous() for v in (up.rows, up.a, up.o[-1:]))
            out = (rows, self.e, self.d, inner, last, self.marginals, self.weighted)
            least = run_native(path, outer, out, self.edges, stride, True, weight)
            semiring.watch_number(least, outer.dtype)
            return
        log = outer if path.gauge is None else outer + path.gauge[:, 0]
        first = (log - finite_top(log)).exp()
        self.rows = up.rows.expand(-1, batch, *up.rows.shape[2:])
        first = first.reshape(-1, *up.rows.shape[2:]).expand(self.rows.shape[1:])
        scales = self.scan(first, stride, weight)
        if self.d.numel():
            # The places of the scales count from the root, so turned around they fit the steps' order.
            spread = _spread(scales.detach().T, stride, up.steps, 1.0).flip(1)
            floor = (self.d.detach().amin(-1).reshape(up.steps, -1).T * spread).amin()
            semiring.watch(floor / float(outer.shape[-1]) ** min(stride, up.steps))
            total = self._total.detach().amin()
            semiring.watch(total if up.inplace else total.square())  # derivatives divide by it twice

    def scan(self, first: Tensor, stride: int, weight: Tensor | None) -> Tensor:
        """The loop: e, d, and the marginal of every edge in its place where wanted; returns the scales."""
        up, path, steps, into = self.up, self.up.path, self.up.steps, self.edges
        scaled = list[Tensor]()
        rows, multiply = self.rows.unbind(0), torch.mm if path.batch == 1 else torch.bmm
        if up.inplace:
            self.e, self.d = up.rows.new_empty(self.rows.shape), up.rows.new_empty(self.rows.shape)
            self.e[-1].copy_(first)
            e, d = self.e.unbind(0), self.d.unbind(0)
            for k in range(steps - 1, -1, -1):
                if k < steps - 1:
                    torch.mul(rows[k + 1], d[k + 1], out=e[k])
                if (steps - 1 - k) % stride == 0:
                    scaled.append(e[k].amax(-1, keepdim=True))
                    e[k].div_(scaled[-1])
                multiply(e[k], path.back(k), out=d[k])
                if into is not None:
                    share = up.a[k] / (up.a[k] * d[k]).sum(-1, keepdim=True)
                    share = share.reshape(into.shape[0], -1, 1)
                    if weight is not None:
                        share = share * weight[:, None, None]
                    edge = path.edge(into, k)
                    torch.mul(path.table(k), share, out=edge).mul_(e[k].reshape(into.shape[0], 1, -1))
        else:
            each, out = [first] * steps, [first] * steps
            for k in range(steps - 1, -1, -1):
                vector = rows[k + 1] * out[k + 1] if k < steps - 1 else first
                if (steps - 1 - k) % stride == 0:
                    scaled.append(vector.detach().amax(-1, keepdim=True))
                    vector = vector / scaled[-1]
                each[k] = vector
                out[k] = multiply(vector, path.back(k))
            self.e, self.d = torch.stack(each), torch.stack(out)
        return torch.stack([s.reshape(-1) for s in scaled])

    @cached_property
    def _belief(self) -> Tensor:
        return batch_first(self.up.a * self.d)

    @cached_property
    def _total(self) -> Tensor:
        return self._belief.sum(-1, keepdim=True)

    @cached_property
    def marginals(self) -> Tensor:
        """Marginals of the run's variables, the last parent included, (batch or 1, steps + 1, n)."""
        last = batch_first(self.e[-1:] * self.up.o[-1:])
        return torch.cat((self._belief / self._total, last / last.sum(-1, keepdim=True)), dim=1)

    @cached_property
    def weighted(self) -> Tensor:
        """a_k over its sum with P_k e_k, (batch or 1, steps, child): times P_k and e_k it is the edge's marginal."""
        return batch_first(self.up.a) / self._total

    @cached_property
    def outside(self) -> Tensor:
        """e_k, (batch or 1, steps, parent)."""
        return batch_first(self.e)

    def message(self, k: int) -> Tensor:
        """The log-message of step k to its child up to a constant, (batch or 1, 1, n)."""
        return self.d[k].log().reshape(-1, 1, self.d.shape[-1])

    @cached_property
    def messages(self) -> Tensor:
        """All of them, (batch or 1, steps, n)."""
        return batch_first(self.d).log()

    def outer(self, k: int) -> Tensor:
        """What the parent of step k < last believes without its own step, up to a constant, (batch or 1, 1, n)."""
        log = self.up.base[:, k + 1 : k + 2] + self.message(k + 1)
        return log if self.up.path.gauge is None else log - self.up.path.gauge


def finite_top(log: Tensor) -> Tensor:
    """Largest entries of the rows, a finite number where all are -inf."""
    return log.detach().amax(-1, keepdim=True).clamp_(min=torch.finfo(log.dtype).min / 4)


def run_native(
    path: PathTables,
    base: Tensor,
    out: Sequence[Tensor],
    edges: Tensor | None,
    stride: int,
    down: bool,
    weight: Tensor | None = None,
) -> float:
    """The compiled loop; returns what the safety check looks at.

    Args:
        path: the tables.
        base: log-evidence, (batch or 1, steps, n), or on the way down of the last parent, (batch or 1, n).
        out: up: rows, a, o, offset. Down: rows, e, d, a, the last of o, marginals, weighted.
        edges: room for the marginal of every edge.
        stride: between scales.
        weight: of each batch element in them.
    """
    rows, a, o, *rest = out
    steps, batch, n = rows.shape
    offset, inner, last, marginals, weighted = (None, *rest) if down else (*rest, None, None, None, None)
    base = base if base.stride(-1) == 1 else base.contiguous()
    weight = None if weight is None else weight.contiguous()
    places = None if edges is None else torch.tensor(path.places)
    tops = path.scales if path.logs_only else None
    if tops is not None and path.batch != batch:  # evidence of the last parent alone brings the batch
        tops = rows.new_empty(batch, steps)
    slices, done, least = native.slices(batch, steps * n * n), 0, 1.0
    rooms = [rows.new_empty(batch + n + n * n) for _ in slices]
    # Edges' marginals are laid out as given. A shared table is faster across its rows, but a large one is not worth
    # turning over for that.
    across = None if edges is None else not path.flipped
    if path.shared:
        across = None if n > native.LAID_OUT else not down
    lift, turn = 0 if down else base.stride(1), 0 if base.shape[0] == 1 else base.stride(0)
    gauged = 0 if path.batch == 1 else n
    while done < steps:
        tables = path.strided(steps - 1 - done if down else done, across)
        until = steps - tables.first if down else tables.stop
        given = (
            *(steps, done, until, batch, n, stride, int(down), int(tables.across != down)),
            *(base, lift, turn, path.gauge, gauged, rows),
            *(tables.table, tables.first, tables.step, tables.each, a, o, offset, tops),
            *(inner, last, marginals, weighted, weight, edges, places, steps * n * n),
        )
        calls = [(*some, *given, room) for some, room in zip(slices, rooms, strict=True)]
        least = min(least, *native.call_each("scan", calls))
        done = until
    return least


def draw_native(path: PathTables, a: Tensor, uniform: Tensor, last: Tensor) -> Tensor:
    """The compiled loop of :meth:`UpScan.draw`."""
    steps, draws, batch, n = a.shape[0], *last.shape, a.shape[-1]
    values, last = last.new_empty(steps, draws, batch), last.contiguous()
    alone, stop = int(a.shape[1] == 1 and batch != 1), steps
    room, row = torch.empty(n + -(-n // 16), dtype=torch.float64), a.new_empty(n)
    while stop > 0:
        # In linear space a row for each value of the parent is wanted; logarithms are gathered as they lie.
        tables = path.strided(stop - 1, None if path.logs_only else False)
        child, parent = (n, 1) if tables.across else (1, n)
        native.call(
            "draw",
            *(steps, tables.first, stop, draws, batch, alone, n, a, tables.table, tables.step, tables.each),
            *(child, parent, int(path.logs_only), uniform, last, room, row, values),
        )
        stop = tables.first
    return values


def batch_first(value: Tensor) -> Tensor:
    """(steps, batch, n) or (steps, batch, 1, n) as (batch, steps, n)."""
    return (value if value.dim() == 3 else value[:, :, 0]).transpose(0, 1)


def _spread(scales: Tensor, stride: int, steps: int, fill: float) -> Tensor:
    """Scales (batch, every stride-th step) as (batch, steps), ``fill`` in between."""
    if stride == 1:
        return scales
    result = scales.new_full((scales.shape[0], steps), fill)
    result[:, ::stride] = scales
    return result
