"""The tree sweep's way down: messages from roots to leaves, and what every variable and factor then believes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.inference.scan import DownScan, UpScan
from codd_ppl.inference.semirings import LogSemiring, log_joint, log_normalized, safe_logsumexp
from codd_ppl.inference.tables import StepTable, picked
from codd_ppl.inference.tree import Upward, added, attempts

__all__ = ["Downward", "outside"]

T = TypeVar("T")

FEW = 8
"""Up to so many messages of a variable are added up anew for each one that is left out."""


class Downward:
    """Roots to leaves: for every factor the outside message at its parent; for every child the message to it.

    Args:
        up: the upward pass.
        semiring: fast or not.
        wanted: names of the factors whose marginals will be asked for.
        weight: of each batch element in these marginals, None: 1.
    """

    def __init__(
        self,
        up: Upward,
        semiring: LogSemiring,
        wanted: frozenset[str] = frozenset(),
        weight: Tensor | None = None,
    ) -> None:
        self.up, self.plan, self.tables, self.semiring = up, up.plan, up.tables, semiring
        self.wanted, self.weight = wanted, weight
        self.fast = semiring.fast
        self._outside: dict[str, list[Tensor]] = {}
        self._to_children: dict[tuple[int, int], Tensor] = {}
        self._outer: dict[int, Tensor] = {}
        self._scans: dict[int, DownScan] = {}
        self._marginals: dict[tuple[str, ...], Tensor] = {}
        self.step_marginals: dict[tuple[int, bool], Tensor] = {}  # kept here by counts.py

    def scan(self, index: int) -> tuple[DownScan, int] | None:
        """The scan that runs a step downward, with the step's place in it; None where no scan does."""
        found = self.up.scan(index) if self.fast else None
        if found is None:
            return None
        up, place = found
        assert isinstance(up, UpScan)
        run = up.run
        if run.start not in self._scans:
            last = self._outer_of(run.stop - 1)[:, 0]
            edges = not self.wanted.isdisjoint(self.plan.run_factors[run.start])
            self._scans[run.start] = DownScan(up, last, self.semiring, edges, self.weight)
        return self._scans[run.start], place

    def outer(self, index: int) -> Tensor:
        """What the parents of a step believe without that step's own messages, (batch, messages, parent)."""
        if index not in self._outer:
            found = self.scan(index)
            if found is not None and index + 1 < found[0].up.run.stop:
                self._outer[index] = found[0].outer(found[1])
            else:
                self._outer[index] = self._outer_of(index)
        return self._outer[index]

    def _outer_of(self, index: int) -> Tensor:
        names = [m.parent for m in self.plan.steps[index].messages]
        if len(set(names)) == len(names) and all(len(self.plan.below[v]) <= FEW for v in names):
            return self._from_above(tuple(names), self.up.stacked(tuple(names), without=index))
        parts = []
        for g, name in enumerate(names):
            parts.append(self._without_each(name)[self.plan.below[name].index((index, g))])
        return torch.stack(torch.broadcast_tensors(*parts), dim=1)

    def _from_above(self, names: tuple[str, ...], total: Tensor) -> Tensor:
        """``total`` with the messages from the variables' parent factors, (batch, len(names), cardinality)."""
        for step, child, targets, places in _above(self.plan, names, self.fast and self.up.scanning):
            found = self.scan(step)
            whole = self.to_children(step, child) if found is None else found[0].messages
            total = added(total, targets, picked(whole, places))
        return total

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
            found = self.scan(index)
            if found is not None:
                message = found[0].message(found[1])
            else:
                step, beliefs = self.plan.steps[index], self.up.children(index)
                message = self.semiring.down(step, self.tables.step(index), self.outer(index), beliefs, child)
            self._to_children[index, child] = message
        return self._to_children[index, child]

    def message_to(self, name: str) -> Tensor:
        """The message from the variable's parent factor, (batch, cardinality)."""
        s, g, c = self.plan.above[name]
        return self.to_children(s, c)[:, g]

    def run(self) -> None:
        """Messages to all inner variables, roots first, so that the lazy accessors never recurse along a deep tree."""
        s = len(self.plan.steps)
        while s > 0:
            s -= 1
            found = self.scan(s)
            if found is not None:
                s = found[0].up.run.start
                continue
            for c in range(len(self.plan.steps[s].shape) - 1):
                if any(self.plan.below[m.children[c]] for m in self.plan.steps[s].messages):
                    self.to_children(s, c)

    def marginal(self, names: tuple[str, ...]) -> Tensor:
        """Normalised log-marginals of variables of one cardinality, (batch, len(names), cardinality).

        Rows whose evidence is infeasible come out as -inf throughout.
        """
        if names not in self._marginals:
            total = self._from_above(names, self.up.stacked(names))
            self._marginals[names] = log_normalized(total, -1)
        return self._marginals[names]

    def probabilities(self, names: tuple[str, ...]) -> Tensor:
        """Marginals of variables of one cardinality, (batch or 1, len(names), cardinality); 0 where infeasible."""
        found = _on_one_run(self.plan, names) if self.fast else None
        scan = None if found is None else self.scan(found[0])
        if found is None or scan is None:
            return self.marginal(names).exp()
        return picked(scan[0].marginals, found[1])

    def weights(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Children's and parent's linear weights whose outer product with the linear table is the factor marginal.

        For a pairwise step: child (batch, messages, n), parent (batch, messages, m) and the log of the largest weight,
        which must stay moderate for the product to be accurate.
        """
        (child,), table = self.up.children(index), self.tables.step(index)
        outer, message = self.outer(index), self.up.message(index)
        outer = outer + table.scale
        top = outer.detach().amax(-1, keepdim=True)
        outer = outer - torch.where(torch.isfinite(top), top, 0.0)
        # Both sums are taken relative to the largest terms, so that large log-potentials cost no digits here.
        weight = -safe_logsumexp(outer + (message - table.scale), -1)[..., None]
        weight = torch.where(weight == torch.inf, -torch.inf, weight)
        offset = self.up.offset(index)[..., None]
        return (child - offset).exp() * weight.exp(), outer.exp(), weight

    def log_factor_marginal(self, index: int, message: int | None = None) -> Tensor:
        """Normalised log joint of a step's factors, (batch, messages, *children, parent); -inf where infeasible.

        With ``message`` only that one, without the messages dimension.
        """
        children, outer, table = self.up.children(index), self.outer(index), self.tables.step(index)
        if message is not None:
            pick = slice(message, message + 1)
            table = StepTable(table.log if table.log.shape[1] == 1 else table.log[:, pick])
            children, outer = [c[:, pick] for c in children], outer[:, pick]
        log = log_joint(table, children, outer)
        log = log_normalized(log, tuple(range(2, log.dim())))
        return log if message is None else log[:, 0]


@lru_cache(maxsize=256)
def _above(
    plan: ContractionPlan, names: tuple[str, ...], scanning: bool
) -> tuple[tuple[int, int, tuple[int, ...], tuple[int, ...]], ...]:
    """Where the messages from the parent factors of some variables come from.

    (step, or first step of a run; child axis; places among the names of the variables that get them; theirs in it).
    """
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, name in enumerate(names):
        if name in plan.above:
            step, place, child = plan.above[name]
            step, place = plan.run_of.get(step, (step, place)) if scanning else (step, place)
            found.setdefault((step, child), []).append((i, place))
    return tuple(
        (step, child, tuple(i for i, _ in pairs), tuple(place for _, place in pairs))
        for (step, child), pairs in found.items()
    )


@lru_cache(maxsize=256)
def _on_one_run(plan: ContractionPlan, names: tuple[str, ...]) -> tuple[int, tuple[int, ...]] | None:
    """First step of the run that holds all of these variables, and their places on it."""
    for run in plan.runs:
        places = {name: i for i, name in enumerate(run.variables)}
        if all(name in places for name in names):
            return run.start, tuple(places[name] for name in names)
    return None


def outside(
    up: Upward,
    query: Callable[[Downward], T],
    wanted: frozenset[str] = frozenset(),
    weight: Tensor | None = None,
) -> T:
    """Run a query on the downward pass, fast where provably safe, otherwise again in log space.

    Args:
        up: the upward pass.
        query: reads its result off the downward pass.
        wanted, weight: as in :class:`Downward`.
    """
    semirings = attempts(up.plan) if getattr(up.semiring, "fast", False) else [LogSemiring(fast=False)]
    for semiring in semirings:
        down = Downward(up, semiring, wanted, weight)
        down.run()
        result = query(down)
        if semiring.safe():
            break
    return result
