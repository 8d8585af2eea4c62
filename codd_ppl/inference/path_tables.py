"""The tables along a path, in scaled linear space, a few steps at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from codd_ppl.compiler.plan import Run
from codd_ppl.inference import native
from codd_ppl.inference.semirings import joint_batch
from codd_ppl.inference.tables import Tables, picked

__all__ = ["PathTables", "Strided"]

CHUNK = 1 << 18
"""Entries of the tables that are turned into linear space at a time, so that they stay in the cache."""

KEPT = 1 << 22
"""All tables of a path are kept in linear space up to so many entries; larger ones are computed anew by each pass."""


class Strided(NamedTuple):
    """Tables for a compiled loop.

    Attributes:
        table: the numbers, that of the first step and batch element first, each table's in one piece.
        first, stop: the steps that they belong to.
        step, each: strides between steps and between batch elements.
        across: their rows belong to child values, so that a product with the child's vector runs across them.
    """

    table: Tensor
    first: int
    stop: int
    step: int
    each: int
    across: bool


class PathTables:
    """exp(log psi) of each step of a run, divided by a largest entry.

    One table that all steps share is divided by its largest entry for each parent value, ``gauge``; tables of their
    own by their largest entry, ``scales``.

    Args:
        tables: of the query.
        run: the path.
        inplace: nothing here is differentiated, so that memory may be used again.
        batch: of the vectors that go along.

    Attributes:
        batch: of the tables, 1 where all batch elements use the same.
        native: a compiled loop is the faster one.
        logs_only: it takes the exponentials of the tables by itself, as every batch element has its own.
        kept: the linear tables of all steps are in memory, ``linear``.
        gauge: (batch or 1, 1, parent) of a shared table, else None.
        scales: (batch or 1, steps) of own tables, complete after one pass over them, else None.
    """

    def __init__(self, tables: Tables, run: Run, inplace: bool, batch: int) -> None:
        self.logs, self.places, self.flipped, self.block = tables.run(run)
        self.steps, self.inplace = run.stop - run.start, inplace
        self.batch = joint_batch(*(t.shape[0] for t in self.logs))
        self.shared = len(self.logs) == 1
        self.gauge: Tensor | None = None
        self.scales: Tensor | None = None
        self.linear: list[Tensor] = []
        self._rows: Tensor | None = None
        self._strided: dict[bool | None, Strided] = {}
        self._first, self._ahead, self._behind = -1, list[Tensor](), list[Tensor]()
        states, threads = self.logs[0].shape[-1], torch.get_num_threads()
        self.native, self.logs_only = inplace and native.usable(states, *self.logs), False
        if self.shared:
            log, self.kept = self.logs[0], True
            if inplace and self.batch == 1 and batch >= threads and states <= native.SHARED_STATES:
                self.native = native.possible(log)
            if self.native and self.batch == 1 and states <= native.LAID_OUT:
                log = log.contiguous()
                self.gauge, table = log.new_empty(1, 1, states), torch.empty_like(log)
                native.call("share", states, log, self.gauge, table)
            else:
                self.gauge = log.detach().amax(-2, keepdim=True).nan_to_num(torch.nan, 0.0, 0.0)
                difference = log - self.gauge
                table = difference.exp_() if inplace else difference.exp()
            self.linear = [table]
            table = table[0] if self.batch == 1 else table
            self._ahead, self._behind = [table], [table.transpose(-1, -2)]
            return
        if inplace and 0 < joint_batch(batch, self.batch) == self.batch and native.possible(*self.logs):
            self.native = self.logs_only = states <= native.STATES or self.batch >= threads
        size = self.batch * self.logs[0].shape[1] * self.logs[0].shape[2]
        self.kept = not inplace or (size * self.steps <= KEPT and not self.logs_only)
        self.native = self.logs_only or (self.native and self.kept)
        self.each = self.steps if self.kept else max(1, CHUNK // max(1, size))
        self.scales = self.logs[0].new_zeros(self.batch, self.steps)
        self._room: Tensor | None = None

    def table(self, k: int) -> Tensor:
        """The table of step k: (child, parent), or (batch, child, parent)."""
        place = self._place(k)
        return self._ahead[place]

    def back(self, k: int) -> Tensor:
        """Its transpose."""
        place = self._place(k)
        return self._behind[place]

    def rows(self, k: int, values: Tensor) -> Tensor:
        """Rows of step k for given values of the parent, (draws, batch) -> (draws, batch, child)."""
        if self.shared and self.batch == 1:
            if self._rows is None:
                self._rows = self._behind[0].contiguous()
            rows = self._rows.index_select(0, values.flatten())
            return rows.reshape(*values.shape, rows.shape[1])
        kept = self.linear[0] if self.kept else None
        table = self.logs[k] if kept is None else kept if self.shared else kept[:, k]
        if table.shape[0] == 1:
            row = table[0].T[values]
        else:
            row = table.transpose(1, 2)[torch.arange(table.shape[0], device=values.device), values]
        if not self.kept:
            assert self.scales is not None
            row = (row - self.scales[:, k, None]).exp()
        return row

    def _place(self, k: int) -> int:
        if self.shared:
            return 0
        if not 0 <= self._first <= k < self._first + self.each:
            self._load(k - k % self.each)
        return k - self._first

    def _load(self, start: int) -> None:
        stop = min(start + self.each, self.steps)
        log = self._stacked(start, stop)
        top = log.detach().amax((-2, -1), keepdim=True)
        top = top.nan_to_num(torch.nan, 0.0, 0.0)
        if not self.inplace:
            linear = (log - top).exp()
        else:
            if self._room is None or self._room.shape != log.shape:
                self._room = torch.empty_like(log)
            linear = torch.sub(log, top, out=self._room).exp_()
        assert self.scales is not None
        self.scales[:, start:stop] = top[..., 0, 0]
        if self.kept:
            self.linear = [linear]
        rows = linear[0] if self.batch == 1 else linear.transpose(0, 1)
        self._first = start
        self._ahead, self._behind = list(rows.unbind(0)), list(rows.transpose(-1, -2).unbind(0))

    def _stacked(self, start: int, stop: int) -> Tensor:
        """Log tables of some steps, (batch, steps, child, parent); a view where they were given stacked, in order."""
        if self.block is not None:
            return picked(self.block, self.places[start:stop])
        some = [log.expand(self.batch, -1, -1) for log in self.logs[start:stop]]
        return some[0][:, None] if len(some) == 1 else torch.stack(some, dim=1)

    def strided(self, k: int, across: bool | None = None) -> Strided:
        """The tables around step k for a compiled loop, in log space if :attr:`logs_only`.

        Args:
            k: the step.
            across: as in :class:`Strided`, None: as they are.
        """
        known = self._strided.get(across)
        if known is None or not known.first <= k < known.stop:
            known = self._strided[across] = self._lay_out(k, across)
        return known

    def _lay_out(self, k: int, across: bool | None) -> Strided:
        first, stop, start, direction = 0, self.steps, 0, 0 if self.shared else 1
        if not self.logs_only:
            if not self.linear:
                self._load(0)
            table = self.linear[0][:, None] if self.shared else self.linear[0]
        elif self.block is None:
            first = k - k % self.each
            stop = min(first + self.each, stop)
            table = self._stacked(first, stop)
        elif self.places == tuple(range(stop)):
            table = self.block
        elif self.places == tuple(range(stop - 1, -1, -1)):
            table, start, direction = self.block, stop - 1, -1
        else:
            table = self._stacked(first, stop)
        if across is None:
            across = not table[0, 0].T.is_contiguous()
        rows = table if across else table.transpose(-1, -2)
        rows = (rows if rows[0, 0].is_contiguous() else rows.contiguous())[:, start:]
        step, each = direction * rows.stride(1), 0 if self.batch == 1 else rows.stride(0)
        return Strided(rows, first, stop, step, each, across)

    def edges_buffer(self) -> Tensor:
        """Room for a value at each entry of each table, laid out as the tables were given: (batch, steps, ..)."""
        n, m = self.logs[0].shape[1:]
        shape = (m, n) if self.flipped else (n, m)
        return self.logs[0].new_empty(self.batch, self.steps, *shape)

    def edge(self, buffer: Tensor, k: int) -> Tensor:
        """The part of such a buffer that belongs to step k, (batch, child, parent)."""
        part = buffer[:, self.places[k]]
        return part.transpose(1, 2) if self.flipped else part
