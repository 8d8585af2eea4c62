"""How `codd_ppl.inference` is asked: the one place that lays out its inputs."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan, compile
from codd_ppl.evaluation.benchmark.cases import Case, Inputs
from codd_ppl.evaluation.benchmark.rounds import Candidate
from codd_ppl.graphs import topologies
from codd_ppl.inference import log_partition, marginals, mode, sample
from codd_ppl.typing import LogPotentials

__all__ = ["OURS", "answers", "gradient", "our_plan", "potentials"]

OURS = "codd_ppl"
"""Name of our column."""


@lru_cache(maxsize=64)
def our_plan(case: Case, parents: tuple[int, ...] = ()) -> ContractionPlan:
    """The compiled graph of a case."""
    if case.layout == "tokens":
        return compile(topologies.hidden_markov(case.sites, case.vocab, case.states))
    if case.layout == "tree":
        return compile(topologies.tree(parents, case.states))
    return compile(topologies.chain(case.sites, case.states, tie="edge" if case.layout == "shared" else None))


@lru_cache(maxsize=64)
def _names(sites: int) -> tuple[str, ...]:
    return tuple(f"x{i}" for i in range(sites))


def potentials(plan: ContractionPlan, inputs: Inputs) -> LogPotentials:
    """Log-potentials under the keys that fit: called, and timed, with each query."""
    case, found = inputs.case, dict[Any, Tensor]()
    if case.layout in ("full", "tree"):
        found[tuple(plan.factor)] = inputs.table  # all edges under one key, in the order of their declaration
        return found
    assert inputs.unary is not None
    found[_names(case.sites)] = inputs.unary
    if inputs.emission is None:
        found["edge"] = inputs.table
    else:
        found["transition"], found["emission"] = inputs.table, inputs.emission
        found["initial"] = torch.zeros(case.states, dtype=inputs.table.dtype)
    return found


def gradient(plan: ContractionPlan, inputs: Inputs) -> tuple[Tensor, ...]:
    """Gradients of the sum of log Z."""
    return torch.autograd.grad(log_partition(plan, potentials(plan, inputs)).sum(), inputs.leaves)


def answers(query: str, inputs: Inputs) -> Candidate:
    """Our candidate for a query: "log_partition", "gradient", "marginals", "mode", "sample" or "samples" (64)."""
    plan, names = our_plan(inputs.case, inputs.parents), _names(inputs.case.sites)
    if query == "gradient":
        return Candidate(OURS, "ours", partial(gradient, plan, inputs.requiring_grad()), read=lambda g: g[0])
    calls = {
        "log_partition": lambda: log_partition(plan, potentials(plan, inputs)),
        "marginals": lambda: marginals(plan, potentials(plan, inputs)),
        "mode": lambda: mode(plan, potentials(plan, inputs)),
        "sample": lambda: sample(plan, potentials(plan, inputs)),
        "samples": lambda: sample(plan, potentials(plan, inputs), (64,)),
    }
    reads = {
        "marginals": lambda found: torch.stack([found[v] for v in names], 1),
        "mode": lambda found: torch.stack([found[v] for v in names], -1),
    }
    read = reads.get(query, lambda found: found)
    return Candidate(OURS, "ours", calls[query], read=read)
