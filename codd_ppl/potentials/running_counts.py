"""The maximisation step: counts of one table, what they are smoothed with, and the table that follows from them.

    P(child | parent) = (count(parent, child) + prior(child)) / (their sum over children).

Counts are held by the child's value and up to a common factor, c = scale * held, so that averaging,
c <- (1 - step) c + step new, writes only what is new: a minibatch of n tokens changes n rows of a token table, not all
of its (vocab, states) entries.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from codd_ppl.errors import ShapeError
from codd_ppl.typing import Bool, Float, Int

__all__ = ["RunningCounts"]

SMALLEST = 1e-6
"""Of the common factor, before it is multiplied in."""


class RunningCounts:
    """Counts of one table of conditional probabilities.

    Args:
        counts: (*parents, child), not negative. Not kept.
        prior: added to every parent's counts, (child,).
        support: False for what is impossible and stays so, like the counts; None: everything is possible.
    """

    def __init__(
        self,
        counts: Float[Tensor, "*parents child"],
        prior: Float[Tensor, "child"],
        support: Bool[Tensor, "*parents child"] | None = None,
    ) -> None:
        if counts.dim() not in (1, 2) or counts.shape[-1:] != prior.shape:
            raise ShapeError(
                "expected counts (child,) or (parent, child) and a prior (child,), found "
                f"{tuple(counts.shape)} and {tuple(prior.shape)}"
            )
        self.held = counts.movedim(-1, 0).clone(memory_format=torch.contiguous_format)
        self.prior, self.support, self.scale = prior.to(counts), support, 1.0
        self._added = self.prior.reshape(-1, *[1] * (counts.dim() - 1))  # (child, *parents or 1)
        if support is not None:
            self._added = self._added * support.movedim(-1, 0).to(self._added)
        self.total = self.held.sum(0)  # over children, (*parents), without the common factor

    @property
    def dtype(self) -> torch.dtype:
        """Of the counts and the table."""
        return self.held.dtype

    def empty(self) -> RunningCounts:
        """The same without any counts."""
        zeros = self.held.new_zeros(()).expand(self.held.shape).movedim(0, -1)
        return RunningCounts(zeros, self.prior, self.support)

    def state(self) -> dict[str, Tensor]:
        """All that it is made of, as tensors; not copies."""
        scale = torch.tensor(self.scale, dtype=torch.float64)
        found = {"held": self.held, "total": self.total, "prior": self.prior, "scale": scale}
        return found if self.support is None else found | {"support": self.support}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> RunningCounts:
        """The counts whose :meth:`state` that is, to the last bit."""
        counts = cls(state["held"].movedim(0, -1), state["prior"], state.get("support"))
        counts.total, counts.scale = state["total"], float(state["scale"])
        return counts

    def decay(self, step: float) -> None:
        """Multiply all counts by 1 - step, 0 <= step < 1."""
        self.scale *= 1.0 - step
        if self.scale < SMALLEST:
            self.held *= self.scale
            self.scale = 1.0
            self.total = self.held.sum(0)

    def add(self, counts: Float[Tensor, "*parents child"], weight: float = 1.0) -> None:
        """Add counts of the whole table."""
        by_child = counts.movedim(-1, 0).clamp(min=0)
        self.held.add_(by_child, alpha=weight / self.scale)
        self.total = self.held.sum(0)

    def add_rows(
        self, tokens: Int[Tensor, "n"], rows: Float[Tensor, "n parent"], weight: float = 1.0
    ) -> None:
        """Add to the columns of some children; a child may occur several times."""
        rows = rows * (weight / self.scale)
        self.held.index_add_(0, tokens, rows)
        self.total = self.total + rows.sum(0)

    def table(self) -> Float[Tensor, "*parents child"]:
        """Log-probabilities of the children given each parent; uniform for one without counts and prior."""
        self.total = self.held.sum(0)
        log = self.held.mul(self.scale)
        log += self._added
        norm = self._norm()
        log = log.log_().sub_(norm)
        if bool((norm == -torch.inf).any()):
            log = torch.where(norm == -torch.inf, self._uniform, log)
        return log.movedim(0, -1).contiguous()

    def rows(self, tokens: Int[Tensor, "*n"]) -> Float[Tensor, "*n parent"]:
        """Columns log P(token | .) of the table."""
        log = self.held[tokens].mul_(self.scale).add_(self._added[tokens]).log_().sub_(self._norm())
        uniform = self._uniform if self.support is None else self._uniform[tokens]
        return torch.where(self._norm() == -torch.inf, uniform, log)

    def penalty(self) -> Float[Tensor, ""]:
        """sum over parents and children of prior(child) log P(child | parent): the log of a Dirichlet prior.

        0 where the prior is.
        """
        log = self.table().movedim(-1, 0)
        return torch.where(self._added > 0, self._added * log, 0.0).sum(dtype=torch.float64)

    def _norm(self) -> Tensor:
        return (self.total * self.scale + self._added.sum(0)).log()

    @property
    def _uniform(self) -> Tensor:
        if self.support is None:
            return -self.prior.new_tensor(float(len(self.prior))).log()
        possible = self.support.movedim(-1, 0).to(self.prior)
        return (possible / possible.sum(0)).log()
