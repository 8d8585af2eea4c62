"""The tree sweep: beliefs upward, messages downward (Pearl 1988), batched over the messages of a level."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from codd_ppl.errors import PotentialsError
from codd_ppl.inference.semirings import LogSemiring, MaxSemiring, log_joint, log_normalized, safe_logsumexp
from codd_ppl.inference.tables import StepTable, Tables

T = TypeVar("T")

__all__ = ["Downward", "Upward", "outside", "upward"]


class Upward:
    """Leaves to roots: what every variable believes from the evidence at and below it.

    Attributes:
        messages: per step (batch, messages, parent), each with its largest scale taken out.
        children: per step and child axis, the beliefs (batch, messages, child) that went in.
        beliefs: variable -> (batch or 1, cardinality), evidence times messages from below.
    """

    def __init__(self, tables: Tables, semiring: LogSemiring | MaxSemiring) -> None:
        self.tables, self.plan, self.semiring = tables, tables.plan, semiring
        self.messages: list[Tensor] = []
        self.offsets: list[Tensor] = []
        self.children: list[list[Tensor]] = []
        self._slices: list[tuple[Tensor, ...]] = []
        for index, step in enumerate(self.plan.steps):
            names = [tuple(m.children[c] for m in step.messages) for c in range(len(step.shape) - 1)]
            beliefs = [self.stacked(group) for group in names]
            message, offset = semiring.up(step, tables.step(index), beliefs)
            self.children.append(beliefs)
            self.messages.append(message)
            self.offsets.append(offset)
            self._slices.append(message.unbind(1))

    def incoming(self, name: str) -> list[Tensor]:
        """Messages from a variable's child factors, (batch, cardinality) each."""
        return [self._slices[s][g] for s, g in self.plan.below[name]]

    def belief(self, name: str) -> Tensor:
        """Evidence times all messages from below, (batch or 1, cardinality)."""
        parts = self.incoming(name)
        evidence = self.tables.evidence((name,))[:, 0]
        return sum(parts, evidence)

    def stacked(self, names: tuple[str, ...]) -> Tensor:
        """Beliefs of several variables of one cardinality, (batch or 1, len(names), cardinality)."""
        if not any(self.plan.below[v] for v in names):
            return self.tables.evidence(names)
        if len(names) == 1:
            return self.belief(names[0])[:, None]
        return torch.stack(torch.broadcast_tensors(*[self.belief(v) for v in names]), dim=1)

    def log_partition(self) -> Tensor:
        """Log of the sum over all assignments, (batch or 1); the scales are added once, in float64."""
        tables = self.tables
        roots = [safe_logsumexp(self.belief(r), -1)[:, None] for r in self.plan.roots]
        parts = torch.cat(torch.broadcast_tensors(*roots), dim=1).double().sum(1)
        for group in (torch.cat(t, 1) for t in _by_batch(self.offsets)):
            parts = parts + group.double().sum(1)
        return parts.to(tables.dtype)


def _by_batch(tensors: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[int, list[Tensor]] = {}
    for t in tensors:
        groups.setdefault(t.shape[0], []).append(t)
    return list(groups.values())


def upward(tables: Tables) -> tuple[Upward, Tensor]:
    """Sum-product upward pass and its log-partition (batch or 1), fast where that is provably safe.

    Raises:
        PotentialsError: the log-potentials hold NaN or +inf; the message names the key.
    """
    result = Upward(tables, LogSemiring(fast=True))
    total = result.log_partition()
    if not (result.semiring.safe() and _finite(total)):
        result = Upward(tables, LogSemiring(fast=False))
        total = result.log_partition()
        if not _finite(total):
            raise PotentialsError(
                f"log_potentials must be finite or -inf: {tables.bad_entries()}. "
                "-inf means impossible; replace NaN and +inf before the call"
            )
    return result, total


def _finite(total: Tensor) -> bool:
    return bool((total < torch.inf).all())


class Downward:
    """Roots to leaves: for every factor the outside message at its parent; for every child the message to it."""

    def __init__(self, up: Upward, semiring: LogSemiring) -> None:
        self.up, self.plan, self.tables, self.semiring = up, up.plan, up.tables, semiring
        self._outside: dict[str, list[Tensor]] = {}
        self._to_children: dict[tuple[int, int], Tensor] = {}
        self._outer: dict[int, Tensor] = {}

    def outer(self, index: int) -> Tensor:
        """What the parents of a step believe without that step's own messages, (batch, messages, parent)."""
        if index not in self._outer:
            parts = []
            for g, message in enumerate(self.plan.steps[index].messages):
                place = self.plan.below[message.parent].index((index, g))
                parts.append(self._without_each(message.parent)[place])
            one = len(parts) == 1
            self._outer[index] = (
                parts[0][:, None] if one else torch.stack(torch.broadcast_tensors(*parts), dim=1)
            )
        return self._outer[index]

    def _without_each(self, name: str) -> list[Tensor]:
        """The variable's belief with each of its incoming messages left out, by running sums from both ends."""
        if name not in self._outside:
            base = self.tables.evidence((name,))[:, 0]
            if name in self.plan.above:
                base = base + self.message_to(name)
            incoming = self.up.incoming(name)
            left = [base]
            for message in incoming[:-1]:
                left.append(left[-1] + message)
            right: Tensor | None = None
            for i in range(len(incoming) - 1, -1, -1):
                own = incoming[i]
                left[i] = left[i] if right is None else left[i] + right
                right = own if right is None else right + own
            self._outside[name] = left
        return self._outside[name]

    def to_children(self, index: int, child: int) -> Tensor:
        """Messages of a step to its children on one axis, (batch, messages, child)."""
        if (index, child) not in self._to_children:
            step, beliefs = self.plan.steps[index], self.up.children[index]
            message = self.semiring.down(step, self.tables.step(index), self.outer(index), beliefs, child)
            self._to_children[index, child] = message
        return self._to_children[index, child]

    def message_to(self, name: str) -> Tensor:
        """The message from the variable's parent factor, (batch, cardinality)."""
        s, g, c = self.plan.above[name]
        return self.to_children(s, c)[:, g]

    def run(self) -> None:
        """Messages to all inner variables, roots first, so that the lazy accessors never recurse along a deep tree."""
        for s in range(len(self.plan.steps) - 1, -1, -1):
            for c in range(len(self.plan.steps[s].shape) - 1):
                if any(self.plan.below[m.children[c]] for m in self.plan.steps[s].messages):
                    self.to_children(s, c)

    def marginal(self, names: tuple[str, ...]) -> Tensor:
        """Normalised log-marginals of variables of one cardinality, (batch, len(names), cardinality).

        Rows whose evidence is infeasible come out as -inf throughout.
        """
        where = [self.plan.above.get(v) for v in names]
        first = where[0]
        if first is not None and names == tuple(
            m.children[first[2]] for m in self.plan.steps[first[0]].messages
        ):
            log = self.up.children[first[0]][first[2]] + self.to_children(first[0], first[2])
        else:
            parts = [
                self.up.belief(v) + (self.message_to(v) if above is not None else 0.0)
                for v, above in zip(names, where, strict=True)
            ]
            log = torch.stack(torch.broadcast_tensors(*parts), dim=1)
        return log_normalized(log, -1)

    def weights(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Children's and parent's linear weights whose outer product with the linear table is the factor marginal.

        For a pairwise step: child (batch, messages, n), parent (batch, messages, m) and the log of the largest weight,
        which must stay moderate for the product to be accurate.
        """
        (child,), table = self.up.children[index], self.tables.step(index)
        outer, message = self.outer(index), self.up.messages[index]
        outer = outer + table.scale
        top = outer.detach().amax(-1, keepdim=True)
        outer = outer - torch.where(torch.isfinite(top), top, 0.0)
        # Both sums are taken relative to the largest terms, so that large log-potentials cost no digits here.
        weight = -safe_logsumexp(outer + (message - table.scale), -1)[..., None]
        weight = torch.where(weight == torch.inf, -torch.inf, weight)
        offset = self.up.offsets[index][..., None]
        return (child - offset).exp() * weight.exp(), outer.exp(), weight

    def log_factor_marginal(self, index: int, message: int | None = None) -> Tensor:
        """Normalised log joint of a step's factors, (batch, messages, *children, parent); -inf where infeasible.

        With ``message`` only that one, without the messages dimension.
        """
        children, outer, table = self.up.children[index], self.outer(index), self.tables.step(index)
        if message is not None:
            pick = slice(message, message + 1)
            table = StepTable(table.log if table.log.shape[1] == 1 else table.log[:, pick])
            children, outer = [c[:, pick] for c in children], outer[:, pick]
        log = log_joint(table, children, outer)
        log = log_normalized(log, tuple(range(2, log.dim())))
        return log if message is None else log[:, 0]


def outside(up: Upward, query: Callable[[Downward], T]) -> T:
    """Run a query on the downward pass, fast where provably safe, otherwise again in log space."""
    fast = LogSemiring(fast=getattr(up.semiring, "fast", False))
    down = Downward(up, fast)
    down.run()
    result = query(down)
    if fast.safe():
        return result
    down = Downward(up, LogSemiring(fast=False))
    down.run()
    return query(down)
