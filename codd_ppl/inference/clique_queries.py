"""The public queries on a clique tree: log_partition with its gradient, marginals, entropy, mode and draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import PotentialsError
from codd_ppl.inference.cliques import Calibration, require_proper
from codd_ppl.inference.contraction import log_joint, max_product, rows, slices
from codd_ppl.inference.feasibility import require_feasible
from codd_ppl.inference.semirings import log_normalized, safe_logsumexp
from codd_ppl.inference.tables import Key, Tables
from codd_ppl.inference.transforms import transforming
from codd_ppl.typing import Float, Int, LogPotentials

__all__ = ["decode", "entropy", "log_partition", "marginals", "mode", "sample"]

CHUNK = 1 << 23
"""Largest number of weights that one clique of a sample looks at at once; more draws are made in slices."""


def calibrated(tables: Tables) -> tuple[Calibration, Tensor]:
    """Upward messages and the log-partition, (batch or 1)."""
    require_proper(tables)
    up = Calibration(tables)
    return up, _finite(tables, up.log_partition())


def _finite(tables: Tables, total: Tensor) -> Tensor:
    if not transforming() and bool((~(total < torch.inf)).any()):
        raise PotentialsError(f"log_potentials must be finite or -inf: {tables.bad_entries()}")
    return total


def log_partition(plan: ContractionPlan, log_potentials: LogPotentials) -> Float[Tensor, "*batch"]:
    """log Z; its gradient is the marginals, from the messages back down the tree."""
    if transforming():
        tables = Tables(plan, log_potentials)
        return unflatten(tables, calibrated(tables)[1])
    result: Tensor = _LogPartition.apply(plan, tuple(log_potentials), *log_potentials.values())
    return result


class _LogPartition(torch.autograd.Function):
    """Messages up in forward, down in backward. With create_graph the backward is differentiable itself."""

    @staticmethod
    def forward(ctx: Any, plan: ContractionPlan, keys: tuple[Key, ...], *tensors: Tensor) -> Tensor:
        tables = Tables(plan, dict(zip(keys, tensors, strict=True)))
        up, total = calibrated(tables)
        ctx.plan, ctx.keys = plan, keys
        ctx.up = up if any(t.requires_grad for t in tensors) else None
        ctx.save_for_backward(*tensors)
        return total.expand(tables.batch).reshape(tables.batch_shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        up: Calibration = ctx.up
        if torch.is_grad_enabled():
            up = Calibration(Tables(ctx.plan, dict(zip(ctx.keys, tensors, strict=True))))
        weight = grad.reshape(-1).to(up.tables.dtype)
        keys = [key for key, need in zip(ctx.keys, ctx.needs_input_grad[2:], strict=True) if need]
        found = up.run().log_marginals({name for key in keys for name in _users(up.tables, key)})
        grads = {key: _expected(up.tables, found, key, weight) for key in keys}
        return (None, None, *(grads.get(key) for key in ctx.keys))


def _users(tables: Tables, key: Key) -> list[str]:
    """Variables, and factors of order two or more, whose marginals make up that of a key."""
    if key in tables.layout.blocks:
        return list(key)
    if key in tables.plan.variable:
        return [str(key)]
    users = tables.users([key])
    names = key if isinstance(key, tuple) else tables.plan.ties.get(key, (key,))
    return [_home(tables.plan, name) for name in names if name in users]


def _home(plan: ContractionPlan, factor: str) -> str:
    """Under what name the marginal of a factor is found."""
    return factor if plan.factor[factor].order > 1 else plan.factor[factor].scope[0]


def _expected(tables: Tables, found: dict[str, Tensor], key: Key, weight: Tensor) -> Tensor:
    """Gradient of sum_b weight_b log Z_b with respect to one tensor of log-potentials."""
    like, event = tables.raw[key], tables.shapes[key]
    total = _marginal(tables, found, key)
    total = total * weight.reshape(-1, *[1] * len(event))
    if like.dim() == len(event):
        return total.sum(0).to(like.dtype)
    return total.reshape(*tables.batch_shape, *event).sum_to_size(like.shape).to(like.dtype)


def _marginal(tables: Tables, found: dict[str, Tensor], key: Key) -> Tensor:
    """Probabilities behind a key, (batch or 1, *event): of variables, stacked ones, a factor, or the sum over a tie."""
    if isinstance(key, tuple):
        nothing = torch.zeros(1, *tables.shapes[key][1:], dtype=tables.dtype, device=tables.device)
        block, users = key in tables.layout.blocks, tables.users([key])
        each = [
            found[name if block else _home(tables.plan, name)].exp() if block or name in users else nothing
            for name in key
        ]
        return torch.stack(torch.broadcast_tensors(*each), 1)
    parts = [found[name].exp() for name in _users(tables, key)]
    if not parts:  # every factor of the tie has a table of its own
        return torch.zeros(1, *tables.shapes[key], dtype=tables.dtype, device=tables.device)
    return sum(parts[1:], parts[0])


def marginals(plan: ContractionPlan, log_potentials: LogPotentials) -> dict[Key, Float[Tensor, "..."]]:
    """Probabilities of every variable and every given key; for a tie expected counts."""
    tables = Tables(plan, log_potentials)
    up, total = calibrated(tables)
    require_feasible(tables, total)
    keys = dict.fromkeys([*tables.raw, *plan.variable])
    found = up.run().log_marginals({name for key in keys for name in _users(tables, key)})
    return {key: unflatten(tables, _marginal(tables, found, key)) for key in keys}


def unflatten(tables: Tables, value: Tensor) -> Tensor:
    """(batch or 1, *event) as (*batch, *event)."""
    event = value.shape[1:]
    return value.expand((tables.batch, *event)).reshape((*tables.batch_shape, *event))


def entropy(plan: ContractionPlan, log_potentials: LogPotentials) -> Float[Tensor, "*batch"]:
    """H = sum over cliques of H(residual | separator), nats; free of cancellation between large potentials."""
    tables = Tables(plan, log_potentials)
    up, total = calibrated(tables)
    require_feasible(tables, total)
    up.run()
    result = torch.zeros(1, dtype=torch.float64, device=tables.device)
    for i, clique in enumerate(up.tree.cliques):
        shape = {v: plan.variable[v].cardinality for v in clique.variables}
        scopes, logs = up.belief(i)
        above = [up.downs[i]] if clique.parent >= 0 else []
        parts = []
        for few in slices([*logs, *above], clique.entries):
            local = log_joint(scopes, few[: len(scopes)], shape)
            joint = local + log_joint([clique.separator], few[len(scopes) :], shape) if above else local
            summed = tuple(1 + d for d, v in enumerate(shape) if v not in clique.separator)
            outer = safe_logsumexp(local, summed)
            for d in summed:
                outer = outer.unsqueeze(d)
            log = log_normalized(joint, tuple(range(1, joint.dim())))
            dead = log == -torch.inf
            conditional = torch.where(dead, 0.0, local - torch.where(outer == -torch.inf, 0.0, outer))
            parts.append(-(log.exp() * conditional).flatten(1).sum(1))
        result = result + torch.cat(parts).double()
    return unflatten(tables, result.to(tables.dtype))


def sample(
    plan: ContractionPlan,
    log_potentials: LogPotentials,
    sample_shape: Sequence[int],
    choose: Callable[[Tensor], Tensor],
) -> dict[str, Int[Tensor, "..."]]:
    """Exact joint draws, (*sample_shape, *batch): the messages are shared, then cliques are drawn roots first.

    ``choose`` draws one value for each row of log-weights.
    """
    with torch.no_grad():
        tables = Tables(plan, log_potentials)
        up, total = calibrated(tables)
        require_feasible(tables, total)
        draws = prod(sample_shape)
        most = max(c.entries // _entries(plan, c.separator) for c in up.tree.cliques)
        each = max(1, CHUNK // max(1, tables.batch * most))
        parts = [decode(up, min(each, draws - start), choose) for start in range(0, max(1, draws), each)]
        shape = (*sample_shape, *tables.batch_shape)
        return {name: torch.cat([part[name] for part in parts]).reshape(shape) for name in plan.variable}


def mode(plan: ContractionPlan, log_potentials: LogPotentials) -> dict[str, Int[Tensor, "*batch"]]:
    """A most probable assignment: max-product messages up, then the best values down."""
    with torch.no_grad():
        tables = Tables(plan, log_potentials)
        require_proper(tables)
        up = Calibration(tables, max_product)
        require_feasible(tables, _finite(tables, up.log_partition()))
        best = decode(up, 1, lambda log: log.argmax(-1))
        return {name: value.reshape(tables.batch_shape) for name, value in best.items()}


def _entries(plan: ContractionPlan, names: tuple[str, ...]) -> int:
    return prod(plan.variable[v].cardinality for v in names)


def decode(up: Calibration, draws: int, choose: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Values of each clique's residual given its separator, roots first: variable -> (draws, batch)."""
    plan, batch = up.plan, up.tables.batch
    values: dict[str, Tensor] = {}
    for i in range(len(up.tree.cliques) - 1, -1, -1):
        clique = up.tree.cliques[i]
        rest = {v: plan.variable[v].cardinality for v in clique.residual}
        scopes, logs = up.belief(i)
        log = rows(scopes, logs, {v: values[v] for v in clique.separator}, rest).flatten(2)
        flat = choose(log.expand(draws, batch, -1))
        for v in reversed(rest):
            values[v] = flat % rest[v]
            flat = flat // rest[v]
    return {name: values[name] for name in plan.variable}
