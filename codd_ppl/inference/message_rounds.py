"""The messages of loopy belief propagation, round by round; the formulas stand in ``inference/loopy.py``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan, LoopyBeliefPropagation
from codd_ppl.inference.semirings import log_normalized, safe_logsumexp
from codd_ppl.inference.tables import Key, Tables

__all__ = ["Rounds"]


@dataclass(frozen=True)
class _Group:
    """Factors of one shape, and for each axis the places of their variables among those of that cardinality."""

    factors: tuple[str, ...]
    shape: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=128)
def _groups(plan: ContractionPlan) -> tuple[_Group, ...]:
    place = {v: i for names in plan.by_cardinality for i, v in enumerate(names)}
    found: dict[tuple[int, ...], list[str]] = {}
    for f in plan.factors:
        if f.order > 1:
            found.setdefault(tuple(plan.variable[v].cardinality for v in f.scope), []).append(f.name)
    return tuple(
        _Group(
            tuple(names),
            shape,
            tuple(tuple(place[plan.factor[n].scope[d]] for n in names) for d in range(len(shape))),
        )
        for shape, names in found.items()
    )


Messages = list[list[Tensor]]  # per group, per axis: (batch, factors, cardinality)


class Rounds:
    """Messages of all factors, batched by shape; nothing is edited in place, so autograd can follow."""

    def __init__(self, tables: Tables) -> None:
        self.tables, self.plan, self.groups = tables, tables.plan, _groups(tables.plan)
        self.logs = [
            torch.stack(torch.broadcast_tensors(*[tables.factor(n) for n in g.factors]), 1)
            for g in self.groups
        ]
        self.where = [[torch.tensor(p, device=tables.device) for p in group.places] for group in self.groups]
        self.evidence = {
            self.plan.variable[names[0]].cardinality: tables.evidence(names)
            for names in self.plan.by_cardinality
        }
        self.messages: Messages = [
            [torch.zeros(1, len(g.factors), n, dtype=tables.dtype, device=tables.device) for n in g.shape]
            for g in self.groups
        ]

    def run(self, settings: LoopyBeliefPropagation) -> tuple[Tensor, int]:
        """Send messages until all have converged: the last residual of each element, and the number of rounds."""
        done = torch.zeros(1, dtype=torch.bool, device=self.tables.device)
        residual = torch.zeros(1, dtype=self.tables.dtype, device=self.tables.device)
        count = 0
        for count in range(1, settings.iterations + 1):  # noqa: B007
            found = self.sent()
            now = self._change(found)
            residual = torch.where(done, residual, now)
            self.messages = [
                [_damped(old, new, settings.damping, done) for old, new in zip(a, b, strict=True)]
                for a, b in zip(self.messages, found, strict=True)
            ]
            done = done | (residual <= settings.tolerance)
            if bool(done.all()):
                break
        return residual, count

    def sent(self) -> Messages:
        """New messages from factors to variables, each with its largest entry scaled to 1."""
        result = []
        incoming = self.incoming()
        for log, inside in zip(self.logs, incoming, strict=True):
            axes = []
            for axis in range(len(inside)):
                joint = _joint(log, [m if d != axis else None for d, m in enumerate(inside)])
                rest = tuple(2 + d for d in range(len(inside)) if d != axis)
                axes.append(_scaled(safe_logsumexp(joint, rest)))
            result.append(axes)
        return result

    def incoming(self) -> Messages:
        """Messages from variables to factors: everything the variable knows but the factor's own message."""
        finite, zeros = self._totals()
        result = []
        for group, where, messages in zip(self.groups, self.where, self.messages, strict=True):
            axes = []
            for size, place, own in zip(group.shape, where, messages, strict=True):
                # -inf can't be subtracted, so impossible messages are counted instead.
                dead = own == -torch.inf
                rest = finite[size][:, place] - torch.where(dead, 0.0, own)
                blocked = zeros[size][:, place] - dead.to(rest.dtype) > 0
                axes.append(_scaled(torch.where(blocked, -torch.inf, rest)))
            result.append(axes)
        return result

    def _totals(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """By cardinality: sum of evidence and messages where finite, and how many are -inf, (batch, variables, n)."""
        finite, zeros = {}, {}
        for size, evidence in self.evidence.items():
            dead = evidence == -torch.inf
            finite[size], zeros[size] = torch.where(dead, 0.0, evidence), dead.to(evidence.dtype)
        for group, where, messages in zip(self.groups, self.where, self.messages, strict=True):
            for size, place, message in zip(group.shape, where, messages, strict=True):
                dead = message == -torch.inf
                finite[size] = _added(finite[size], place, torch.where(dead, 0.0, message))
                zeros[size] = _added(zeros[size], place, dead.to(message.dtype))
        return finite, zeros

    def totals(self) -> dict[int, Tensor]:
        """Unnormalised log-beliefs of the variables by cardinality, (batch or 1, variables, cardinality)."""
        finite, zeros = self._totals()
        return {size: torch.where(zeros[size] > 0, -torch.inf, finite[size]) for size in finite}

    def _change(self, found: Messages) -> Tensor:
        """Largest change of a message as probabilities, (batch or 1)."""
        gaps = [torch.zeros(1, dtype=self.tables.dtype, device=self.tables.device)]
        for a, b in zip(self.messages, found, strict=True):
            for old, new in zip(a, b, strict=True):
                gap = log_normalized(new.detach(), -1).exp() - log_normalized(old.detach(), -1).exp()
                gaps.append(gap.abs().amax((1, 2)))
        return torch.stack(torch.broadcast_tensors(*gaps)).amax(0)

    def bethe(self) -> Tensor:
        """log Z of the Bethe approximation, (batch or 1), summed in float64."""
        incoming = self.incoming()
        parts, possible = [], []
        for total in self.totals().values():
            parts.append(safe_logsumexp(total, -1).double())
        for log, inside, messages in zip(self.logs, incoming, self.messages, strict=True):
            joint = _joint(log, list(inside))
            parts.append(safe_logsumexp(joint, tuple(range(2, joint.dim()))).double())
            for own, rest in zip(messages, inside, strict=True):
                shared = safe_logsumexp(own + rest, -1).double()
                parts.append(-torch.where(shared == -torch.inf, 0.0, shared))
        sums = []
        for part in parts:
            dead = part == -torch.inf
            possible.append(~dead.any(1))
            sums.append(torch.where(dead, 0.0, part).sum(1))
        total = torch.stack(torch.broadcast_tensors(*sums)).sum(0)
        alive = torch.stack(torch.broadcast_tensors(*possible)).all(0)
        return torch.where(alive, total, -torch.inf).to(self.tables.dtype)

    def beliefs(self) -> dict[Key, Tensor]:
        """Marginals by key, (batch or 1, *event)."""
        tables, plan = self.tables, self.plan
        variables: dict[str, Tensor] = {}
        totals = self.totals()
        for names in plan.by_cardinality:
            belief = log_normalized(totals[plan.variable[names[0]].cardinality], -1).exp()
            variables.update(zip(names, belief.unbind(1), strict=True))
        factors: dict[str, Tensor] = {f.name: variables[f.scope[0]] for f in plan.factors if f.order == 1}
        for group, log, inside in zip(self.groups, self.logs, self.incoming(), strict=True):
            joint = _joint(log, list(inside))
            belief = log_normalized(joint, tuple(range(2, joint.dim()))).exp()
            factors.update(zip(group.factors, belief.unbind(1), strict=True))
        result: dict[Key, Tensor] = {}
        for key in tables.raw:
            users = tables.users([key])
            if isinstance(key, tuple):
                known = variables if key in tables.layout.blocks else {n: factors[n] for n in users}
                nothing = torch.zeros(1, *tables.shapes[key][1:], dtype=tables.dtype, device=tables.device)
                parts = [known.get(name, nothing) for name in key]
                result[key] = torch.stack(torch.broadcast_tensors(*parts), 1)
            elif key not in plan.variable:
                nothing = torch.zeros(1, *tables.shapes[key], dtype=tables.dtype, device=tables.device)
                result[key] = sum((factors[n] for n in plan.ties.get(key, (key,)) if n in users), nothing)
        return result | variables


def _joint(log: Tensor, inside: list[Tensor | None]) -> Tensor:
    for d, message in enumerate(inside):
        if message is not None:
            shape = [1] * len(inside)
            shape[d] = message.shape[-1]
            log = log + message.reshape(*message.shape[:2], *shape)
    return log


def _added(total: Tensor, place: Tensor, values: Tensor) -> Tensor:
    batch = values.shape[0] if total.shape[0] == 1 else total.shape[0]
    return total.expand(batch, -1, -1).index_add(1, place, values.expand(batch, -1, -1))


def _scaled(log: Tensor) -> Tensor:
    largest = log.detach().amax(-1, keepdim=True)
    return log - torch.where(torch.isfinite(largest), largest, 0.0)


def _damped(old: Tensor, new: Tensor, damping: float, done: Tensor) -> Tensor:
    """(1 - damping) new + damping old where both are finite, new elsewhere; old where the element has converged."""
    finite = (old != -torch.inf) & (new != -torch.inf)
    mixed = (1 - damping) * torch.where(finite, new, 0.0) + damping * torch.where(finite, old, 0.0)
    mixed = torch.where(finite, mixed, new)
    return torch.where(done[:, None, None], old, mixed)
