"""Evidence: what is observed, or thought likely, multiplied onto log-potentials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import GraphError, PotentialsError, ShapeError
from codd_ppl.inference.tables import Key, Tables
from codd_ppl.inference.transforms import eager, unseen
from codd_ppl.typing import Float, Int, LogPotentials

__all__ = ["add_evidence", "condition", "known_names", "observed_values", "used"]

Evidence = Mapping[str, Tensor] | Mapping[tuple[str, ...], Tensor] | Mapping[Key, Tensor]


@eager
def condition(
    plan: ContractionPlan,
    log_potentials: LogPotentials,
    hard: Evidence | None = None,
    soft: Evidence | None = None,
) -> dict[Key, Float[Tensor, "..."]]:
    """Log-potentials of the distribution given evidence; every query takes them.

    Hard evidence x_v = e multiplies by 1[x_v = e], soft evidence by a likelihood (Pearl 1988, section 2.2.2). So
    log_partition(conditioned) - log_partition(log_potentials) is the log-probability of the evidence.

    Args:
        plan, log_potentials: as in :func:`codd_ppl.inference.log_partition`; neither is modified.
        hard: variable -> (*batch) integers, or tuple of variables of one cardinality -> (*batch, len). -1 means "not
            observed in this batch element".
        soft: variable -> (*batch, cardinality) log-likelihoods, or tuple of variables -> (*batch, len, cardinality);
            -inf means impossible. All shapes broadcast with the batch shape of the log-potentials, which may grow.

    Returns:
        A new dictionary with the old keys; evidence of variables that had none is stacked under a new tuple key.

    Raises:
        GraphError: evidence for a variable that the graph doesn't have.
        ShapeError: values out of range or not integers, a wrong last dimension, or shapes that don't broadcast.
        PotentialsError: malformed log-potentials, or soft evidence with NaN or +inf.
    """
    tables = Tables(plan, log_potentials)
    result: dict[Key, Tensor] = dict(log_potentials)
    singles: dict[int, dict[str, Tensor]] = {}
    stacks: list[tuple[tuple[str, ...], Tensor]] = []
    observed: Iterable[tuple[Key, Tensor]] = (hard or {}).items()
    likely: Iterable[tuple[Key, Tensor]] = (soft or {}).items()
    for key, values in observed:
        names, size = _scope(plan, key, "hard evidence")
        values = observed_values(f"hard[{key!r}]", values, size, lowest=-1)
        if isinstance(key, str):
            singles.setdefault(size, {})[key] = values
        elif values.dim() and values.shape[-1] == len(key):
            stacks.append((names, values))
        else:
            raise ShapeError(
                f"hard[{key!r}]: expected shape (*batch, {len(key)}), found {tuple(values.shape)}"
            )
    for group in singles.values():
        _broadcast(tables, {f"hard[{name!r}]": value.shape for name, value in group.items()})
        stacks.append((tuple(group), torch.stack(torch.broadcast_tensors(*group.values()), -1)))
    for names, values in stacks:
        _broadcast(tables, {f"hard[{names[0]!r}]": values.shape[:-1]})
        each = torch.arange(plan.variable[names[0]].cardinality, device=values.device)
        other = (values[..., None] >= 0) & (values[..., None] != each)
        clamped = torch.zeros((), dtype=tables.dtype, device=values.device).masked_fill(other, -torch.inf)
        result = add_evidence(plan, result, names, clamped)
    for key, likelihood in likely:
        names, size = _scope(plan, key, "soft evidence")
        event = (size,) if isinstance(key, str) else (len(names), size)
        if not likelihood.is_floating_point() or tuple(likelihood.shape[-len(event) :]) != event:
            raise ShapeError(
                f"soft[{key!r}]: expected log-likelihoods of shape (*batch, {', '.join(map(str, event))}), found "
                f"{likelihood.dtype} {tuple(likelihood.shape)}"
            )
        if bool((~(likelihood < torch.inf)).any()):
            raise PotentialsError(f"soft[{key!r}] holds NaN or +inf; log-likelihoods must be finite or -inf")
        _broadcast(tables, {f"soft[{key!r}]": likelihood.shape[: likelihood.dim() - len(event)]})
        result = add_evidence(
            plan, result, names, likelihood[..., None, :] if isinstance(key, str) else likelihood
        )
    return result


def add_evidence(
    plan: ContractionPlan, log_potentials: LogPotentials, names: tuple[str, ...], evidence: Tensor
) -> dict[Key, Tensor]:
    """Unary log-evidence (*batch, len(names), cardinality) on top of what there is, in a new dictionary.

    It goes into the stack that holds the variable, else into the variable's own table, else under a new tuple key.
    """
    result: dict[Key, Tensor] = dict(log_potentials)
    place = {name: i for i, name in enumerate(names)}
    left = dict(place)
    for key in log_potentials:
        if isinstance(key, tuple) and any(name in left for name in key):
            where = [left.pop(name, len(names)) for name in key]
            padded = torch.cat((evidence, torch.zeros_like(evidence[..., :1, :])), dim=-2)
            result[key] = result[key] + padded[..., torch.tensor(where, device=evidence.device), :]
    new = []
    for name in left:
        if name in result:
            result[name] = result[name] + evidence[..., place[name], :]
        else:
            new.append(name)
    if new:  # a tuple even for one name: that name alone would replace the table of a tied factor called so
        alike = new == list(names)
        where = [place[name] for name in new]
        result[tuple(new)] = (
            evidence if alike else evidence[..., torch.tensor(where, device=evidence.device), :]
        )
    return result


def used(plan: ContractionPlan, log_potentials: LogPotentials) -> dict[Key, Tensor]:
    """The log-potentials without ties' tables that no factor takes, as each has its own."""
    own = {name for key in log_potentials for name in (key if isinstance(key, tuple) else (key,))}
    return {
        key: value
        for key, value in log_potentials.items()
        if key not in plan.ties or any(n == key or n not in own for n in plan.ties[str(key)])
    }


def known_names(plan: ContractionPlan, names: Sequence[str], what: str) -> tuple[str, ...]:
    """The names as a tuple, once it is sure that each is a variable and none comes twice.

    Raises:
        GraphError: otherwise.
    """
    if isinstance(names, str):
        raise GraphError(f"{what}: expected a sequence of variable names, found the string {names!r}")
    names = tuple(names)
    for i, name in enumerate(names):
        if name not in plan.variable:
            some = ", ".join(map(repr, list(plan.variable)[:6]))
            raise GraphError(
                f"{what}: there is no variable {name!r}; expected names of variables, such as {some}"
            )
        if name in names[:i]:
            raise GraphError(f"{what}: variable {name!r} is named twice; name each variable once")
    return names


def observed_values(what: str, value: Tensor, cardinality: int, lowest: int = 0) -> Int[Tensor, "..."]:
    """Values of a variable as int64, once it is sure that they are integers in range.

    Raises:
        ShapeError: otherwise.
    """
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(f"{what}: expected a tensor of integers, found {found}")
    if unseen(value):
        return value.long()  # can't be looked at
    if value.numel() and not (int(value.min()) >= lowest and int(value.max()) < cardinality):
        hint = " (-1: not observed)" if lowest < 0 else ""
        raise ShapeError(
            f"{what}: expected values from {lowest}{hint} to {cardinality - 1}, found {int(value.min())} to "
            f"{int(value.max())}"
        )
    return value.long()


def _scope(plan: ContractionPlan, key: Key, what: str) -> tuple[tuple[str, ...], int]:
    names = known_names(plan, (key,) if isinstance(key, str) else key, what)
    sizes = {plan.variable[name].cardinality for name in names}
    if len(sizes) != 1:
        raise ShapeError(
            f"{what} {key!r}: a tuple must name variables of one cardinality, found {sorted(sizes)}"
        )
    return names, sizes.pop()


def _broadcast(tables: Tables, shapes: Mapping[str, Sequence[int]]) -> None:
    try:
        torch.broadcast_shapes(tables.batch_shape, *map(tuple, shapes.values()))
    except RuntimeError as error:
        found = ", ".join(f"{what}: {tuple(shape)}" for what, shape in list(shapes.items())[:4])
        raise ShapeError(
            f"evidence must broadcast with the batch shape {tables.batch_shape} of the log-potentials; found {found}"
        ) from error
