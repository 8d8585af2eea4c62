"""Tables of one step of a plan, in log and in scaled linear space."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from codd_ppl.inference.kept import MEMORY

__all__ = ["KeptTable", "StepTable"]

ROWS = 1 << 20
"""Entries that are turned into another type at a time."""


class StepTable:
    """The tables of one step as (batch or 1, messages or 1, *children, parent), in log and in scaled linear space."""

    def __init__(self, log: Tensor) -> None:
        self._log = log

    @property
    def log(self) -> Tensor:
        """The log-potentials."""
        return self._log

    @cached_property
    def scale(self) -> Tensor:
        """Largest log-potential for each parent value, (batch or 1, messages or 1, parent); 0 where all are -inf."""
        top = self.log.detach().flatten(2, -2).amax(2)
        return torch.where(torch.isfinite(top), top, 0.0)

    @cached_property
    def linear(self) -> Tensor:
        """exp(log - scale): every column's largest entry is 1."""
        scale = self.scale.reshape(*self.scale.shape[:2], *[1] * (self.log.dim() - 3), self.scale.shape[-1])
        return (self.log - scale).exp()

    @property
    def stored(self) -> Tensor:
        """The same, perhaps in bfloat16: for :mod:`codd_ppl.inference.products`."""
        return self.linear

    @property
    def single(self) -> bool:
        """Whether it is one table (child, parent) for all messages and the whole batch."""
        return self.log.dim() == 4 and self.log.shape[:2] == (1, 1)

    @property
    def recorded(self) -> bool:
        """Whether operations on it are recorded for a derivative."""
        return torch.is_grad_enabled() and self.log.requires_grad

    def rows(self, values: Tensor) -> Tensor:
        """Log rows for given parent values: (*sample, batch, messages) -> (*sample, batch, messages, *children)."""
        table = self.log.movedim(-1, 2)
        batch = torch.arange(table.shape[0], device=values.device)[:, None]
        message = torch.arange(table.shape[1], device=values.device)
        return table[batch, message, values]

    def given(self, children: Tensor) -> Tensor:
        """Log rows for given values of the only child: (*shape, messages) -> (*shape, messages, parent).

        With a table for each batch element the shape ends with the batch's, flattened.
        """
        if len(self.log) > 1:
            batch, message = (torch.arange(n, device=children.device) for n in self.log.shape[:2])
            return self.log[batch[:, None], message, children]
        table = self.log[0]
        if len(table) == 1:
            return table[0][children]
        return table[torch.arange(len(table), device=children.device), children]


class KeptTable(StepTable):
    """One large table for all messages and the whole batch, whose scaled linear form is kept from call to call.

    Log-potentials in bfloat16 have their linear form in bfloat16 too: half the memory, each entry rounded to 8 bits.

    Args:
        raw: the caller's tensor, (*cardinalities of the scope), :func:`codd_ppl.inference.kept.keepable`.
        parent_axis: of the parent in it.
        dtype: of the query.
    """

    def __init__(self, raw: Tensor, parent_axis: int, dtype: torch.dtype) -> None:
        self.raw, self.parent_axis, self.dtype = raw, parent_axis, dtype

    @cached_property
    def log(self) -> Tensor:
        """The log-potentials."""
        return self._placed(self.raw.detach().to(self.dtype))

    @cached_property
    def scale(self) -> Tensor:
        """As in :class:`StepTable`."""
        return self._kept[0][None, None]

    @cached_property
    def linear(self) -> Tensor:
        """As in :class:`StepTable`."""
        return self.stored.to(self.dtype)

    @property
    def stored(self) -> Tensor:
        """exp(log - scale), in bfloat16 if the log-potentials are."""
        return self._placed(self._kept[1])

    @property
    def single(self) -> bool:
        """As in :class:`StepTable`."""
        return self.raw.dim() == 2

    @property
    def recorded(self) -> bool:
        """It is not."""
        return False

    @property
    def sums(self) -> Tensor:
        """Sums of the linear form over the children's values, (parent,)."""
        axis, dtype, linear = self.parent_axis, self.dtype, self._kept[1]
        others = tuple(d for d in range(linear.dim()) if d != axis)
        return MEMORY.get(self.raw, ("sums", axis, dtype), lambda _: linear.sum(others, dtype=dtype))

    @property
    def by_child(self) -> Tensor:
        """The linear form of a table of order two as rows (child, parent) in one piece each; a copy, kept like it."""
        name, linear = ("by_child", self.parent_axis, self.dtype), self.stored[0, 0]
        return linear if linear.is_contiguous() else MEMORY.get(self.raw, name, lambda _: linear.contiguous())

    def rows(self, values: Tensor) -> Tensor:
        """As in :class:`StepTable`."""
        return self.raw.detach().movedim(self.parent_axis, 0)[values].to(self.dtype)

    def given(self, children: Tensor) -> Tensor:
        """As in :class:`StepTable`; from the linear form where that is rounded, as products are."""
        log = self.raw.detach().movedim(self.parent_axis, -1)[children].to(self.dtype)
        if self.stored.dtype == self.dtype:
            return log
        linear = self.stored[0, 0][children].to(self.dtype)
        return torch.where(linear > 0, linear.log() + self.scale[0, 0], log)

    @cached_property
    def _kept(self) -> tuple[Tensor, Tensor]:
        axis, dtype = self.parent_axis, self.dtype
        return MEMORY.get(self.raw, ("linear", axis, dtype), lambda raw: _scaled(raw, axis, dtype))

    def _placed(self, table: Tensor) -> Tensor:
        return table[None, None].movedim(2 + self.parent_axis, -1)


def _scaled(raw: Tensor, axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Largest entry for each parent value, (parent,), and exp(raw - largest), laid out like raw."""
    others = tuple(d for d in range(raw.dim()) if d != axis)
    top = raw.amax(others, keepdim=True).to(dtype)
    top = torch.where(torch.isfinite(top), top, 0.0)
    if raw.dtype != torch.bfloat16 or dtype != torch.float32:
        return top.flatten(), (raw.to(dtype) - top).exp_()
    result, each = torch.empty_like(raw), max(1, ROWS * raw.shape[0] // raw.numel())
    for start in range(0, raw.shape[0], each):
        some = slice(start, start + each)
        part = raw[some].to(dtype)
        result[some] = part.sub_(top[some] if axis == 0 else top).exp_()
    return top.flatten(), result
