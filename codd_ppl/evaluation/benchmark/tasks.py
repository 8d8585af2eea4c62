"""The tasks T1 to T6: which queries on which sizes, answered by whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from codd_ppl.evaluation.benchmark import plain, plain_graphs
from codd_ppl.evaluation.benchmark.cases import Case, Inputs, chains, make_inputs
from codd_ppl.evaluation.benchmark.ours import answers, our_plan, potentials
from codd_ppl.evaluation.benchmark.peers import peer_candidates
from codd_ppl.evaluation.benchmark.rounds import Candidate
from codd_ppl.inference import log_score

__all__ = ["STREAMED", "TASKS", "Cell", "candidates", "cells", "comparison"]

TASKS = {
    "T1": "log_partition, and its gradient",
    "T2": "marginals with edges",
    "T3": "mode",
    "T4": "one sample, and 64",
    "T5": "evidence over a vocabulary (a coupling's inner loop)",
    "T6": "random tree",
}
"""What the tables are about; beside these there are "memory", "numerics" and "scaling"."""

QUERIES = {
    "T1": ("log_partition", "gradient"),
    "T2": ("marginals",),
    "T3": ("mode",),
    "T4": ("sample", "samples"),
    "T5": ("log_partition", "sample"),
    "T6": ("log_partition", "marginals"),
}


STREAMED = ", streamed"
"""Ends the name of plain code that takes the exponential of each edge's table when its turn comes."""


@dataclass(frozen=True)
class Cell:
    """One row of a table: a query on a case."""

    task: str
    query: str
    case: Case

    @property
    def name(self) -> str:
        """Unique among the cells."""
        return f"{self.task} {self.query} {self.case.name}"

    def candidates(self, threads: int = 1) -> tuple[Inputs, list[Candidate]]:
        """The inputs, and all who answer: plain code first, then ours, then the peers."""
        inputs = make_inputs(self.case)
        return inputs, candidates(self.query, inputs, threads)


def cells(task: str, quick: bool = False) -> list[Cell]:
    """The rows of a task. ``quick``: the smaller sizes."""
    if task == "T5":
        V, L = (2048, 16) if quick else (32768, 32)
        cases = [Case("tokens", B, L, H, V) for H in ((64,) if quick else (256, 1024)) for B in (1, 8)]
    elif task == "T6":
        cases = [Case("tree", 8, 64, C) for C in ((16,) if quick else (16, 64))]
    else:
        states, sites = ((8, 32), (32,)) if quick else ((8, 32, 128, 1024), (32, 128))
        cases = [c for layout in ("shared", "full") for c in chains(layout, states, sites)]
        # A table for each of 127 edges over 1,024 states is half a gigabyte, and its gradient as much again.
        cases = [c for c in cases if not (c.layout == "full" and c.states == 1024 and c.sites > 32)]
    return [Cell(task, query, case) for query in QUERIES[task] for case in cases]


def candidates(query: str, inputs: Inputs, threads: int = 1) -> list[Candidate]:
    """All who answer a query: plain code first, then ours, then the peers."""
    plains = [Candidate(name, "plain", call, read=read) for name, call, read in _plain_calls(query, inputs)]
    peers = peer_candidates(query, inputs, threads) if inputs.case.layout in ("shared", "full") else []
    return [*plains, answers(query, inputs), *peers]


def _plain_calls(
    query: str, inputs: Inputs
) -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], Tensor]]]:
    layout = inputs.case.layout
    if layout == "tokens":
        assert inputs.emission is not None
        ready = inputs.emission.exp()
        call = plain_graphs.tokens_log_partition if query == "log_partition" else plain_graphs.tokens_sample
        yield "plain, exp kept", partial(call, inputs, ready), _itself
        yield "plain", partial(call, inputs), _itself
        return
    if layout == "tree":
        if query == "log_partition":
            yield "plain", partial(plain_graphs.tree_log_partition, inputs), _itself
        else:
            leaf = inputs.requiring_grad()
            yield "plain autograd", partial(_tree_marginals, leaf), partial(_sites, inputs=inputs)
        return
    streams = (False, True) if layout == "full" else (False,)
    if query == "log_partition":
        for stream in streams:
            yield _named("plain", stream), partial(plain.log_partition, inputs, stream), _itself
    elif query in ("gradient", "marginals"):
        leaves = inputs.requiring_grad()
        read = partial(_sites, inputs=inputs) if query == "marginals" else _first
        for stream in streams:
            yield _named("plain autograd", stream), partial(plain.gradient, leaves, stream), read
        if query == "marginals":
            yield "plain two passes", partial(plain.forward_backward, inputs), _first
    elif query == "mode":
        yield "plain", partial(plain.mode, inputs), _itself
    else:
        yield "plain", partial(plain.sample, inputs, 64 if query == "samples" else 1), _itself


def _named(name: str, stream: bool) -> str:
    return name + STREAMED if stream else name


def _itself(result: Any) -> Any:
    return result


def _first(result: Any) -> Any:
    return result[0]


def _tree_marginals(inputs: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(plain_graphs.tree_log_partition(inputs).sum(), [inputs.table])


def _sites(gradients: tuple[Tensor, ...], inputs: Inputs) -> Tensor:
    """Marginals of the sites, (batch, sites, states), from gradients with respect to evidence or edges."""
    if inputs.unary is not None:
        return gradients[0]
    edges = gradients[0]
    if inputs.parents:
        child = inputs.parents.index(0)
        return torch.cat((edges[:, child - 1 : child].sum(-1), edges.sum(-2)), 1)
    return torch.cat((edges[:, :1].sum(-1), edges.sum(-2)), 1)


def comparison(query: str, inputs: Inputs, candidates: list[Candidate]) -> Callable[[Tensor], float] | None:
    """From an answer to its error: against the plain code's, or for modes the score that is missing to the best."""
    if query in ("sample", "samples"):
        return None
    plan = our_plan(inputs.case, inputs.parents)
    names = [f"x{i}" for i in range(inputs.case.sites)]

    def score(path: Tensor) -> Tensor:
        return log_score(plan, potentials(plan, inputs), dict(zip(names, path.unbind(-1), strict=True)))

    first = next(c for c in candidates if c.kind == "plain")
    assert first.call is not None
    reference = first.read(first.call()).detach()
    if query == "mode":
        reference = score(reference)

    def compare(answer: Tensor) -> float:
        value = score(answer) if query == "mode" else answer.detach()
        return float(((value - reference).abs() / reference.abs().clamp(min=1.0)).max())

    return compare
