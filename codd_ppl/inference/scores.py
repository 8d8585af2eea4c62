"""The score of one assignment: what a joint log-probability is made of, before its normaliser."""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import PotentialsError, ShapeError
from codd_ppl.inference.evidence import observed_values
from codd_ppl.inference.tables import Tables
from codd_ppl.inference.transforms import eager, transforming
from codd_ppl.typing import Assignment, Float, LogPotentials

__all__ = ["log_score"]


@eager
def log_score(
    plan: ContractionPlan, log_potentials: LogPotentials, assignment: Assignment
) -> Float[Tensor, "..."]:
    """Sum of the log-potentials at one assignment of all variables, sum_f log psi_f(x_f); no normaliser.

    Args:
        plan, log_potentials: as in :func:`log_partition`.
        assignment: every variable -> (*sample, *batch) int64 values.

    Returns:
        (*sample, *batch) nats.

    Raises:
        PotentialsError: as in :func:`log_partition`; NaN and +inf count where the assignment meets them.
        ShapeError: a variable is missing, has values out of range, or a shape that doesn't broadcast.
    """
    tables = Tables(plan, log_potentials)
    values = _checked(plan, tables, assignment)
    shape = next(iter(values.values())).shape[:-1] if values else ()
    # Thousands of terms: summed in float64, rounded once.
    result = torch.zeros(*shape, tables.batch, dtype=torch.float64, device=tables.device)
    ordered = [v.name for v in plan.variables]
    for size in dict.fromkeys(v.cardinality for v in plan.variables):
        names = tuple(n for n in ordered if plan.variable[n].cardinality == size)
        picked = torch.stack([values[n] for n in names], -1)
        evidence = tables.evidence(names).expand(*shape, tables.batch, len(names), size)
        result = result + evidence.gather(-1, picked[..., None])[..., 0].sum(-1, dtype=torch.float64)
    for index, step in enumerate(plan.steps):
        parent = torch.stack([values[m.parent] for m in step.messages], -1)
        table = tables.step(index).log
        rows = torch.zeros_like(parent)
        for c in range(len(step.shape) - 1):
            rows = rows * table.shape[2 + c] + torch.stack([values[m.children[c]] for m in step.messages], -1)
        rows = rows * table.shape[-1] + parent
        table = table.flatten(2)
        batch = torch.arange(table.shape[0], device=table.device)[:, None]
        message = torch.arange(table.shape[1], device=table.device)
        result = result + table[batch, message, rows].sum(-1, dtype=torch.float64)
    for factor in () if plan.steps else plan.factors:  # with loops there are no steps, only factors
        if factor.order > 1:
            log = tables.factor(factor.name)
            batch = torch.arange(log.shape[0], device=log.device)
            picked = log[(batch, *(values[v] for v in factor.scope))]
            result = result + picked.double()
    result = result.to(tables.dtype)
    if not transforming() and bool((~(result < torch.inf)).any()):
        raise PotentialsError(
            f"log_potentials must be finite or -inf: {tables.bad_entries()}. "
            "-inf means impossible; replace NaN and +inf before the call"
        )
    return result.reshape((*shape, *tables.batch_shape))


def _checked(plan: ContractionPlan, tables: Tables, assignment: Assignment) -> dict[str, Tensor]:
    """Assignment values as (*sample, batch)."""
    missing = [name for name in plan.variable if name not in assignment]
    if missing:
        raise ShapeError(
            f"the assignment lacks variable {missing[0]!r} (and {len(missing) - 1} more); give all of them"
        )
    values = {
        name: observed_values(f"assignment[{name!r}]", assignment[name], variable.cardinality)
        for name, variable in plan.variable.items()
    }
    shapes = [tuple(value.shape) for value in values.values()]
    try:
        full = torch.broadcast_shapes(*shapes, tables.batch_shape)
    except RuntimeError as error:
        raise ShapeError(
            f"assignment shapes must broadcast with the batch shape {tables.batch_shape}; found {set(shapes)}"
        ) from error
    sample = full[: len(full) - len(tables.batch_shape)]
    return {name: value.expand(full).reshape(*sample, tables.batch) for name, value in values.items()}
