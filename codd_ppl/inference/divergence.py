"""Divergence between two distributions over the variables of one plan."""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import PotentialsError
from codd_ppl.inference import loopy
from codd_ppl.inference.clique_queries import calibrated
from codd_ppl.inference.downward import Downward, outside
from codd_ppl.inference.expectations import expectation
from codd_ppl.inference.feasibility import require_feasible
from codd_ppl.inference.queries import entropy, log_partition
from codd_ppl.inference.semirings import safe_logsumexp
from codd_ppl.inference.subsets import require_possible
from codd_ppl.inference.tables import Key, Tables
from codd_ppl.inference.transforms import eager, transforming
from codd_ppl.inference.tree import upward
from codd_ppl.typing import Float, LogPotentials

__all__ = ["cross_entropy", "kl"]


@eager
def kl(
    plan: ContractionPlan, p_log_potentials: LogPotentials, q_log_potentials: LogPotentials
) -> Float[Tensor, "*batch"]:
    """Kullback-Leibler divergence KL(p || q) = E_p[log p - log q] of **all** variables, latents included, nats.

    On a forest by the chain rule (Cover and Thomas 2006, theorem 2.5.3), so that nothing large cancels:

        sum over roots KL(p(root) || q(root)) + sum over factors KL(p(children | parent) || q(children | parent)).

    Elsewhere as cross_entropy - entropy. Differentiable in both.

    Args:
        plan: of both.
        p_log_potentials, q_log_potentials: as in :func:`codd_ppl.inference.log_partition`; the keys may differ and
            batch shapes broadcast.

    Returns:
        (*batch); +inf where p allows what q forbids (the gradient is then that of the finite terms), never NaN.

    Raises:
        PotentialsError: malformed log-potentials.
        InfeasibleError: some batch element of p or q has no possible assignment.
        IntractableError: the plan is an approximation.
    """
    loopy.require_exact(plan, "kl")
    if plan.junction is not None:
        return _cross_by_expectation(plan, p_log_potentials, q_log_potentials) - entropy(
            plan, p_log_potentials
        )
    return _by_chain_rule(plan, p_log_potentials, q_log_potentials, own=True)


@eager
def cross_entropy(
    plan: ContractionPlan, p_log_potentials: LogPotentials, q_log_potentials: LogPotentials
) -> Float[Tensor, "*batch"]:
    """Cross-entropy H(p, q) = - E_p[log q] of all variables, nats: entropy(p) + kl(p, q), in one piece.

    Args, returns, raises: as in :func:`kl`.
    """
    loopy.require_exact(plan, "cross_entropy")
    if plan.junction is not None:
        return _cross_by_expectation(plan, p_log_potentials, q_log_potentials)
    return _by_chain_rule(plan, p_log_potentials, q_log_potentials, own=False)


def _by_chain_rule(plan: ContractionPlan, p: LogPotentials, q: LogPotentials, own: bool) -> Tensor:
    ours, theirs = _both(plan, p, q)
    shape = _broadcast(ours, theirs)
    up_p, total = upward(ours)
    require_feasible(ours, total)
    up_q, total = upward(theirs)
    require_feasible(theirs, total)

    def query(down_p: Downward, down_q: Downward) -> Tensor:
        result = torch.zeros(shape, dtype=torch.float64, device=ours.device)
        for root in plan.roots:
            log_p, log_q = _shaped(ours, down_p.marginal((root,))), _shaped(theirs, down_q.marginal((root,)))
            result = result + _expected(log_p, log_p if own else None, log_q)
        for index, step in enumerate(plan.steps):
            for g in range(len(step.messages)):
                joint_p, joint_q = (d.log_factor_marginal(index, g) for d in (down_p, down_q))
                given_p = _shaped(ours, _conditional(joint_p)) if own else None
                given_q = _shaped(theirs, _conditional(joint_q))
                result = result + _expected(_shaped(ours, joint_p), given_p, given_q)
        return result

    value = outside(up_p, lambda down_p: outside(up_q, lambda down_q: query(down_p, down_q)))
    return value.to(ours.dtype)


def _conditional(joint: Tensor) -> Tensor:
    """log p(children | parent) from (batch, *children, parent); -inf where the parent's value is impossible."""
    parent = safe_logsumexp(joint.flatten(1, -2), 1)
    parent = torch.where(parent == -torch.inf, 0.0, parent)
    return joint - parent.reshape(-1, *[1] * (joint.dim() - 2), parent.shape[-1])


def _expected(log_weight: Tensor, log_p: Tensor | None, log_q: Tensor) -> Tensor:
    """sum exp(log_weight) (log_p - log_q) over the last dimension, log_p = 0 if None, and 0 where the weight is 0.

    +inf where something possible has log_q = -inf.
    """
    possible = log_weight > -torch.inf
    forbidden = possible & (log_q == -torch.inf)
    counted = possible & ~forbidden
    gap = torch.where(counted, log_q.neg() if log_p is None else log_p - log_q, 0.0)
    total = (torch.where(counted, log_weight, 0.0).exp() * gap).sum(-1, dtype=torch.float64)
    return torch.where(forbidden.any(-1), torch.inf, total)


def _shaped(tables: Tables, value: Tensor) -> Tensor:
    """(batch or 1, *event) as (*batch, entries)."""
    value = value.flatten(1)
    return value.expand(tables.batch, -1).reshape(*tables.batch_shape, value.shape[1])


def _both(plan: ContractionPlan, p: LogPotentials, q: LogPotentials) -> tuple[Tables, Tables]:
    """Their tables, in the more precise dtype of the two, and where one has none, on the device of the other."""
    ours, theirs = Tables(plan, p), Tables(plan, q)
    ours.dtype = theirs.dtype = torch.promote_types(ours.dtype, theirs.dtype)
    if not theirs.raw:
        theirs.device = ours.device
    elif not ours.raw:
        ours.device = theirs.device
    return ours, theirs


def _broadcast(ours: Tables, theirs: Tables) -> torch.Size:
    try:
        return torch.broadcast_shapes(ours.batch_shape, theirs.batch_shape)
    except RuntimeError as error:
        raise PotentialsError(
            f"the batch shapes of p and q must broadcast; found {ours.batch_shape} and {theirs.batch_shape}"
        ) from error


def _cross_by_expectation(plan: ContractionPlan, p: LogPotentials, q: LogPotentials) -> Tensor:
    """log Z_q - E_p[sum_f log psi_f^q], with the largest entry of every table of q taken out of both."""
    ours, theirs = _both(plan, p, q)
    shape = _broadcast(ours, theirs)
    centred: dict[Key, Tensor] = {}
    for key, value in theirs.raw.items():
        top = value.detach().amax([-1 - i for i in range(len(theirs.shapes[key]))], keepdim=True)
        centred[key] = value - torch.where(torch.isfinite(top), top, 0.0)
    total = log_partition(plan, centred)
    require_possible(plan, q, total)
    finite = {key: torch.where(value == -torch.inf, 0.0, value) for key, value in centred.items()}
    value = total - expectation(plan, p, finite)
    return torch.where(_forbidden(ours, theirs), torch.inf, value).expand(shape)


def _forbidden(ours: Tables, theirs: Tables) -> Tensor:
    """Whether p allows, however rarely, what an entry of q forbids, bool; by p's marginals in log space."""
    plan = ours.plan
    result = torch.zeros((), dtype=torch.bool, device=ours.device)
    if not transforming() and not any(bool((t == -torch.inf).any()) for t in theirs.raw.values()):
        return result
    factors = {factor.name for factor in plan.factors if factor.order > 1}
    with torch.no_grad():
        up, _ = calibrated(ours)
        for name, log_p in up.run().log_marginals({*plan.variable, *factors}).items():
            log_q = theirs.factor(name) if name in factors else theirs.evidence((name,))
            allowed, ruled_out = _shaped(ours, log_p > -torch.inf), _shaped(theirs, log_q == -torch.inf)
            result = result | (allowed & ruled_out).any(-1)
    return result
