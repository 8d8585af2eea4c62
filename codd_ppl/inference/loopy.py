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

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import ConvergenceWarning, InfeasibleError, IntractableError
from codd_ppl.inference.cliques import require_proper
from codd_ppl.inference.message_rounds import Rounds
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
        "marginal": "marginals(plan, log_potentials) has the beliefs of single variables and of factors",
        "log_prob": "marginals(plan, log_potentials) has the beliefs of single variables and of factors",
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
    rounds = Rounds(tables)
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
