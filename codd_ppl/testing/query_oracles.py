"""Brute-force oracles of the queries about subsets, evidence and pairs of distributions."""

import math
from collections.abc import Mapping, Sequence

import torch

from codd_ppl.graphs import FactorGraph
from codd_ppl.testing.oracles import enumerate_log_joint
from codd_ppl.typing import Assignment, Float, LogPotentials, Tensor

__all__ = [
    "brute_condition",
    "brute_cross_entropy",
    "brute_expectation",
    "brute_k_best",
    "brute_kl",
    "brute_log_prob",
    "brute_marginal",
]


def _log_probabilities(graph: FactorGraph, log_potentials: LogPotentials) -> Tensor:
    """(*batch, joint values), normalised; nan where no joint value is possible."""
    joint = enumerate_log_joint(graph, log_potentials)
    return joint.flatten(joint.dim() - len(graph)).log_softmax(-1)


def _values(graph: FactorGraph) -> dict[str, Tensor]:
    """Every variable's value in each joint value, (joint values), row-major."""
    cards = [variable.cardinality for variable in graph]
    grids = torch.meshgrid(*(torch.arange(card) for card in cards), indexing="ij")
    return {variable.name: grid.flatten() for variable, grid in zip(graph, grids, strict=True)}


def _expected(log_p: Tensor, value: Tensor) -> Tensor:
    """E_p[value]: 0 where p is 0, and inf where value is inf and p is anything else, however small."""
    counted = (log_p > -math.inf) & (value < math.inf)
    forbidden = ((log_p > -math.inf) & (value == math.inf)).any(-1)
    total = torch.where(counted, log_p.exp() * torch.where(counted, value, 0.0), 0.0).sum(-1)
    return torch.where(forbidden, math.inf, total)


def brute_marginal(
    graph: FactorGraph, log_potentials: LogPotentials, names: Sequence[str]
) -> Float[Tensor, "..."]:
    """Joint marginal of some variables, (*batch, *cardinalities) in the order of ``names``."""
    probabilities = _log_probabilities(graph, log_potentials).exp()
    values, cards = _values(graph), {variable.name: variable.cardinality for variable in graph}
    index = torch.zeros(probabilities.shape[-1], dtype=torch.int64)
    for name in names:
        index = index * cards[name] + values[name]
    table = probabilities.new_zeros(*probabilities.shape[:-1], math.prod(cards[name] for name in names))
    table = table.index_add(-1, index, probabilities)
    return table.reshape((*table.shape[:-1], *(cards[name] for name in names)))


def brute_log_prob(
    graph: FactorGraph, log_potentials: LogPotentials, assignment: Assignment
) -> Float[Tensor, "..."]:
    """Log of the sum of the probabilities of the joint values that agree with a partial assignment."""
    logs, values = _log_probabilities(graph, log_potentials), _values(graph)
    for name, value in assignment.items():
        logs = torch.where(values[name] == value[..., None], logs, -math.inf)
    return logs.logsumexp(-1)


def brute_condition(
    graph: FactorGraph,
    log_potentials: LogPotentials,
    hard: Mapping[str, Tensor] | None = None,
    soft: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "..."]:
    """Enumerated log-joint given evidence, unnormalised: (*batch, *cardinalities). A hard value of -1 is none."""
    joint, values = enumerate_log_joint(graph, log_potentials), _values(graph)
    logs = joint.flatten(joint.dim() - len(graph))
    for name, value in (hard or {}).items():
        observed = value[..., None]
        logs = torch.where((observed < 0) | (values[name] == observed), logs, -math.inf)
    for name, likelihood in (soft or {}).items():
        logs = logs + likelihood[..., values[name]]
    return logs.reshape(*logs.shape[:-1], *(variable.cardinality for variable in graph))


def brute_k_best(graph: FactorGraph, log_potentials: LogPotentials, k: int) -> Float[Tensor, "*batch k"]:
    """The k largest joint log-scores, descending; -inf where there are fewer possible joint values."""
    joint = enumerate_log_joint(graph, log_potentials)
    flat = joint.flatten(joint.dim() - len(graph))
    best = flat.topk(min(k, flat.shape[-1]), dim=-1).values
    return torch.nn.functional.pad(best, (0, k - best.shape[-1]), value=-math.inf)


def brute_cross_entropy(
    graph: FactorGraph, p_log_potentials: LogPotentials, q_log_potentials: LogPotentials
) -> Float[Tensor, "*batch"]:
    """``- sum_x p(x) log q(x)`` in nats, ``0 log 0 = 0``."""
    log_p, log_q = (_log_probabilities(graph, t) for t in (p_log_potentials, q_log_potentials))
    return _expected(log_p, -log_q)


def brute_kl(
    graph: FactorGraph, p_log_potentials: LogPotentials, q_log_potentials: LogPotentials
) -> Float[Tensor, "*batch"]:
    """``sum_x p(x) (log p(x) - log q(x))`` in nats, ``+inf`` where p allows what q forbids."""
    log_p, log_q = (_log_probabilities(graph, t) for t in (p_log_potentials, q_log_potentials))
    return _expected(log_p, log_p - log_q)


def brute_expectation(
    graph: FactorGraph, log_potentials: LogPotentials, statistics: LogPotentials
) -> Float[Tensor, "..."]:
    """``sum_x p(x) sum_f s_f(x_f)``; factors without a statistic count 0, and so does ``-inf`` at probability 0."""
    given = {name for key in statistics for name in (key if isinstance(key, tuple) else (key,))}
    zeros: dict[str | tuple[str, ...], Tensor] = {
        name: torch.zeros(graph.shape(name), dtype=torch.float64)
        for name, factor in graph.factors.items()
        if name not in given and factor.tie not in given
    }
    total = enumerate_log_joint(graph, {**zeros, **statistics})
    total = total.flatten(total.dim() - len(graph))
    p = _log_probabilities(graph, log_potentials).exp()
    return torch.where(p == 0, 0.0, p * total).sum(-1)
