"""Loopy belief propagation: the approximation behind ``compile(graph, approximate=LoopyBeliefPropagation(...))``.

Every factor f sends every variable v of its scope

    m_fv(x_v) = sum over the rest of psi_f(x_f) prod_{u in f, u != v} n_uf(x_u)
    n_vf(x_v) = e_v(x_v) prod_{g != f} m_gv(x_v)

all at once, round after round (Pearl 1988; Murphy, Weiss and Jordan 1999). At the end

    log Z_Bethe = sum_f log Z_f + sum_v log Z_v - sum_{(f, v)} log Z_fv

with Z_f = sum psi_f prod n_vf, Z_v = sum e_v prod m_fv and Z_fv = sum m_fv n_vf (Yedidia, Freeman and Weiss 2005),
exact on forests. Only torch operations on the way, so gradients go through the rounds.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan, LoopyBeliefPropagation
from codd_ppl.errors import ConvergenceWarning, InfeasibleError, IntractableError
from codd_ppl.inference.cliques import require_proper, table
from codd_ppl.inference.semirings import log_normalized, safe_logsumexp
from codd_ppl.inference.tables import Key, Tables
from codd_ppl.typing import Bool, Float, LogPotentials

__all__ = ["LoopyResult", "belief_propagation", "log_partition", "marginals", "require_exact"]


@dataclass(frozen=True)
class LoopyResult:
    """What the rounds ended with.

    Attributes:
        log_partition: (*batch) nats, the Bethe approximation; -inf where no assignment is possible at some factor.
        marginals: beliefs by key, as of :func:`codd_ppl.inference.marginals`; NaN-free, 0 where infeasible.
        residual: (*batch), the largest change of a message in the last round, as probabilities and before damping.
        iterations: rounds that were run.
        converged: (*batch), whether the residual is within the tolerance.
    """

    log_partition: Float[Tensor, "*batch"]
    marginals: dict[Key, Tensor]
    residual: Float[Tensor, "*batch"]
    iterations: int
    converged: Bool[Tensor, "*batch"]


def require_exact(plan: ContractionPlan, query: str) -> None:
    """Raise IntractableError for a query that beliefs can't answer."""
    if plan.approximation is None:
        return
    instead = {
        "mode": "for the best value of each variable alone take marginals(plan, log_potentials)[name].argmax(-1)",
        "sample": "beliefs belong to no joint distribution that could be drawn from",
        "entropy": "beliefs belong to no joint distribution that would have one",
    }.get(query, "only log_partition, marginals and log_score are defined here")
    raise IntractableError(
        f"{query} is not defined for a plan compiled with approximate={plan.approximation}: {instead}. For an exact "
        "answer compile(graph) without approximate=; if that is refused, use fewer states or a topology with shorter "
        "loops"
    )


def belief_propagation(plan: ContractionPlan, log_potentials: LogPotentials) -> LoopyResult:
    """Run the rounds and report how they ended; a batch element is left alone once it has converged.

    Args:
        plan: compiled with ``approximate=LoopyBeliefPropagation(...)``.
        log_potentials: as in :func:`codd_ppl.inference.log_partition`.

    Raises:
        IntractableError: the plan is an exact one.
        PotentialsError: malformed log-potentials, NaN or +inf.
    """
    if plan.approximation is None:
        raise IntractableError(
            f"belief_propagation needs a plan compiled with approximate=LoopyBeliefPropagation(...), found the exact "
            f"route {plan.route!r}; use log_partition and marginals"
        )
    tables = Tables(plan, log_potentials)
    require_proper(tables)
    rounds = _Rounds(tables)
    residual, iterations = rounds.run(plan.approximation)
    residual = residual.expand(tables.batch).reshape(tables.batch_shape)
    bethe = rounds.bethe().expand(tables.batch).reshape(tables.batch_shape)
    beliefs = {
        key: value.expand(tables.batch, *value.shape[1:]).reshape(*tables.batch_shape, *value.shape[1:])
        for key, value in rounds.beliefs().items()
    }
    return LoopyResult(bethe, beliefs, residual, iterations, residual <= plan.approximation.tolerance)


def _warned(plan: ContractionPlan, log_potentials: LogPotentials) -> LoopyResult:
    result = belief_propagation(plan, log_potentials)
    if not bool(result.converged.all()):
        missed = int((~result.converged).sum())
        warnings.warn(
            f"loopy belief propagation did not converge for {missed} of {result.converged.numel()} batch elements in "
            f"{result.iterations} iterations: largest residual {float(result.residual.max()):.2g}, tolerance "
            f"{plan.approximation.tolerance if plan.approximation else 0:g}. Compile with more iterations or damping; "
            "inference.loopy.belief_propagation returns the residual of each element",
            ConvergenceWarning,
            stacklevel=4,
        )
    return result


def log_partition(plan: ContractionPlan, log_potentials: LogPotentials) -> Float[Tensor, "*batch"]:
    """Bethe approximation of log Z; warns (ConvergenceWarning) where it is no fixed point."""
    return _warned(plan, log_potentials).log_partition


def marginals(plan: ContractionPlan, log_potentials: LogPotentials) -> dict[Key, Float[Tensor, "..."]]:
    """Beliefs of every variable and given key; warns (ConvergenceWarning) where they are no fixed point.

    Raises:
        InfeasibleError: the messages prove that some batch element has no possible assignment.
    """
    result = _warned(plan, log_potentials)
    dead = (result.log_partition == -torch.inf).nonzero().tolist()
    if dead:
        raise InfeasibleError(
            f"batch element {tuple(dead[0])} and {len(dead) - 1} more have probability zero: no assignment is "
            "possible. Relax the evidence, or give factors finite entries where they are -inf"
        )
    return result.marginals


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


class _Rounds:
    """Messages of all factors, batched by shape; nothing is edited in place, so autograd can follow."""

    def __init__(self, tables: Tables) -> None:
        self.tables, self.plan, self.groups = tables, tables.plan, _groups(tables.plan)
        self.logs = [
            torch.stack(torch.broadcast_tensors(*[table(tables, n) for n in g.factors]), 1)
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
            if isinstance(key, tuple):
                result[key] = torch.stack(torch.broadcast_tensors(*[variables[v] for v in key]), 1)
            elif key not in plan.variable:
                names = tuple(n for n in plan.ties.get(key, (key,)) if n == key or n not in tables.raw)
                parts = [factors[n] for n in names]
                result[key] = sum(parts, torch.zeros_like(tables.flat(key)[:1]))
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
