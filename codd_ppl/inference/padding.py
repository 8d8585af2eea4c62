"""Padding: graphs of different sizes in one batch, by variables that are switched off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import GraphError, ShapeError
from codd_ppl.graphs import Factor
from codd_ppl.inference.evidence import add_evidence, known_names, observed_values, used
from codd_ppl.inference.tables import Key, Tables
from codd_ppl.inference.transforms import eager
from codd_ppl.typing import Bool, Float, Int, LogPotentials

__all__ = ["lengths", "pad", "unpad"]

Active = Tensor | Mapping[str, Tensor] | Mapping[tuple[str, ...], Tensor] | Mapping[Key, Tensor]


@eager
def pad(
    plan: ContractionPlan, log_potentials: LogPotentials, active: Active
) -> dict[Key, Float[Tensor, "..."]]:
    """Log-potentials of the graph without its inactive variables, which may be others in each batch element.

    Inactive variables are clamped to value 0, and what touches them counts as 1. So every query gives what the smaller
    graph of the active variables and of the factors among them would give (inactive variables have value 0, and
    entropy 0). In :func:`codd_ppl.inference.marginals` a tie's counts and the tables of touched factors include the
    padding: see :func:`unpad`. Gradients with respect to the log-potentials given here are those of the smaller graph.

    No table is copied for each batch element where that can be avoided. A table psi with at most one active variable a
    acts on it like the evidence psi(x_a, 0); evidence 1 / psi(x_a, 0) takes that back (to rounding of the size of
    log psi(x_a, 0)). So a tied chain or hidden Markov model costs no more than evidence does. This fails, and a touched
    factor gets a masked table of its own (batch x entries, and one plain copy of a tied table for each other factor of
    the same step), only where

    - psi(x_a, 0) holds -inf, as in a left-to-right chain whose states can't all move on to state 0 (give number 0 to
      one that they all can); or
    - a touched factor of order 3 or more has two active variables.

    Tables of a factor's own that have the batch dimension already are masked directly.

    Args:
        plan, log_potentials: as in :func:`codd_ppl.inference.log_partition`; not modified.
        active: bool (*batch, variables), in the order of ``plan.variables``, such as from :func:`lengths`; or a
            mapping variable -> (*batch), or tuple of variables -> (*batch, len), where variables that are left out
            are active. Shapes broadcast with the batch shape of the log-potentials, which may grow.

    Returns:
        A new dictionary for any query.

    Raises:
        GraphError: an unknown variable in ``active``.
        ShapeError: not bool, or a shape that doesn't fit.
        PotentialsError: malformed log-potentials.
    """
    tables = Tables(plan, log_potentials)
    on = _mask(plan, active, tables.batch_shape, tables.device)
    return _restacked(tables, _padded(plan, _unstacked(tables), tables, on))


def _unstacked(tables: Tables) -> dict[Key, Tensor]:
    """The log-potentials with tuples of factors taken apart."""
    result = {k: v for k, v in tables.raw.items() if k in tables.layout.blocks or not isinstance(k, tuple)}
    for name, (key, place) in tables.layout.source.items():
        if place is not None:
            result[name] = tables.raw[key].select(-len(tables.shapes[key]), place)
    return result


def _restacked(tables: Tables, padded: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """Padded log-potentials with tuples of factors as they were given, and in the order of the keys there."""
    result: dict[Key, Tensor] = {}
    for key, value in tables.raw.items():
        if key in tables.layout.blocks or not isinstance(key, tuple):
            if key in padded:
                result[key] = padded[key]
            continue
        dim = -len(tables.shapes[key])
        rows = list(value.unbind(dim))
        same = True
        for i, name in enumerate(key):
            if tables.layout.source[name] == (key, i):
                now = padded[name]
                same, rows[i] = (
                    same and now.shape == rows[i].shape and now.data_ptr() == rows[i].data_ptr(),
                    now,
                )
        result[key] = value if same else torch.stack(_broadcast(rows, -1 - dim), dim)
    stacked = {name for name, (_, place) in tables.layout.source.items() if place is not None}
    return result | {k: v for k, v in padded.items() if k not in result and k not in stacked}


def _broadcast(rows: list[Tensor], order: int) -> list[Tensor]:
    lead = torch.broadcast_shapes(*(row.shape[: row.dim() - order] for row in rows))
    return [row.expand(*lead, *row.shape[row.dim() - order :]) for row in rows]


def _padded(
    plan: ContractionPlan, log_potentials: dict[Key, Tensor], tables: Tables, on: Tensor
) -> dict[Key, Tensor]:
    """As :func:`pad`, where each factor's table has a key of its own or that of its tie."""
    result: dict[Key, Tensor] = {}
    for key, value in log_potentials.items():
        result[key] = value
        if isinstance(key, tuple) or key in plan.variable:
            mask = on[..., _places(plan, key if isinstance(key, tuple) else (key,))]
            if not bool(mask.all()):
                mask = mask[..., None] if isinstance(key, tuple) else mask
                result[key] = torch.where(mask, value, 0.0)
    parts: list[tuple[list[str], Tensor]] = []
    constants = torch.zeros(on.shape, dtype=tables.dtype, device=tables.device)
    for key, factors in _by_table(plan, log_potentials).items():
        if key in plan.variable:
            continue  # evidence, masked above
        inside = on[..., torch.stack([_places(plan, f.scope) for f in factors])]  # (*batch, factors, order)
        touched = ~inside.all(-1)
        if not bool(touched.any()):
            continue
        value, order = log_potentials[key], factors[0].order
        alone = len(factors) == 1 and key not in plan.ties and value.shape[:-order] == on.shape[:-1]
        copied = _beyond_evidence(value, inside) if order > 1 and not alone else touched
        copied = copied.reshape(-1, len(factors)).any(0)
        if key in plan.factor and bool(copied.any()):
            copied = torch.ones_like(copied)  # a tie named like a factor can't be copied for that one alone
        for i in copied.nonzero().flatten().tolist():
            result[factors[i].name] = torch.where(_wide(touched[..., i], order), 0.0, value)
        left = (~copied & touched.reshape(-1, len(factors)).any(0)).nonzero().flatten()
        if len(left):
            inside, scopes = inside[..., left, :], [factors[i].scope for i in left.tolist()]
            for axis in range(order):
                only = inside[..., axis] & (inside.sum(-1) == 1)
                taken = torch.where(only[..., None], -_at_zero(value, order, axis)[..., None, :], 0.0)
                parts.append(([scope[axis] for scope in scopes], taken))
            none = torch.where(inside.any(-1), 0.0, -_at_zero(value, order, 0)[..., :1])
            first = _places(plan, [scope[0] for scope in scopes]).to(on.device)
            constants = constants.index_add(-1, first, none.to(constants.dtype))
    named = {name for names, _ in parts for name in names}
    off = (~on).reshape(-1, len(plan.variables)).any(0).tolist()
    needed = {v.name for v, inactive in zip(plan.variables, off, strict=True) if inactive}
    # At least one piece of evidence, so that the result has the batch shape of the mask.
    needed = needed | named or {plan.variables[0].name}
    for group in plan.by_cardinality:
        names = tuple(name for name in group if name in needed)
        if names:
            result = add_evidence(plan, result, names, _evidence(plan, names, on, constants, parts))
    return used(plan, result)


def _evidence(
    plan: ContractionPlan,
    names: tuple[str, ...],
    on: Tensor,
    constants: Tensor,
    parts: list[tuple[list[str], Tensor]],
) -> Tensor:
    """Clamps of inactive variables, and what takes back the tables that touch them: (*batch, len, cardinality)."""
    size, where = plan.variable[names[0]].cardinality, _places(plan, names).to(on.device)
    place = {name: i for i, name in enumerate(names)}
    total = torch.zeros(*on.shape[:-1], len(names), size, dtype=constants.dtype, device=on.device)
    for scope, taken in parts:
        if scope[0] in place and taken.shape[-1] == size:
            index = torch.tensor([place[name] for name in scope], device=on.device)
            total = total.index_add(-2, index, taken.to(total.dtype))
    others = torch.arange(size, device=on.device) > 0
    clamp = constants[..., where, None].masked_fill(others, -torch.inf)
    return torch.where(on[..., where, None], total, clamp)


def _beyond_evidence(value: Tensor, inside: Tensor) -> Tensor:
    """Where evidence can't take back a touched factor of a table, (*batch, factors)."""
    order = inside.shape[-1]
    count = inside.sum(-1)
    result = (count > 1) & (count < order)
    for axis in range(order):
        hole = (_at_zero(value, order, axis) == -torch.inf).any(-1)[..., None]
        result = result | (inside[..., axis] & (count == 1) & hole)
    return result | ((count == 0) & (_at_zero(value, order, 0)[..., :1] == -torch.inf))


def _wide(mask: Tensor, order: int) -> Tensor:
    """(*batch) with ``order`` dimensions of size 1 behind it."""
    return mask.reshape(*mask.shape, *[1] * order)


def _at_zero(value: Tensor, order: int, axis: int) -> Tensor:
    """A table (*batch, *cardinalities) where every variable but one has value 0, (*batch, cardinality)."""
    return value[(..., *[slice(None) if i == axis else 0 for i in range(order)])]


@eager
def unpad(
    plan: ContractionPlan,
    found: Mapping[Key, Float[Tensor, "..."]],
    log_potentials: LogPotentials,
    active: Active,
) -> dict[Key, Float[Tensor, "..."]]:
    """Marginals of padded log-potentials without the padding.

    Args:
        plan: of all.
        found: ``marginals(plan, pad(plan, log_potentials, active))``.
        log_potentials, active: as given to :func:`pad`.

    Returns:
        The keys of ``log_potentials`` plus every variable. Inactive variables and factors that touch one: 0. Ties:
        expected counts over the factors of active variables.

    Raises:
        GraphError, ShapeError: as in :func:`pad`.
    """
    tables = Tables(plan, log_potentials)
    on = _mask(plan, active, tables.batch_shape, tables.device)
    apart, found = _unstacked(tables), dict(found)
    for name, (key, place) in tables.layout.source.items():
        if place is not None:
            found[name] = found[key].select(-len(tables.shapes[key]), place)
    clean: dict[Key, Tensor] = {}
    for v in plan.variables:
        mask = on[..., _places(plan, (v.name,))]
        clean[v.name] = torch.where(mask, found[v.name], 0.0)
    sources, padded = _by_table(plan, apart), _padded(plan, apart, tables, on)
    single: dict[str, Tensor] = {}
    for key in apart:
        if isinstance(key, tuple):
            clean[key] = torch.stack([clean[name] for name in key], -2)
        elif key not in plan.variable:
            factors = sources.get(key, [])
            event = _event(plan, key)
            zero = torch.zeros(*on.shape[:-1], *event, dtype=tables.dtype, device=on.device)
            total = found[key] if key in plan.ties and key in padded else zero
            order = len(event)
            taken = [total.new_zeros(*on.shape[:-1], size) for size in event]
            for factor in factors:
                inside = on[..., _places(plan, factor.scope)]
                touched, count = ~inside.all(-1), inside.sum(-1)
                if factor.name in padded and (factor.name != key or key not in plan.ties):
                    total = total + torch.where(_wide(touched, order), 0.0, found[factor.name])
                    continue
                # A table that evidence took back: all but one of its variables are 0, and that one's marginal is known.
                for axis, name in enumerate(factor.scope):
                    alone = inside[..., axis] & (count == 1) | (count == 0 if axis == 0 else False)
                    taken[axis] = taken[axis] + torch.where(
                        alone[..., None] & touched[..., None], found[name], 0.0
                    )
                if bool(
                    (touched & (count > 1)).any()
                ):  # a masked copy: its variables are independent through it
                    joint = _outer([found[name] for name in factor.scope])
                    total = total - torch.where(_wide(touched & (count > 1), order), joint, 0.0)
            total = total.clone()
            for axis in range(order):
                row = _at_zero(total, order, axis)
                row.copy_(row - taken[axis])
            single[key] = total.clamp(min=0.0)
    for key in log_potentials:
        if key in single:
            clean[key] = single[str(key)]
        elif key not in clean:  # a tuple of factors
            zero = torch.zeros(*on.shape[:-1], *tables.shapes[key][1:], dtype=tables.dtype, device=on.device)
            rows = [
                single[name] if tables.layout.source[name] == (key, i) else zero for i, name in enumerate(key)
            ]
            clean[key] = torch.stack(rows, -len(tables.shapes[key]))
    return clean


def _event(plan: ContractionPlan, key: str) -> tuple[int, ...]:
    """The cardinalities of a factor's or tie's table."""
    scope = plan.factor[key if key in plan.factor else plan.ties[key][0]].scope
    return tuple(plan.variable[v].cardinality for v in scope)


def _outer(marginals: list[Tensor]) -> Tensor:
    """Product of (*batch, cardinality) marginals, (*batch, *cardinalities)."""
    result = marginals[0]
    for other in marginals[1:]:
        lead = other.dim() - 1
        result = result[..., None] * other.reshape(*other.shape[:-1], *[1] * (result.dim() - lead), -1)
    return result


def lengths(plan: ContractionPlan, n: Int[Tensor, "*batch"]) -> Bool[Tensor, "*batch variables"]:
    """Which variables are active when only the first n tokens are there, for :func:`pad`.

    Token x_i is active where i < n. Latents z_i follow the token of their number if there is one for each token (z0
    .. z{L-1}, as in a hidden Markov model); else all latents stay active. For anything else give :func:`pad` a mapping.

    Args:
        plan: its tokens are called x0 .. x{L-1}.
        n: integers from 0 to L.

    Returns:
        bool, in the order of ``plan.variables``.

    Raises:
        GraphError: tokens of other names.
        ShapeError: not integers from 0 to L.
    """
    tokens = {v.name for v in plan.variables if not v.latent}
    latents = {v.name for v in plan.variables if v.latent}
    if tokens != {f"x{i}" for i in range(len(tokens))}:
        raise GraphError(
            f"lengths needs tokens called x0 .. x{len(tokens) - 1}, found {sorted(tokens)[:6]}; say which variables "
            "are active with a mapping"
        )
    n = observed_values("n", n, len(tokens) + 1)
    sitewise = latents == {f"z{i}" for i in range(len(tokens))}
    follows = [sitewise or not v.latent for v in plan.variables]
    site = [int(v.name[1:]) if f else -1 for v, f in zip(plan.variables, follows, strict=True)]
    return torch.tensor(site, device=n.device) < n[..., None]


def _mask(plan: ContractionPlan, active: Active, batch: tuple[int, ...], device: torch.device) -> Tensor:
    """(*batch, variables) bool."""
    what = "active"
    if isinstance(active, Tensor):
        masks = {what: (active, torch.arange(len(plan.variables)))}
        names: tuple[str, ...] = tuple(plan.variable)
        expected = {what: len(names)}
    else:
        masks, expected = {}, {}
        given: Iterable[tuple[Key, Tensor]] = active.items()
        for key, value in given:
            names = known_names(plan, key if isinstance(key, tuple) else (key,), what)
            value = value if isinstance(key, tuple) or not isinstance(value, Tensor) else value[..., None]
            masks[f"active[{key!r}]"], expected[f"active[{key!r}]"] = (
                (value, _places(plan, names)),
                len(names),
            )
    for what, (value, _) in masks.items():
        if (
            not isinstance(value, Tensor)
            or value.dtype != torch.bool
            or value.shape[-1:] != (expected[what],)
        ):
            found = (
                f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            )
            raise ShapeError(f"{what}: expected bool of shape (*batch, {expected[what]}), found {found}")
    try:
        shape = torch.broadcast_shapes(batch, *(value.shape[:-1] for value, _ in masks.values()))
    except RuntimeError as error:
        raise ShapeError(
            f"active must broadcast with the batch shape {batch} of the log-potentials; found "
            f"{[tuple(value.shape) for value, _ in masks.values()][:4]}"
        ) from error
    result = torch.ones(*shape, len(plan.variables), dtype=torch.bool, device=device)
    for value, places in masks.values():
        result[..., places] = result[..., places] & value.to(device)
    return result


def _places(plan: ContractionPlan, names: Iterable[str]) -> Tensor:
    """Places of variables in ``plan.variables``."""
    place = _numbered(plan)
    return torch.tensor([place[name] for name in names], dtype=torch.int64)


@lru_cache(maxsize=64)
def _numbered(plan: ContractionPlan) -> dict[str, int]:
    return {v.name: i for i, v in enumerate(plan.variables)}


def _by_table(plan: ContractionPlan, log_potentials: LogPotentials) -> dict[str, list[Factor]]:
    """Key of log-potentials -> the factors that take their table from it."""
    groups: dict[str, list[Factor]] = {}
    for factor in plan.factors:
        groups.setdefault(factor.name if factor.name in log_potentials else str(factor.tie), []).append(
            factor
        )
    return groups
