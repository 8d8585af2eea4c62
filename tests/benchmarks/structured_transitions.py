"""Would transitions with structure pay? ``python tests/benchmarks/structured_transitions.py``; writes the json here.

For hidden Markov models of 512 and 1,024 states against the library's dense route, processor time, medians of
interleaved rounds:

    expectation   one expectation step of Baum-Welch; K blocks as K models of H / K states, each with its share of
                  the responsibilities (their likelihoods first, so two passes upwards)
    sweep         one sweep of the projection without a graph; small emission tables go along blocks, which the library
                  finds (path_projection.diagonal_blocks), large ones take the same route as without
    product       (batch, H) @ (H, H) alone, against blocks, rank r, and rank r plus a sparse matrix (CSR)

What pays is in the library: blocks in the sweep. The rest is in this script alone.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from codd_ppl.compiler import compile
from codd_ppl.graphs import topologies
from codd_ppl.inference.projection import project
from codd_ppl.potentials.expectation import Expectation
from codd_ppl.potentials.running_counts import RunningCounts

SITES, BATCH, ROUNDS, COMPONENTS = 32, 32, 5, (2, 4, 8)
SIZES = ((1024, 27), (512, 27), (1024, 4096))


def compare(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            taken[name].append(time.process_time() - began)
    return {name: round(1e3 * statistics.median(t[1:]), 2) for name, t in taken.items()}


def model(states: int, vocab: int) -> tuple[Expectation, dict[str, RunningCounts]]:
    graph = topologies.hidden_markov(SITES, vocab, states)
    shapes = {"initial": (states,), "emission": (states, vocab), "transition": (states, states)}
    tables = {k: RunningCounts(torch.rand(s), torch.full(s[-1:], 1e-3)) for k, s in shapes.items()}
    return Expectation(graph), tables


def expectation(states: int, vocab: int) -> dict[str, float]:
    blocks = torch.randint(vocab, (BATCH, SITES))
    dense, tables = model(states, vocab)
    calls: dict[str, Callable[[], object]] = {"dense": lambda: dense(tables, blocks)}
    for count in COMPONENTS:
        parts = [model(states // count, vocab) for _ in range(count)]

        def each(parts=parts) -> list[object]:
            shares = torch.stack([part.log_likelihood(own, blocks) for part, own in parts]).softmax(0)
            return [shares, *(part(own, blocks) for part, own in parts)]

        calls[f"{count} blocks"] = each
    return compare(calls)


@torch.no_grad()
def sweep(states: int, vocab: int) -> dict[str, float]:
    graph = topologies.hidden_markov(SITES, vocab, states)
    plan, log_q = compile(graph), torch.randn(BATCH, SITES, vocab).log_softmax(-1)
    masked, tokens = torch.ones(BATCH, SITES, dtype=torch.bool), torch.zeros(BATCH, SITES, dtype=torch.int64)
    tables = {"initial": torch.randn(states).log_softmax(-1)}
    tables["emission"] = torch.randn(states, vocab).log_softmax(-1)
    calls: dict[str, Callable[[], object]] = {}
    for count in (1, *COMPONENTS):
        block = torch.arange(states) // (states // count)
        own = torch.randn(states, states).masked_fill(block != block[:, None], -torch.inf).log_softmax(-1)
        given = (plan, {**tables, "transition": own}, graph.tokens, log_q, masked)
        calls["dense" if count == 1 else f"{count} blocks"] = lambda g=given: project(*g, tokens=tokens)
    return compare(calls)


@torch.no_grad()
def product(states: int) -> dict[str, float]:
    rows, dense = torch.rand(BATCH, states), torch.rand(states, states)
    calls: dict[str, Callable[[], object]] = {"dense": lambda: [rows @ dense for _ in range(SITES)]}
    for count in COMPONENTS:
        stack = torch.rand(count, states // count, states // count)

        def blocks(stack: Tensor = stack) -> list[Tensor]:
            cut = rows.unflatten(-1, (len(stack), -1)).transpose(0, 1)
            return [torch.bmm(cut, stack).transpose(0, 1).flatten(1) for _ in range(SITES)]

        calls[f"{count} blocks"] = blocks
    for rank in (32, 128):
        left, right = torch.rand(states, rank), torch.rand(rank, states)
        calls[f"rank {rank}"] = lambda a=left, b=right: [rows @ a @ b for _ in range(SITES)]
        for share in (0.01, 0.05):
            some = (torch.rand(states, states) * (torch.rand(states, states) < share)).to_sparse_csr()
            calls[f"rank {rank} + {share:.0%} sparse"] = lambda a=left, b=right, s=some: [
                rows @ a @ b + (s @ rows.T).T for _ in range(SITES)
            ]
    return compare(calls)


def write(report: dict) -> None:
    target = Path(__file__).with_suffix(".json")
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, target)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*[Ss]parse", UserWarning)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = {
        "command": "python tests/benchmarks/structured_transitions.py",
        "date": str(date.today()),
        "device": f"CPU, 1 thread of {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "sites": SITES,
        "batch": BATCH,
        "models": [],
        "product_ms": {},
    }
    for states, vocab in SIZES:
        row = {"states": states, "vocab": vocab, "sweep_ms": sweep(states, vocab)}
        row["expectation_ms"] = expectation(states, vocab)
        print(row, flush=True)
        report["models"].append(row)
        write(report)
    for states in (512, 1024):
        report["product_ms"][str(states)] = product(states)
        write(report)
