"""Expected values of statistics that add up over the factors."""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import PotentialsError
from codd_ppl.inference.evidence import used
from codd_ppl.inference.queries import marginals
from codd_ppl.inference.tables import Key, Tables
from codd_ppl.typing import Float, LogPotentials

__all__ = ["expectation"]


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
    zeros: dict[Key, Tensor] = {
        factor.name: torch.zeros(()).expand([plan.variable[v].cardinality for v in factor.scope])
        for factor in plan.factors
        if factor.name not in statistics and factor.tie not in statistics
    }
    try:
        tables = Tables(plan, {**zeros, **statistics})
    except PotentialsError as error:
        raise PotentialsError(str(error).replace("log_potentials", "statistics")) from error
    tables.raw = dict(statistics)
    bad = [key for key, value in statistics.items() if bool((~(value < torch.inf)).any())]
    if bad:
        raise PotentialsError(f"statistics[{bad[0]!r}] holds NaN or +inf; statistics must be finite or -inf")
    return tables


def _weights(plan: ContractionPlan, log_potentials: LogPotentials, given: Tables) -> dict[Key, Tensor]:
    """Key of a statistic -> marginals of what it applies to, summed over the factors of a tie."""
    own: dict[Key, Tensor] = dict(log_potentials)
    tables = [key for key in given.raw if isinstance(key, str) and key not in plan.variable]
    # Marginals come under the keys of the log-potentials: where those serve other factors, each gets its own table.
    for table in tables:
        if table not in own or _users(plan, own, table) != _users(plan, given.raw, table):
            tie = plan.factor[table].tie if table in plan.factor else table
            for name in plan.ties[tie] if tie is not None else ():
                if plan.factor[name].order > 1 and name not in own and tie in own:
                    own[name] = own[tie]
    own = used(plan, own)
    found = marginals(plan, own)
    weights: dict[Key, Tensor] = {}
    for key in given.raw:
        if isinstance(key, tuple):
            weights[key] = torch.stack([found[name] for name in key], -2)
        elif key not in tables or (key in own and _users(plan, own, key) == _users(plan, given.raw, key)):
            weights[key] = found[key]
        else:
            users = [plan.factor[name] for name in _users(plan, given.raw, key)]
            parts = [found[f.name] if f.order > 1 else found[f.scope[0]] for f in users]
            if parts:  # else every factor of the tie has a statistic of its own
                weights[key] = sum(parts[1:], parts[0])
    return weights


def _users(plan: ContractionPlan, given: LogPotentials, key: str) -> list[str]:
    """Names of the factors that take their table from a key."""
    return [n for n in plan.ties[key] if n == key or n not in given] if key in plan.ties else [key]
