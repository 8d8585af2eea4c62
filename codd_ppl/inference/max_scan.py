"""Max-product along a path (Viterbi 1967): one broadcast sum and one maximum a step, in memory that is used again."""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.compiler.plan import Run
from codd_ppl.inference.tables import Tables

__all__ = ["MaxScan"]

STRIDE = 16
"""After so many steps the largest score is taken out, so that rounding does not grow with the length."""

WIDE = 256
"""From so many states on, maxima are taken along the last dimension, which is faster there."""

ROOM = 1 << 21
"""Largest number of sums that are held at once, unless a single batch element has more."""


class MaxScan:
    """Best scores along a run towards the root.

        x_k = evidence and messages from elsewhere + m_{k-1},     m_k(p) = max_c x_k(c) + log psi_k(c, p).

    Args:
        tables: of the query.
        run: the path.
        base: log of what each child of the run believes without the run, (batch or 1, steps, n).

    Attributes:
        x, m: all of them, (batch, steps, n).
        offset: what was taken out of each message, (batch, steps).
    """

    def __init__(self, tables: Tables, run: Run, base: Tensor) -> None:
        self.run, self.steps = run, run.stop - run.start
        self.logs, _, _ = tables.run(run)
        self.logs = self.logs * self.steps if len(self.logs) == 1 else self.logs
        batch = max(base.shape[0], *(t.shape[0] for t in self.logs)) if base.shape[0] else 0
        base = base.expand(batch, -1, -1)
        self.x, self.m = base.new_empty(base.shape), base.new_empty(base.shape)
        self.offset = base.new_zeros(base.shape[:2])
        self._room: Tensor | None = None
        rows, x, m = base.unbind(1), self.x.unbind(1), self.m.unbind(1)
        for k in range(self.steps):
            if k:
                torch.add(rows[k], m[k - 1], out=x[k])
            else:
                x[0].copy_(rows[0])
            if k % STRIDE == 0:
                top = x[k].amax(-1, keepdim=True)
                top = torch.where(torch.isfinite(top), top, 0.0)
                x[k].sub_(top)
                self.offset[:, k] = top[:, 0]
            self._step(x[k], self.logs[k], m[k])

    def _step(self, x: Tensor, table: Tensor, out: Tensor) -> None:
        """max_c x(c) + table(c, p), a part of the batch at a time where there are many states."""
        wide = table.shape[-1] >= WIDE
        table = table.transpose(1, 2) if wide else table
        sums = x[:, None, :] if wide else x[:, :, None]
        each = max(1, ROOM // max(1, table.shape[1] * table.shape[2]))
        for start in range(0, len(x), each):
            part = sums[start : start + each]
            own = table if table.shape[0] == 1 else table[start : start + each]
            shape = (len(part), *table.shape[1:])
            if self._room is None or self._room.shape != shape:
                self._room = x.new_empty(shape)
            torch.add(part, own, out=self._room)
            out[start : start + each] = self._room.amax(-1 if wide else 1)

    def best(self, last: Tensor) -> Tensor:
        """Best values of the run's children given its last parent's, (batch) -> (steps, batch)."""
        batch, found = torch.arange(len(last), device=last.device), [last] * self.steps
        value, x = last, self.x.unbind(1)
        for k in range(self.steps - 1, -1, -1):
            table = self.logs[k].transpose(1, 2)
            row = table[0].index_select(0, value) if table.shape[0] == 1 else table[batch, value]
            found[k] = value = (row + x[k]).argmax(-1)
        return torch.stack(found)

    def message(self, k: int) -> Tensor:
        """The message of step k with ``offset[:, k]`` taken out, (batch, 1, n)."""
        return self.m[:, k : k + 1]

    @property
    def messages(self) -> Tensor:
        """All of them, (batch, steps, n)."""
        return self.m

    def child(self, k: int) -> Tensor:
        """What the child of step k believes, (batch, 1, n)."""
        return self.x[:, k : k + 1]
