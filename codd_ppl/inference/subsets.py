"""Subsets of the variables: their joint marginals, and log-probabilities of partial assignments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import IntractableError, ShapeError
from codd_ppl.inference import loopy
from codd_ppl.inference.evidence import condition, known_names, observed_values, used
from codd_ppl.inference.queries import log_partition
from codd_ppl.inference.sampling import mode
from codd_ppl.inference.tables import Key, Tables
from codd_ppl.inference.transforms import eager, transforming
from codd_ppl.typing import Assignment, Float, LogPotentials

__all__ = ["log_prob", "marginal", "require_possible"]

CHUNK = 1 << 23
"""Clamped copies are evaluated together up to so many entries of evidence and batched tables."""
LARGEST = 1 << 22
"""Marginals with more entries than this for each batch element are refused."""


@eager
def marginal(
    plan: ContractionPlan, log_potentials: LogPotentials, names: Sequence[str]
) -> Float[Tensor, "..."]:
    """Joint marginal probabilities of any subset S of the variables, the rest summed out (differentiable).

        p(x_S) = Z(S clamped) / Z

    All but the variable of S with most values are clamped, a chunk of their values at a time; an upward and a
    downward pass give the last one. Variables within one factor's scope need a single such pass.

    Args:
        plan, log_potentials: as in :func:`codd_ppl.inference.log_partition`.
        names: the variables, each once, in any order; none gives 1.

    Returns:
        (*batch, *cardinalities), in the order of ``names``.

    Raises:
        GraphError: a name is unknown or comes twice.
        IntractableError: the table would have more than ``LARGEST`` entries, or the plan is an approximation.
        PotentialsError, InfeasibleError: as in :func:`codd_ppl.inference.marginals`.
    """
    loopy.require_exact(plan, "marginal")
    names = known_names(plan, names, "marginal")
    tables = Tables(plan, log_potentials)
    cards = tuple(plan.variable[name].cardinality for name in names)
    if prod(cards) > LARGEST:
        raise IntractableError(
            f"the joint marginal of {len(names)} variables has {' x '.join(map(str, cards))} = {prod(cards):,} "
            f"entries, more than {LARGEST:,}; ask for fewer variables, for log_prob of the assignments that you need, "
            "or count in draws of sample"
        )
    if not names:
        total = log_partition(plan, log_potentials)
        require_possible(plan, log_potentials, total)
        return torch.ones_like(total)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tables.raw.values())
    # Marginals are gradients. Under no_grad and inference_mode they are asked for all the same, of tensors of our own.
    with torch.inference_mode(False), torch.enable_grad():
        own = tables.raw if differentiable else {k: _detached(t) for k, t in tables.raw.items()}
        own = used(plan, own)
        scope = _covering(plan, tables, names)
        if scope is not None:
            total, joint = _of_factor(plan, own, tables, scope, differentiable)
            found = plan.factor[scope].scope
        else:
            last = max(names, key=lambda name: plan.variable[name].cardinality)
            rest = tuple(name for name in names if name != last)
            total, joint = _of_clamped(plan, own, tables, rest, last, differentiable)
            found = (*rest, last)
        require_possible(plan, own, total)
        lead = joint.dim() - len(found)
        summed = [lead + i for i, name in enumerate(found) if name not in names]
        joint = joint.sum(summed) if summed else joint
        kept = [name for name in found if name in names]
        return joint.permute(*range(lead), *(lead + kept.index(name) for name in names))


def _detached(value: Tensor) -> Tensor:
    return value.clone() if value.is_inference() else value.detach()


def _covering(plan: ContractionPlan, tables: Tables, names: tuple[str, ...]) -> str | None:
    """A factor whose scope holds all names and whose table may be copied out of its tie; None for single names."""
    if len(names) < 2:
        return None
    for factor in plan.factors:
        if factor.order >= len(names) and set(names) <= set(factor.scope):
            # Factors of one tie share a table, unless one of them gets its own: then each of them has a copy.
            key, _ = tables.layout.source[factor.name]
            copies = len(plan.ties[factor.tie]) if factor.tie is not None and key == factor.tie else 1
            size = prod(plan.variable[name].cardinality for name in factor.scope)
            if copies * size * tables.batch <= CHUNK:
                return factor.name
    return None


def _of_factor(
    plan: ContractionPlan, own: dict[Key, Tensor], tables: Tables, name: str, differentiable: bool
) -> tuple[Tensor, Tensor]:
    """Log-partition (*batch), and the marginal of a factor's scope (*batch, *cardinalities) as its gradient."""
    factor = plan.factor[name]
    cards = [plan.variable[v].cardinality for v in factor.scope]
    probe = torch.zeros(*tables.batch_shape, *cards, dtype=tables.dtype, device=tables.device)
    key, place = tables.layout.source[name]
    table = own[key] if place is None else own[key].select(-1 - factor.order, place)
    return _with_gradient(
        lambda zero: log_partition(plan, used(plan, {**own, name: table + zero})), probe, differentiable
    )


def _with_gradient(
    function: Callable[[Tensor], Tensor], probe: Tensor, differentiable: bool
) -> tuple[Tensor, Tensor]:
    """Values of a function, and the gradient of their sum."""
    if transforming():

        def summed(value: Tensor) -> tuple[Tensor, Tensor]:
            total = function(value)
            return total.sum(), total

        gradient, total = torch.func.grad(summed, has_aux=True)(probe)
        return total, gradient
    total = function(probe.requires_grad_())
    (gradient,) = torch.autograd.grad(total.sum(), probe, create_graph=differentiable)
    return (total, gradient) if differentiable else (total.detach(), gradient)


def _of_clamped(
    plan: ContractionPlan,
    own: dict[Key, Tensor],
    tables: Tables,
    rest: tuple[str, ...],
    last: str,
    differentiable: bool,
) -> tuple[Tensor, Tensor]:
    """Log-partition (*batch), and the marginal of (*rest, last) as (*batch, *cardinalities)."""
    cards = [plan.variable[name].cardinality for name in rest]
    batch, size = tables.batch_shape, plan.variable[last].cardinality
    each, number = max(1, CHUNK // _entries(tables)), prod(cards)
    totals, parts = [], []
    for start in range(0, number, each):
        index = torch.arange(start, min(start + each, number), device=tables.device)
        probe = torch.zeros(len(index), *batch, size, dtype=tables.dtype, device=tables.device)
        hard: dict[Key, Tensor] = {}
        row = index.reshape(-1, *[1] * len(batch))
        for name, card in zip(reversed(rest), reversed(cards), strict=True):
            hard[name], row = row % card, row // card
        # The probe is zero: it adds nothing but the gradient with respect to it, which is the marginal of ``last``.
        total, part = _with_gradient(
            lambda zero, hard=hard: log_partition(plan, condition(plan, own, hard, {last: zero})),  # type: ignore[misc]
            probe,
            differentiable,
        )
        totals.append(total)
        parts.append(part)
    log_weights = torch.cat(totals)
    top = log_weights.detach().amax(0)
    weights = (log_weights - torch.where(torch.isfinite(top), top, 0.0)).exp()
    mass = weights.sum(0)
    joint = torch.cat(parts) * (weights / torch.where(mass > 0, mass, 1.0))[..., None]
    return torch.where(mass > 0, top, -torch.inf), joint.movedim(0, -2).reshape(*batch, *cards, size)


def _entries(tables: Tables) -> int:
    """Entries of evidence and of batched tables that one clamped copy of the batch takes, at least 1."""
    plan, total = tables.plan, sum(v.cardinality for v in tables.plan.variables)
    for key, value in tables.raw.items():
        event = prod(tables.shapes[key])
        if value.numel() > event:
            total += event * len(plan.ties.get(str(key), ("",)))
    return max(1, tables.batch) * total


@eager
def log_prob(
    plan: ContractionPlan, log_potentials: LogPotentials, assignment: Assignment
) -> Float[Tensor, "..."]:
    """Log-probability of values of some variables, the others summed out (differentiable):

        log p(x_S) = log Z(S clamped) - log Z

    For an assignment of all variables that is log_score - log_partition.

    Args:
        plan, log_potentials: as in :func:`codd_ppl.inference.log_partition`.
        assignment: variable -> (*sample, *batch) integers; the shapes broadcast. Variables that it lacks are summed
            out.

    Returns:
        (*sample, *batch) nats, -inf where the assignment is impossible.

    Raises:
        GraphError: a variable that the graph doesn't have.
        ShapeError: values out of range or not integers, or shapes that don't broadcast.
        PotentialsError: malformed log-potentials.
        InfeasibleError: some batch element has no possible assignment at all.
        IntractableError: the plan is an approximation.
    """
    loopy.require_exact(plan, "log_prob")
    names, tables = known_names(plan, tuple(assignment), "assignment"), Tables(plan, log_potentials)
    values = {
        name: observed_values(f"assignment[{name!r}]", assignment[name], plan.variable[name].cardinality)
        for name in names
    }
    try:
        full = torch.broadcast_shapes(*(v.shape for v in values.values()), tables.batch_shape)
    except RuntimeError as error:
        raise ShapeError(
            f"assignment shapes must broadcast with the batch shape {tables.batch_shape}; found "
            f"{ {name: tuple(v.shape) for name, v in values.items()} }"
        ) from error
    total = log_partition(plan, log_potentials)
    require_possible(plan, log_potentials, total)
    if not values:
        return torch.zeros_like(total)
    batch = full[len(full) - len(tables.batch_shape) :]
    draws = prod(full[: len(full) - len(batch)])
    rows = {name: v.expand(full).reshape(draws, *batch) for name, v in values.items()}
    each = max(1, CHUNK // _entries(tables))
    parts = []
    for start in range(0, max(1, draws), each):
        hard: dict[Key, Tensor] = {name: v[start : start + each] for name, v in rows.items()}
        parts.append(log_partition(plan, condition(plan, log_potentials, hard)))
    return (torch.cat(parts) - total).reshape(full)


def require_possible(plan: ContractionPlan, log_potentials: LogPotentials, total: Tensor) -> None:
    """Raise the InfeasibleError that says where and why, if a log-partition is -inf."""
    if not transforming() and bool((total == -torch.inf).any()):
        mode(plan, log_potentials)
