"""The public queries: pure functions of a plan and its log-potentials."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.inference import chain, clique_queries, loopy
from codd_ppl.inference.counts import expected, factor_counts
from codd_ppl.inference.downward import Downward, outside
from codd_ppl.inference.feasibility import require_feasible
from codd_ppl.inference.scores import log_score
from codd_ppl.inference.semirings import safe_logsumexp
from codd_ppl.inference.tables import Key, Tables
from codd_ppl.inference.transforms import eager, transforming
from codd_ppl.inference.tree import Upward, upward
from codd_ppl.typing import Float, LogPotentials

__all__ = ["entropy", "log_partition", "log_score", "marginals", "require_feasible"]


@eager
def log_partition(plan: ContractionPlan, log_potentials: LogPotentials) -> Float[Tensor, "*batch"]:
    """log Z = log sum_x prod_f psi_f(x_f), exactly (unless the plan was compiled with ``approximate=``).

    Its gradient with respect to the log-potentials is the marginals (for a tied table: the expected counts),
    computed by an explicit downward pass; it can be differentiated again.

    Args:
        plan: from :func:`codd_ppl.compile`.
        log_potentials: factor or tie name -> (*batch, *cardinalities); variable name -> (*batch, cardinality)
            unary evidence; tuple of variable names -> (*batch, len, cardinality); tuple of factor names ->
            (*batch, len, *cardinalities). Batch shapes broadcast; -inf means impossible.

    Returns:
        (*batch) nats; -inf where no assignment is possible (with zero gradient).

    Raises:
        PotentialsError: unknown or missing key, wrong shape, NaN or +inf.
    """
    if plan.junction is not None:
        return clique_queries.log_partition(plan, log_potentials)
    if plan.approximation is not None:
        return loopy.log_partition(plan, log_potentials)
    if plan.route == "chain scan" and chain.usable(tables := Tables(plan, log_potentials)):
        return chain.log_partition(tables)
    if transforming():
        tables = Tables(plan, log_potentials)
        _, total = upward(tables)
        return total.expand(tables.batch).reshape(tables.batch_shape)
    result: Tensor = _LogPartition.apply(plan, tuple(log_potentials), *log_potentials.values())
    return result


class _LogPartition(torch.autograd.Function):
    """Upward pass forward, downward pass backward. With create_graph the backward is differentiable itself."""

    @staticmethod
    def forward(ctx: Any, plan: ContractionPlan, keys: tuple[Key, ...], *tensors: Tensor) -> Tensor:
        tables = Tables(plan, dict(zip(keys, tensors, strict=True)))
        up, total = upward(tables)
        ctx.plan, ctx.keys = plan, keys
        ctx.up = up if any(t.requires_grad for t in tensors) else None
        ctx.save_for_backward(*tensors)
        return total.expand(tables.batch).reshape(tables.batch_shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        up: Upward = ctx.up
        if torch.is_grad_enabled():
            up, _ = upward(Tables(ctx.plan, dict(zip(ctx.keys, tensors, strict=True))))
        wanted = [k for k, need in zip(ctx.keys, ctx.needs_input_grad[2:], strict=True) if need]
        weight = grad.reshape(-1)
        counts = outside(
            up,
            lambda down: {k: expected(down, k, weight, up.tables.raw[k]) for k in wanted},
            up.tables.users(wanted),
            weight.to(up.tables.dtype),
        )
        return (None, None, *(counts.get(k) for k in ctx.keys))


@eager
def marginals(
    plan: ContractionPlan, log_potentials: LogPotentials, *, factors: bool = True
) -> dict[Key, Float[Tensor, "..."]]:
    """Exact marginals by one upward and one downward pass (differentiable); beliefs of an approximate plan.

    Args:
        plan, log_potentials: as in :func:`log_partition`.
        factors: False: of variables alone, which takes less time and memory on forests.

    Returns:
        The same keys plus every variable: a factor name -> (*batch, *cardinalities) joint probabilities of its
        scope; a variable -> (*batch, cardinality); a tuple of variables or factors -> the same, stacked in a
        dimension behind the batch; a tie -> (*batch, *cardinalities) expected counts, the sum over the factors that
        use its table.

    Raises:
        PotentialsError: as in :func:`log_partition`.
        InfeasibleError: some batch element has no possible assignment.
    """
    if plan.junction is not None:
        return _of_variables(plan, clique_queries.marginals(plan, log_potentials), factors)
    if plan.approximation is not None:
        return _of_variables(plan, loopy.marginals(plan, log_potentials), factors)
    tables = Tables(plan, log_potentials)
    up, total = upward(tables)
    require_feasible(tables, total)

    def query(down: Downward) -> tuple[dict[Key, Tensor], list[Tensor]]:
        result: dict[Key, Tensor] = {}
        for key in tables.raw:
            if isinstance(key, tuple) and key in tables.layout.blocks:
                result[key] = down.probabilities(key)
            elif factors and key not in plan.variable:
                result[key] = factor_counts(down, key, None, per_batch=True)
        return result, [down.probabilities(names) for names in plan.by_cardinality]

    found, stacks = outside(up, query, tables.users(list(tables.raw) if factors else []))
    result = {key: _unflatten(tables, value) for key, value in found.items()}
    for names, stack in zip(plan.by_cardinality, stacks, strict=True):
        result.update(zip(names, _unflatten(tables, stack).unbind(-2), strict=True))
    return result


def _of_variables(plan: ContractionPlan, found: dict[Key, Tensor], factors: bool) -> dict[Key, Tensor]:
    return {
        k: v for k, v in found.items() if factors or (k[0] if isinstance(k, tuple) else k) in plan.variable
    }


def _unflatten(tables: Tables, value: Tensor) -> Tensor:
    event = value.shape[1:]
    return value.expand(tables.batch, *event).reshape(*tables.batch_shape, *event)


@eager
def entropy(plan: ContractionPlan, log_potentials: LogPotentials) -> Float[Tensor, "*batch"]:
    """Entropy in nats of the joint distribution of **all** variables, latents included.

    H = sum over roots of H(root) + sum over factors of H(children | parent), exact on forests and free of
    cancellation between large potentials; with loops the same over the cliques.

    Raises:
        PotentialsError, InfeasibleError: as in :func:`marginals`.
        IntractableError: the plan is an approximation.
    """
    if plan.junction is not None:
        return clique_queries.entropy(plan, log_potentials)
    loopy.require_exact(plan, "entropy")
    tables = Tables(plan, log_potentials)
    up, total = upward(tables)
    require_feasible(tables, total)

    def query(down: Downward) -> Tensor:
        log_roots = [down.marginal((root,))[:, 0] for root in plan.roots]
        parts = [_plogp(log, log) for log in log_roots]
        for index in range(len(plan.steps)):
            for g in range(len(plan.steps[index].messages)):
                log = down.log_factor_marginal(index, g)
                parent = safe_logsumexp(log.flatten(1, -2), 1)
                parent = torch.where(parent == -torch.inf, 0.0, parent)
                conditional = log - parent.reshape(-1, *[1] * (log.dim() - 2), parent.shape[-1])
                parts.append(_plogp(log, conditional))
        return torch.stack(torch.broadcast_tensors(*parts)).sum(0, dtype=torch.float64)

    value = outside(up, query).to(tables.dtype)
    return value.expand(tables.batch).reshape(tables.batch_shape)


def _plogp(log: Tensor, conditional: Tensor) -> Tensor:
    """- sum exp(log) * conditional over everything but the batch, 0 where the probability is 0."""
    dead = log == -torch.inf
    return -(log.exp() * torch.where(dead, 0.0, conditional)).flatten(1).sum(1)
