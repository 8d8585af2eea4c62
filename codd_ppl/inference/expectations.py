"""Expected values of statistics that add up over the factors."""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import PotentialsError
from codd_ppl.inference.evidence import used
from codd_ppl.inference.queries import marginals
from codd_ppl.inference.tables import Key, Tables, layout
from codd_ppl.inference.transforms import eager, transforming
from codd_ppl.typing import Float, LogPotentials

__all__ = ["expectation"]


@eager
def expectation(
    plan: ContractionPlan, log_potentials: LogPotentials, statistics: LogPotentials
) -> Float[Tensor, "..."]:
    """Expected value of a statistic that adds up over factors, E[sum_f s_f(x_f)] (differentiable in both).

    The statistics follow the rules of log-potentials, with 0 for a factor that has none: a factor's own table goes
    before its tie's, a tie's table counts once for each factor, evidence given twice for a variable adds up. So
    ``statistics=log_potentials`` gives E[log_score], and entropy = log_partition - expectation.

    Args:
        plan, log_potentials: as in :func:`codd_ppl.inference.log_partition`.
        statistics: factor, tie or variable name, or tuple of variables -> (*extra, *batch, *cardinalities). -inf is
            legal; it counts as 0 where its probability is 0. Dimensions in front of the batch give several statistics
            at the price of one (write (extra, 1, .., *cardinalities) for one table for the whole batch).

    Returns:
        (*extra, *batch).

    Raises:
        PotentialsError: log-potentials or statistics that don't fit the plan, or hold NaN or +inf.
        InfeasibleError: some batch element has no possible assignment.
    """
    given = _checked(plan, statistics)
    weights = _weights(plan, log_potentials, given)
    total: Tensor | None = None
    for key, weight in weights.items():
        statistic, order = given.raw[key], len(given.shapes[key])
        possible = weight > 0
        term = torch.where(possible, weight * torch.where(possible, statistic, 0.0), 0.0)
        part = term.sum(list(range(-order, 0)), dtype=torch.float64)
        total = part if total is None else total + part
    tables = Tables(plan, log_potentials)
    if total is None:
        marginals(plan, used(plan, log_potentials))
        return torch.zeros(tables.batch_shape, dtype=tables.dtype, device=tables.device)
    shape = torch.broadcast_shapes(total.shape, tables.batch_shape)
    return total.to(torch.promote_types(tables.dtype, given.dtype)).expand(shape)


def _checked(plan: ContractionPlan, statistics: LogPotentials) -> Tables:
    """The statistics as tables whose ``raw`` holds the given keys and nothing else."""
    given = {name for key in statistics for name in (key if isinstance(key, tuple) else (key,))}
    zeros: dict[Key, Tensor] = {
        factor.name: torch.zeros(()).expand([plan.variable[v].cardinality for v in factor.scope])
        for factor in plan.factors
        if factor.name not in given and factor.tie not in given
    }
    try:
        tables = Tables(plan, {**zeros, **statistics})
    except PotentialsError as error:
        raise PotentialsError(str(error).replace("log_potentials", "statistics")) from error
    tables.raw = dict(statistics)
    bad = [] if transforming() else [k for k, v in statistics.items() if bool((~(v < torch.inf)).any())]
    if bad:
        raise PotentialsError(f"statistics[{bad[0]!r}] holds NaN or +inf; statistics must be finite or -inf")
    return tables


def _weights(plan: ContractionPlan, log_potentials: LogPotentials, given: Tables) -> dict[Key, Tensor]:
    """Key of a statistic -> marginals of what it applies to, summed over the factors of a tie."""
    own: dict[Key, Tensor] = dict(log_potentials)
    source = layout(plan, tuple(own)).source
    tables = [key for key in given.raw if key not in given.layout.blocks and key not in plan.variable]
    users = {key: given.users([key]) for key in tables}
    held: dict[Key, frozenset[str]] = {key: _users(plan, own, key) for key in own if key in plan.ties}
    whole: dict[Key, Key] = {}  # statistic -> the key of a tie that all its factors and no others take
    for key in tables:
        keys = {source[name][0] for name in users[key]}
        if not isinstance(key, tuple) and len(keys) == 1 and held.get(*keys) == users[key]:
            whole[key] = keys.pop()
        else:
            # Marginals come under the keys of the log-potentials: where others share it, each gets its own table.
            for tie in keys & held.keys():
                split = [n for n in held[tie] if n != tie and plan.factor[n].order > 1]
                own.update({name: own[tie] for name in split})
    own = used(plan, own)
    found, source = marginals(plan, own), layout(plan, tuple(own)).source

    def single(name: str) -> Tensor:
        factor, (key, place) = plan.factor[name], source[name]
        if factor.order == 1:
            return found[factor.scope[0]]
        return found[key] if place is None else found[key].select(-1 - factor.order, place)

    weights: dict[Key, Tensor] = {}
    for key in given.raw:
        if key in whole and _users(plan, own, whole[key]) == held[whole[key]]:
            weights[key] = found[whole[key]]
        elif key in given.layout.blocks:
            weights[key] = torch.stack([found[name] for name in key], -2)
        elif key not in users:
            weights[key] = found[key]
        elif isinstance(key, tuple):
            parts = {name: single(name) for name in key if name in users[key]}
            if parts:
                nothing, order = torch.zeros_like(next(iter(parts.values()))), plan.factor[key[0]].order
                weights[key] = torch.stack([parts.get(name, nothing) for name in key], -1 - order)
        elif users[key]:  # else every factor of the tie has a statistic of its own
            each = [single(name) for name in plan.factor if name in users[key]]
            weights[key] = sum(each[1:], each[0])
    return weights


def _users(plan: ContractionPlan, given: LogPotentials, key: Key) -> frozenset[str]:
    """Names of the factors that take their table from a key."""
    return frozenset(name for name, (found, _) in layout(plan, tuple(given)).source.items() if found == key)
