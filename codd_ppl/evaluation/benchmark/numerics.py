"""Correctness: float32 answers against a float64 recursion in log space, on long, peaked and contradictory chains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codd_ppl.evaluation.benchmark.cases import Case, Inputs, make_inputs
from codd_ppl.evaluation.benchmark.tasks import STREAMED, candidates

__all__ = ["Problem", "errors", "log_space", "problems"]


@dataclass(frozen=True)
class Problem:
    """A chain that is hard in one way."""

    name: str
    inputs: Inputs


def problems(quick: bool = False) -> list[Problem]:
    """Long chains, peaked ones (standard deviations of 30 and 100 nats), and evidence that contradicts the table."""
    found = []
    for N in (128, 1000) if quick else (128, 1000, 10_000):
        found.append(Problem(f"hidden Markov, N={N:,}, C=8", make_inputs(Case("shared", 2, N, 8))))
    for sd in (30.0, 100.0):
        rows = make_inputs(Case("shared", 2, 128, 8), spread=sd)
        free = sd * torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
        if sd == 30.0:
            found.append(Problem("N(0, 30²), rows normalised, N=128, C=8", rows))
        found.append(Problem(f"N(0, {sd:.0f}²), N=128, C=8", Inputs(rows.case, free, rows.unary)))
    table = torch.tensor([[0.0, -150.0], [-200.0, 0.0]])
    path = torch.tensor([[0, 0, 1], [1, 1, 0]])
    unary = torch.full((2, 3, 2), -torch.inf).scatter(-1, path[..., None], 0.0)
    found.append(
        Problem("contradiction: needs exp(-150), exp(-200)", Inputs(Case("shared", 2, 3, 2), table, unary))
    )
    return found


def log_space(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """log Z (batch) and marginals of the sites (batch, sites, states), in float64 by logsumexp along the chain."""
    edges = inputs.edges.double().unbind(1)
    alpha, beta = [torch.zeros(edges[0].shape[:2], dtype=torch.float64)], []
    for edge in edges:
        alpha.append((alpha[-1][..., None] + edge).logsumexp(1))
    beta.append(torch.zeros_like(alpha[0]))
    for edge in reversed(edges):
        beta.append((edge + beta[-1][:, None]).logsumexp(2))
    total = alpha[-1].logsumexp(-1)
    marginals = (torch.stack(alpha, 1) + torch.stack(beta[::-1], 1) - total[:, None, None]).exp()
    return total, marginals


def errors(problem: Problem, threads: int = 1) -> dict[str, dict[str, Any]]:
    """Candidate -> largest errors of log Z (nats) and of site marginals; "nan" where the answer is none."""
    truth = dict(zip(("log_partition", "marginals"), log_space(problem.inputs), strict=True))
    found: dict[str, dict[str, Any]] = {}
    for query in truth:
        for candidate in candidates(query, problem.inputs, threads):
            if candidate.name.endswith(STREAMED):
                continue
            row = found.setdefault(candidate.name, {"kind": candidate.kind})
            if candidate.call is None:
                row[query] = candidate.reason.split(":")[0]
                continue
            try:
                value = candidate.read(candidate.call()).detach().double()
            except Exception as error:
                if candidate.kind != "peer":
                    raise
                row[query] = type(error).__name__
                continue
            worst = float((value - truth[query]).abs().max())
            row[query] = worst if math.isfinite(worst) else "inf" if math.isinf(worst) else "nan"
    return found
