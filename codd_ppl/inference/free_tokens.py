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
    """Free tokens and their emission tables: one for all of them, or one for each token of the group.

    Attributes:
        free: (*batch, tokens) bool.
        where: places of the rows among all, batch and tokens flattened; some may be known after all.
        log: evidence of all, (batch * tokens, vocab).
        table: the emission tables, (1, tokens or 1, vocab, states).
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
        every = table.scale.shape[1] > 1 or free.device.type != "cpu"
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
        linear = self.table.stored[0]
        if len(linear) == 1:
            return times(self.weights, linear[0]), self._top
        rows = self.weights.unflatten(0, (-1, len(linear)))
        return torch.einsum("btv,tvh->bth", rows, linear).flatten(0, 1), self._top

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
        linear = self.table.stored[0]
        if len(linear) == 1:
            return transposed_times(states, linear[0]) * self.weights
        rows = states.unflatten(0, (-1, len(linear)))
        return torch.einsum("bth,tvh->btv", rows, linear).flatten(0, 1) * self.weights

    def draw(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """Values given the latents' (draws, rows)."""
        # A row that is known and impossible has no value; it is not used.
        return draw_rows(self.table.stored[0].detach(), states, self.log.detach(), self.where, generator)
