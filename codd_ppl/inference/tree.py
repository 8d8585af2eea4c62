"""The tree sweep: beliefs upward, messages downward (Pearl 1988), batched over the messages of a level."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import PotentialsError
from codd_ppl.inference.max_scan import MaxScan
from codd_ppl.inference.scan import DownScan, UpScan
from codd_ppl.inference.semirings import LogSemiring, MaxSemiring, log_joint, log_normalized, safe_logsumexp
from codd_ppl.inference.tables import StepTable, Tables, picked
from codd_ppl.inference.transforms import transforming

T = TypeVar("T")

FEW = 8
"""Up to so many messages of a variable are added up anew for each one that is left out."""

__all__ = ["Downward", "Upward", "outside", "upward"]


class Upward:
    """Leaves to roots: what every variable believes from the evidence at and below it.

    Paths run as scans (:mod:`codd_ppl.inference.scan`) where the semiring is the fast one, other steps one by one.

    Attributes:
        offsets: first step of a run or other step -> log scales taken out of the messages, (batch or 1, messages).
        scans: first step of a run -> its scan.
    """

    def __init__(self, tables: Tables, semiring: LogSemiring | MaxSemiring) -> None:
        self.tables, self.plan, self.semiring = tables, tables.plan, semiring
        steps = len(self.plan.steps)
        self.offsets: dict[int, Tensor] = {}
        self.scans: dict[int, UpScan | MaxScan] = {}
        self._messages: list[Tensor | None] = [None] * steps
        self._children: list[list[Tensor] | None] = [None] * steps
        self._slices: dict[int, tuple[Tensor, ...]] = {}
        self.scanning = bool(self.plan.runs) and (isinstance(semiring, MaxSemiring) or semiring.fast)
        self.scanning = self.scanning and not transforming()
        runs = {run.start: run for run in self.plan.runs} if self.scanning else {}
        index = 0
        while index < steps:
            if index in runs:
                run = runs[index]
                base = self.stacked(run.variables[:-1], before=index)
                scan = (
                    MaxScan(tables, run, base)
                    if isinstance(semiring, MaxSemiring)
                    else UpScan(tables, run, base, semiring)
                )
                self.scans[index] = scan
                self.offsets[index] = scan.offset
                index = run.stop
                continue
            step = self.plan.steps[index]
            beliefs = self.children(index)
            message, offset = semiring.up(step, tables.step(index), beliefs)
            self._messages[index] = message
            self.offsets[index] = offset
            index += 1

    def scan(self, index: int) -> tuple[UpScan | MaxScan, int] | None:
        """The scan that runs a step, with the step's place in it; None where no scan does."""
        where = self.plan.run_of.get(index)
        return None if where is None or where[0] not in self.scans else (self.scans[where[0]], where[1])

    def message(self, index: int) -> Tensor:
        """Messages of a step, (batch or 1, messages, parent), each with its largest scale taken out."""
        known = self._messages[index]
        if known is None:
            found = self.scan(index)
            assert found is not None
            known = self._messages[index] = found[0].message(found[1])
        return known

    def offset(self, index: int) -> Tensor:
        """The log scale that was taken out of each message of a step, (batch or 1, messages)."""
        found = self.scan(index)
        return self.offsets[index] if found is None else found[0].offset[:, found[1], None]

    def children(self, index: int) -> list[Tensor]:
        """Per child axis of a step the beliefs (batch or 1, messages, child) that go in."""
        known = self._children[index]
        if known is None:
            found = self.scan(index)
            if found is not None:
                known = [found[0].child(found[1])]
            else:
                step = self.plan.steps[index]
                axes = range(len(step.shape) - 1)
                known = [self.stacked(tuple(m.children[c] for m in step.messages)) for c in axes]
            self._children[index] = known
        return known

    def incoming(self, name: str) -> list[Tensor]:
        """Messages from a variable's child factors, (batch, cardinality) each."""
        return [self._slice(s, g) for s, g in self.plan.below[name]]

    def _slice(self, step: int, place: int) -> Tensor:
        if step not in self._slices:
            self._slices[step] = self.message(step).unbind(1)
        return self._slices[step][place]

    def belief(self, name: str) -> Tensor:
        """Evidence times all messages from below, (batch or 1, cardinality)."""
        parts = self.incoming(name)
        evidence = self.tables.evidence((name,))[:, 0]
        return sum(parts, evidence)

    def stacked(
        self, names: tuple[str, ...], without: int | None = None, before: int | None = None
    ) -> Tensor:
        """Evidence times messages, (batch or 1, len(names), cardinality), for variables of one cardinality.

        Args:
            names: the variables.
            without: leave the messages of this step out.
            before: only messages of steps before this one.
        """
        total = self.tables.evidence(names)
        for source, places in _sources(self.plan, names, without, before, self.scanning):
            whole = self.scans[source].messages if source in self.scans else self.message(source)
            total = total + gathered(whole, places)
        return total

    def log_partition(self) -> Tensor:
        """Log of the sum over all assignments, (batch or 1); the scales are added once, in float64."""
        tables = self.tables
        roots = [safe_logsumexp(self.belief(r), -1)[:, None] for r in self.plan.roots]
        parts = torch.cat(torch.broadcast_tensors(*roots), dim=1).double().sum(1)
        for group in (torch.cat(t, 1) for t in _by_batch(list(self.offsets.values()))):
            parts = parts + group.double().sum(1)
        return parts.to(tables.dtype)


@lru_cache(maxsize=256)
def _sources(
    plan: ContractionPlan, names: tuple[str, ...], without: int | None, before: int | None, scanning: bool
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Where the messages to some variables come from: (step, or first step of a run) and each one's place in it.

    The place is -1 for a variable without such a message; a step comes twice if a variable gets two messages of it.
    """
    rounds: dict[tuple[int, int], list[int]] = {}
    for i, name in enumerate(names):
        count: dict[int, int] = {}
        for step, place in plan.below[name]:
            if step == without or (before is not None and step >= before):
                continue
            source, place = plan.run_of.get(step, (step, place)) if scanning else (step, place)
            nth = count[source] = count.get(source, -1) + 1
            rounds.setdefault((source, nth), [-1] * len(names))[i] = place
    return tuple((source, tuple(places)) for (source, _), places in rounds.items())


def gathered(whole: Tensor, places: tuple[int, ...]) -> Tensor:
    """Messages (batch, messages, n) at these places, 0 where the place is -1."""
    if -1 in places:
        whole = torch.cat((whole, torch.zeros_like(whole[:, :1])), dim=1)
        places = tuple(whole.shape[1] - 1 if p == -1 else p for p in places)
    return picked(whole, places)


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
    for semiring in _attempts(tables.plan):
        result = Upward(tables, semiring)
        total = result.log_partition()
        if semiring.safe() and _finite(total):
            return result, total
    if not _finite(total):
        raise PotentialsError(
            f"log_potentials must be finite or -inf: {tables.bad_entries()}. "
            "-inf means impossible; replace NaN and +inf before the call"
        )
    return result, total


def _attempts(plan: ContractionPlan) -> list[LogSemiring]:
    """The fast routes, fastest first, and log space, which is always right."""
    if transforming():
        return [LogSemiring(fast=False)]
    often = [LogSemiring(fast=True, stride=1)] if plan.runs else []
    return [LogSemiring(fast=True), *often, LogSemiring(fast=False)]


def _finite(total: Tensor) -> bool:
    return transforming() or bool((total < torch.inf).all())


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
        sources: dict[tuple[int, int], list[int]] = {}
        for i, name in enumerate(names):
            if name in self.plan.above:
                step, place, child = self.plan.above[name]
                found = self.scan(step)
                source, place = (step, place) if found is None else (found[0].up.run.start, found[1])
                sources.setdefault((source, child), [-1] * len(names))[i] = place
        for (source, child), places in sources.items():
            scan = self._scans.get(source)
            whole = scan.messages if scan is not None else self.to_children(source, child)
            total = total + gathered(whole, tuple(places))
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
        for s in range(len(self.plan.steps) - 1, -1, -1):
            if self.scan(s) is not None:
                continue
            for c in range(len(self.plan.steps[s].shape) - 1):
                if any(self.plan.below[m.children[c]] for m in self.plan.steps[s].messages):
                    self.to_children(s, c)

    def marginal(self, names: tuple[str, ...]) -> Tensor:
        """Normalised log-marginals of variables of one cardinality, (batch, len(names), cardinality).

        Rows whose evidence is infeasible come out as -inf throughout.
        """
        return log_normalized(self._from_above(names, self.up.stacked(names)), -1)

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
    semirings = _attempts(up.plan) if getattr(up.semiring, "fast", False) else [LogSemiring(fast=False)]
    for semiring in semirings:
        down = Downward(up, semiring, wanted, weight)
        down.run()
        result = query(down)
        if semiring.safe():
            break
    return result
