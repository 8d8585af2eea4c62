"""Max-product along a path (Viterbi 1967): one broadcast sum and one maximum a step, in memory that is used again."""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.compiler.plan import Run
from codd_ppl.inference import native
from codd_ppl.inference.semirings import joint_batch
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
        x, m: all of them, (steps, batch, n).
        offset: what was taken out of each message, (batch, steps).
    """

    def __init__(self, tables: Tables, run: Run, base: Tensor) -> None:
        self.run, self.steps = run, run.stop - run.start
        logs, places, _, block = tables.run(run)
        self._logs = logs * self.steps if len(logs) == 1 else logs
        batch = joint_batch(base.shape[0], *(t.shape[0] for t in logs))
        base = base.transpose(0, 1).expand(-1, batch, -1)
        self.x, self.m = base.new_empty(base.shape), base.new_empty(base.shape)
        self.offset = base.new_zeros(batch, self.steps)
        states = base.shape[-1]
        self._native: tuple[Tensor, int, int, int] | None = None
        if native.possible(base, *logs):
            self._native = self._laid_out(logs, places, block)
            native.call("best_scores", self.steps, batch, states, STRIDE, base.contiguous(), *self._native,
                        self.x, self.m, self.offset)  # fmt: skip
            return
        wide = states >= WIDE
        each = max(1, ROOM // states**2)
        room = base.new_empty(min(each, batch), states, states)
        rows, x, m = base.unbind(0), self.x.unbind(0), self.m.unbind(0)
        columns = (self.x[:, :, None] if wide else self.x[..., None]).unbind(0)
        flipped = [t.transpose(1, 2) for t in logs] if wide else logs
        flipped = flipped * self.steps if len(logs) == 1 else flipped
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
            if batch <= each:
                torch.add(columns[k], flipped[k], out=room)
                torch.amax(room, 2 if wide else 1, out=m[k])
                continue
            for start in range(0, batch, each):
                part = slice(start, start + each)
                table = flipped[k] if flipped[k].shape[0] == 1 else flipped[k][part]
                m[k][part] = (columns[k][part] + table).amax(2 if wide else 1)

    def _laid_out(
        self, logs: list[Tensor], places: tuple[int, ...], block: Tensor | None
    ) -> tuple[Tensor, int, int, int]:
        """Tables for the compiled loop, with strides between steps and batch elements, and whether rows belong to the

        child; as they were given where they come in one piece, in the order of the steps or against it.
        """
        size = logs[0].shape[1] * logs[0].shape[2]
        ordered = places == tuple(range(self.steps))
        if block is not None and (ordered or places == tuple(range(self.steps))[::-1]):
            across = block.is_contiguous()
            if across or block.mT.is_contiguous():
                each = 0 if block.shape[0] == 1 else size * self.steps
                return (
                    block[:, 0 if ordered else self.steps - 1],
                    size if ordered else -size,
                    each,
                    int(across),
                )
        if len(logs) == 1:
            return logs[0].contiguous(), 0, 0 if logs[0].shape[0] == 1 else size, 1
        if all(t.shape[0] == 1 for t in logs):
            return torch.cat(logs), size, 0, 1
        together = torch.stack(torch.broadcast_tensors(*logs))
        return together, together.shape[1] * size, size, 1

    def best(self, last: Tensor) -> Tensor:
        """Best values of the run's children given its last parent's, (batch) -> (steps, batch)."""
        if self._native is not None:
            values = last.new_empty(self.steps, last.shape[0])
            # The last parent alone may bring the batch.
            scores = self.x.expand(-1, last.shape[0], -1).contiguous()
            native.call("best_values", self.steps, last.shape[0], scores.shape[-1], scores, *self._native,
                        last.contiguous(), values)  # fmt: skip
            return values
        batch, found = torch.arange(last.shape[0], device=last.device), [last] * self.steps
        value, x = last, self.x.unbind(0)
        for k in range(self.steps - 1, -1, -1):
            table = self._logs[k].transpose(1, 2)
            row = table[0].index_select(0, value) if table.shape[0] == 1 else table[batch, value]
            found[k] = value = row.add_(x[k]).argmax(-1)
        return torch.stack(found)

    def message(self, k: int) -> Tensor:
        """The message of step k with ``offset[:, k]`` taken out, (batch, 1, n)."""
        return self.m[k][:, None]

    @property
    def messages(self) -> Tensor:
        """All of them, (batch, steps, n)."""
        return self.m.transpose(0, 1)

    def child(self, k: int) -> Tensor:
        """What the child of step k believes, (batch, 1, n)."""
        return self.x[k][:, None]
