"""Marginals of factors and expected counts of tables, from an upward and a downward pass."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.inference.downward import Downward
from codd_ppl.inference.scan import DownScan
from codd_ppl.inference.tables import Key, picked
from codd_ppl.inference.transforms import transforming

__all__ = ["expected", "factor_counts"]

LARGEST_WEIGHT = 40.0
"""exp of it is the most that a linear-space marginal may be scaled up; then its error stays below 1e-20."""


def expected(down: Downward, key: Key, weight: Tensor, like: Tensor) -> Tensor:
    """Gradient of sum_b weight_b log Z_b with respect to one tensor of log-potentials."""
    tables, plan = down.tables, down.plan
    per_batch = like.dim() > len(tables.shapes[key])
    weight = weight.to(tables.dtype)
    if key in tables.layout.blocks or key in plan.variable:
        names = key if isinstance(key, tuple) else (key,)
        total = down.probabilities(names) * weight[:, None, None]
        if not isinstance(key, tuple):
            total = total[:, 0]
    else:
        total = factor_counts(down, key, weight, per_batch)
    if not per_batch:
        return total.sum(0).to(like.dtype)
    total = total.expand(tables.batch, *tables.shapes[key]).reshape(*tables.batch_shape, *tables.shapes[key])
    return total.sum_to_size(like.shape).to(like.dtype)


def factor_counts(down: Downward, key: Key, weight: Tensor | None, per_batch: bool) -> Tensor:
    """Weighted marginal of a factor, or their sum over the factors of a tie: (batch or 1, *cardinalities).

    For a tuple of factors theirs are stacked, (batch or 1, len, *cardinalities). With ``per_batch=False`` the batch
    is summed already, so that a shared table never meets the batch dimension.
    """
    plan, tables = down.plan, down.tables
    if isinstance(key, tuple):
        return _stacked_counts(down, key, weight, per_batch)
    names = tables.users([key])
    parts = []
    single, runs, others = _places(plan, names, down.fast and down.up.scanning)
    for name in single:
        marginal = down.marginal(plan.factor[name].scope)[:, 0].exp()
        parts.append(_weighted(marginal, weight, per_batch))
    for start, steps in runs:
        found = down.scan(start)
        assert found is not None
        counts = _run_counts(found[0], list(steps), weight, per_batch)
        counts = counts[:, 0] if counts.shape[1] == 1 else counts.sum(1)
        parts.append(counts.movedim(-1, 1 + plan.steps[start].parent_axis))
    for index, where in others:
        counts = _step_counts(down, index, list(where), weight, per_batch)
        parts.append(counts.movedim(-1, 1 + plan.steps[index].parent_axis))
    if not parts:  # a factor or tie whose factors all have their tables under other keys
        shape = tables.shapes[key]
        parts.append(torch.zeros((1, *shape), dtype=tables.dtype, device=tables.device))
    return sum(parts[1:], parts[0])


@lru_cache(maxsize=256)
def _places(
    plan: ContractionPlan, names: frozenset[str], scanning: bool
) -> tuple[tuple[str, ...], tuple[tuple[int, tuple[int, ...]], ...], tuple[tuple[int, tuple[int, ...]], ...]]:
    """Where some factors are.

    Those of order 1; (start of a run, places in it) of those on runs; (step, messages of it) of the others.
    """
    single = tuple(n for n in names if plan.factor[n].order == 1)
    runs, done = [], set[int]()
    for run in plan.runs if scanning else ():
        steps = [i for i in range(run.start, run.stop) if plan.steps[i].messages[0].factor in names]
        if steps:
            runs.append((run.start, tuple(i - run.start for i in steps)))
            done.update(steps)
    others = []
    for index, step in enumerate(plan.steps):
        where = tuple(g for g, m in enumerate(step.messages) if m.factor in names)
        if where and index not in done:
            others.append((index, where))
    return single, tuple(runs), tuple(others)


def _stacked_counts(down: Downward, key: tuple[str, ...], weight: Tensor | None, per_batch: bool) -> Tensor:
    """Marginals of the factors that a tuple names, (batch or 1, len, *cardinalities); 0 for those with own tables."""
    plan, tables = down.plan, down.tables
    names = tables.users([key])
    for run in plan.runs:
        factors = tuple(s.messages[0].factor for s in plan.steps[run.start : run.stop])
        found = down.scan(run.start) if names == plan.run_factors[run.start] == set(key) else None
        if found is None:
            continue
        if found[0].edges is not None:
            edges: Tensor = found[0].edges
            return edges if per_batch else edges.sum(0, keepdim=True)
        counts = _run_counts(found[0], list(range(len(factors))), weight, per_batch)
        counts = counts.movedim(-1, 2 + plan.steps[run.start].parent_axis)
        places = {name: i for i, name in enumerate(factors)}
        turned = tuple(places[name] for name in key)
        return picked(counts, turned)
    place = {name: i for i, name in enumerate(key)}
    parts, order = list[Tensor](), list[int]()
    for index, step in enumerate(plan.steps):
        where = [
            (g, place[m.factor])
            for g, m in enumerate(step.messages)
            if m.factor in names and m.factor in place
        ]
        if where:
            found = down.scan(index)
            if found is None:
                each = _step_marginals(down, index, weight, per_batch)
            else:
                each = _run_counts(found[0], [found[1]], weight, per_batch)
            each = picked(each, tuple(g for g, _ in where))
            parts.append(each.movedim(-1, 2 + step.parent_axis))
            order += [i for _, i in where]
    for name in key:
        if name in names and plan.factor[name].order == 1:
            marginal = down.marginal(plan.factor[name].scope).exp()
            parts.append(_weighted(marginal, weight, per_batch))
            order.append(place[name])
    missing = [i for i in range(len(key)) if i not in set(order)]
    if missing:
        shape = (1, len(missing), *tables.shapes[key][1:])
        parts.append(torch.zeros(shape, dtype=tables.dtype, device=tables.device))
    batch = max(part.shape[0] for part in parts) if all(part.shape[0] for part in parts) else 0
    whole = torch.cat([part.expand(batch, *part.shape[1:]) for part in parts], dim=1)
    order += missing
    return picked(whole, tuple(sorted(range(len(order)), key=order.__getitem__)))


def _run_counts(scan: DownScan, steps: list[int], weight: Tensor | None, per_batch: bool) -> Tensor:
    """Marginals of some steps of a run, (batch or 1, steps, child, parent); their sum if they share one table."""
    path = scan.up.path
    if scan.edges is not None:  # weighted already
        each = [path.edge(scan.edges, k) for k in steps]
        counts = each[0][:, None] if len(each) == 1 else torch.stack(each, dim=1)
        return counts if per_batch else counts.sum(0, keepdim=True)
    if path.kept and not path.shared and len(steps) < path.steps:
        whole = scan.cached.get(per_batch)
        if whole is None:
            whole = scan.cached[per_batch] = _run_counts(scan, list(range(path.steps)), weight, per_batch)
        return whole[:, steps]
    child, parent = scan.weighted, scan.outside
    if len(steps) < child.shape[1]:
        child, parent = child[:, steps], parent[:, steps]
    if weight is not None:
        if child.shape[0] == 1 and not per_batch:  # what brings the batch is elsewhere
            weight = weight.sum(0, keepdim=True)
        child = child * weight[:, None, None]
        parent = parent.expand(child.shape[0], -1, -1)
    if path.shared:
        if per_batch or path.batch != 1:
            counts = torch.einsum("bkn,bkm->bnm", child, parent)
        else:
            counts = (child.flatten(0, 1).T @ parent.flatten(0, 1))[None]
        counts = (counts * path.linear[0])[:, None]
    elif path.kept:
        linear = path.linear[0]
        if per_batch or path.batch != 1:
            counts = child[..., None] * linear * parent[..., None, :]
        else:
            counts = (torch.einsum("bkn,bkm->knm", child, parent) * linear[0])[None]
    else:
        pairs = zip(child.unbind(1), parent.unbind(1), steps, strict=True)
        if per_batch or path.batch != 1:
            parts = [c[:, :, None] * p[:, None] * path.table(k) for c, p, k in pairs]
        else:
            parts = [((c.T @ p) * path.table(k))[None] for c, p, k in pairs]
        counts = torch.stack(parts, dim=1)
    return counts if per_batch else counts.sum(0, keepdim=True)


def _weighted(value: Tensor, weight: Tensor | None, per_batch: bool) -> Tensor:
    if weight is not None:
        value = value * weight.reshape(-1, *[1] * (value.dim() - 1))
    return value if per_batch else value.sum(0, keepdim=True)


def _step_counts(
    down: Downward, index: int, where: list[int], weight: Tensor | None, per_batch: bool
) -> Tensor:
    """Sum of the marginals of some messages of a step, (batch or 1, *children, parent)."""
    table = down.tables.step(index)
    everything = len(where) == len(down.plan.steps[index].messages)
    if table.log.shape[1] > 1 or not everything or len(where) == 1:
        each = _step_marginals(down, index, weight, per_batch)
        return each[:, where[0]] if len(where) == 1 else each[:, where].sum(1)
    pair = _linear_pair(down, index, weight)
    if pair is None:
        return _step_marginals(down, index, weight, per_batch).sum(1)
    batch = "b" * (per_batch or table.linear.shape[0] > 1)
    counts = torch.einsum(f"bgn,bgm->{batch}nm", *pair)
    counts = (counts if batch else counts[None]) * table.linear[:, 0]
    return counts if per_batch else counts.sum(0, keepdim=True)


def _step_marginals(down: Downward, index: int, weight: Tensor | None, per_batch: bool) -> Tensor:
    """Weighted marginals of all factors of a step, (batch or 1, messages, *children, parent); worked out once."""
    found = down.step_marginals.get((index, per_batch))
    if found is None:
        linear, pair = down.tables.step(index).linear, _linear_pair(down, index, weight)
        if pair is None:
            found = _weighted(down.log_factor_marginal(index).exp(), weight, per_batch)
        else:
            batch = "b" * (per_batch or linear.shape[0] > 1)
            if batch:
                found = (pair[0][..., None] * linear) * pair[1][:, :, None]
            else:
                found = torch.einsum("bgn,bgm->gnm", *pair)[None] * linear
            found = found if per_batch else found.sum(0, keepdim=True)
        down.step_marginals[index, per_batch] = found
    return found


def _linear_pair(down: Downward, index: int, weight: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Weights (batch, messages, child) and (batch, messages, parent) whose outer product with a step's linear tables

    is its factors' marginals; None for larger factors, and where that would scale a rounding error up.
    """
    if len(down.plan.steps[index].shape) != 2 or transforming():
        return None
    child, parent, largest = down.weights(index)
    if largest.numel() and not bool((largest <= LARGEST_WEIGHT).all()):
        return None
    child, parent = torch.broadcast_tensors(child[..., None], parent[..., None, :])
    child, parent = child[..., 0], parent[..., 0, :]
    return (child if weight is None else child * weight[:, None, None]), parent
