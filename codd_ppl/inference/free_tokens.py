"""The tokens of a group that are not known, as rows of evidence over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from codd_ppl.inference.products import absorb_rows, draw_rows, times, transposed_times
from codd_ppl.inference.step_tables import StepTable

__all__ = ["FreeTokens"]


@dataclass(frozen=True)
class FreeTokens:
    """Free tokens and their emission tables: one for all of them, one for each token of the group, or one for each
    token of each batch element.

    Attributes:
        free: (*batch, tokens) bool.
        where: places of the rows among all, batch and tokens flattened; some may be known after all.
        log: evidence of all, (batch * tokens, vocab).
        table: the emission tables, (batch or 1, tokens or 1, vocab, states).
    """

    free: Tensor
    where: Tensor
    log: Tensor
    table: StepTable

    @classmethod
    def of(cls, known: Tensor, log: Tensor, table: StepTable) -> FreeTokens:
        """From what is known (*batch, tokens) and the evidence (*batch, tokens, vocab), which counts where it isn't."""
        free = ~known
        # On a GPU counting them would stall the queue, and tables of their own are multiplied token by token.
        every = table.scale.shape[:2] != (1, 1) or free.device.type != "cpu"
        where = torch.arange(free.numel(), device=free.device) if every else free.reshape(-1).nonzero()[:, 0]
        return cls(free, where, log.reshape(-1, log.shape[-1]), table)

    @cached_property
    def _rows(self) -> Tensor:
        return self.log if len(self.where) == len(self.log) else self.log[self.where]

    @cached_property
    def _top(self) -> Tensor:
        top = self._rows.detach().amax(-1, keepdim=True)
        return torch.where(torch.isfinite(top), top, 0.0)

    @cached_property
    def weights(self) -> Tensor:
        """exp of the evidence, each row's largest entry 1, (rows, vocab)."""
        return (self._rows - self._top).exp()

    @cached_property
    def _product(self) -> tuple[Tensor, Tensor]:
        recorded = self.table.recorded or (torch.is_grad_enabled() and self.log.requires_grad)
        if self.table.single and not recorded:
            every = len(self.where) == len(self.log)
            return absorb_rows(self.log, self.table.stored[0, 0], None if every else self.where)
        linear = self.table.stored
        if linear.shape[:2] == (1, 1):
            return times(self.weights, linear[0, 0]), self._top
        if len(linear) > 1:
            rows = self.weights.reshape(len(linear), -1, 1, self.log.shape[-1])
            return (rows @ linear).flatten(0, 2), self._top
        rows = self.weights.unflatten(0, (-1, linear.shape[1]))
        return torch.einsum("btv,tvh->bth", rows, linear[0]).flatten(0, 1), self._top

    @property
    def product(self) -> Tensor:
        """Weights times the emission tables, (rows, states)."""
        return self._product[0]

    @property
    def top(self) -> Tensor:
        """log of what was taken out of the weights, (rows, 1)."""
        return self._product[1]

    def back(self, states: Tensor) -> Tensor:
        """(rows, states) times the transposed tables and the weights: (rows, vocab)."""
        linear = self.table.stored
        if linear.shape[:2] == (1, 1):
            return transposed_times(states, linear[0, 0]) * self.weights
        if len(linear) > 1:
            rows = states.reshape(len(linear), -1, states.shape[-1], 1)
            return (linear @ rows).reshape(self.weights.shape) * self.weights
        rows = states.unflatten(0, (-1, linear.shape[1]))
        return torch.einsum("bth,tvh->btv", rows, linear[0]).flatten(0, 1) * self.weights

    def draw(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """Values given the latents' (draws, rows)."""
        # A row that is known and impossible has no value; it is not used.
        tables = self.table.stored.detach()
        tables = tables.expand(-1, self.free.shape[-1], -1, -1) if len(tables) > 1 else tables
        return draw_rows(tables.flatten(0, 1), states, self.log.detach(), self.where, generator)
