"""The tree sweep's way up: beliefs from leaves to roots (Pearl 1988), batched over the messages of a level."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import PotentialsError
from codd_ppl.inference.max_scan import MaxScan
from codd_ppl.inference.scan import UpScan
from codd_ppl.inference.semirings import LogSemiring, MaxSemiring, safe_logsumexp
from codd_ppl.inference.tables import Tables, index, picked
from codd_ppl.inference.transforms import transforming

__all__ = ["Upward", "added", "attempts", "upward"]


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
        for source, targets, places in _sources(self.plan, names, without, before, self.scanning):
            whole = self.scans[source].messages if source in self.scans else self.message(source)
            total = added(total, targets, picked(whole, places))
        return total

    def log_partition(self) -> Tensor:
        """Log of the sum over all assignments, (batch or 1); the scales are added once, in float64."""
        tables = self.tables
        # Where nothing is differentiated, the gradient at an impossible assignment does not matter.
        plain = not ((torch.is_grad_enabled() and tables.differentiable) or transforming())
        log_sum = torch.logsumexp if plain else safe_logsumexp
        roots = [log_sum(self.belief(r), -1)[:, None] for r in self.plan.roots]
        several = roots if len(roots) == 1 else torch.broadcast_tensors(*roots)
        total = _summed(list(several))
        for group in _by_batch(list(self.offsets.values())):
            total = total + _summed(group)
        return total.to(tables.dtype)


@lru_cache(maxsize=256)
def _sources(
    plan: ContractionPlan, names: tuple[str, ...], without: int | None, before: int | None, scanning: bool
) -> tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]:
    """Where the messages to some variables come from.

    (step, or first step of a run; for each message the place of its variable among the names; its place in the step).
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for i, name in enumerate(names):
        for step, place in plan.below[name]:
            if step == without or (before is not None and step >= before):
                continue
            source, place = plan.run_of.get(step, (step, place)) if scanning else (step, place)
            found.setdefault(source, []).append((i, place))
    return tuple(
        (source, tuple(i for i, _ in pairs), tuple(place for _, place in pairs))
        for source, pairs in found.items()
    )


def added(total: Tensor, targets: tuple[int, ...], messages: Tensor) -> Tensor:
    """``total`` (batch, variables, n) plus each message (batch, messages, n) at its target."""
    if targets == tuple(range(total.shape[1])):
        return total + messages
    batch = max(total.shape[0], messages.shape[0]) if total.shape[0] and messages.shape[0] else 0
    total, messages = total.expand(batch, -1, -1), messages.expand(batch, -1, -1)
    return total.index_add(1, index(targets, total.device), messages)


def _summed(parts: list[Tensor]) -> Tensor:
    """Sum over the messages of all parts (batch, messages), in float64."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return whole.sum(1, dtype=torch.float64)


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
    for semiring in attempts(tables.plan):
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


def attempts(plan: ContractionPlan) -> list[LogSemiring]:
    """The fast routes, fastest first, and log space, which is always right."""
    if transforming():
        return [LogSemiring(fast=False)]
    often = [LogSemiring(fast=True, stride=1)] if plan.runs else []
    return [LogSemiring(fast=True), *often, LogSemiring(fast=False)]


def _finite(total: Tensor) -> bool:
    return transforming() or bool((total < torch.inf).all())
