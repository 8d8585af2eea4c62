"""Ways to differentiate through the projection: ``python tests/benchmarks/projection_gradients.py TEXT`` (.txt.gz).

The gradient of log p(x0 | xt) with respect to the prior's log tables (hidden Markov model, 32 sites, 27 tokens), with

    unrolled n     autograd through n sweeps (the library's)
    constant w, n  n sweeps without a graph, then w as a constant
    last of n      autograd through the last sweep alone, which starts from the others' w
    implicit c     20 sweeps without a graph, then the implicit function theorem: with C the covariance of the tokens'
                   indicators under the law and g = one-hot(x0) - q, C l = g by c steps of conjugate gradients, and
                   the gradient is that of  log p(x0; w const) - <l, marginals(w const)>

The reference is implicit at convergence in float64. Then training with each, by the loss that is used (one sweep).
Writes projection_gradients.json here; a few minutes.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from sweeps import VOCAB, network, text
from torch import Tensor

from codd_ppl.compiler import compile
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.graphs import topologies
from codd_ppl.inference import marginals
from codd_ppl.inference.projection import project
from codd_ppl.potentials import baum_welch

SITES, BATCH, MASKED, ROUNDS = 32, 16, 0.75, 3
SIZES = ((32, 200), (256, 0))  # states, updates of training
Tables = dict[str, Tensor]


class Batch:
    """Text with some sites known, and log q of a network."""

    def __init__(self, states: int, x0: Tensor, log_q: Tensor, known: Tensor) -> None:
        graph = topologies.hidden_markov(SITES, VOCAB, states)
        self.plan, self.sites = compile(graph), graph.tokens
        self.x0, self.log_q, self.known = x0, log_q, known

    def weights(
        self, tables: Tables, sweeps: int, start: Tensor | None = None, tolerance: float = 0.0
    ) -> Tensor:
        given = (self.plan, tables, self.sites, self.log_q.to(tables["initial"].dtype), ~self.known)
        return project(*given, sweeps, tolerance, self.x0, start=start)

    def loss(self, tables: Tables, weights: Tensor) -> Tensor:
        law = CoupledCategorical(self.plan, tables, weights, self.x0, self.known)
        return -law.log_prob(self.x0).sum() / (~self.known).sum()

    def unrolled(self, tables: Tables, sweeps: int) -> Tensor:
        return self.loss(tables, self.weights(tables, sweeps))

    def constant(self, tables: Tables, sweeps: int) -> Tensor:
        with torch.no_grad():
            weights = self.weights(tables, sweeps)
        return self.loss(tables, weights)

    def last(self, tables: Tables, sweeps: int) -> Tensor:
        with torch.no_grad():
            start = self.weights(tables, sweeps - 1)
        return self.loss(tables, self.weights(tables, 1, start))

    def implicit(self, tables: Tables, steps: int, sweeps: int = 20, tolerance: float = 0.0) -> Tensor:
        with torch.no_grad():
            weights = self.weights(tables, sweeps, tolerance=tolerance)
        free = ~self.known[..., None]
        clash = self.known[..., None] & (torch.arange(VOCAB) != self.x0[..., None])
        log_w = weights.clone().requires_grad_()
        evidence = log_w.masked_fill(clash, -torch.inf)
        found = marginals(self.plan, {**tables, self.sites: evidence}, factors=False)[self.sites]
        right = (torch.nn.functional.one_hot(self.x0, VOCAB).to(found) - found.detach()) * free

        def covariance(v: Tensor) -> Tensor:
            return torch.autograd.grad(found, log_w, v, retain_graph=True)[0] * free

        solution, residual = torch.zeros_like(right), right
        direction, size = right, right.square().sum((1, 2), keepdim=True)
        for _ in range(steps):
            image = covariance(direction)
            step = size / (direction * image).sum((1, 2), keepdim=True).clamp(min=1e-30)
            solution, residual = solution + step * direction, residual - step * image
            before, size = size, residual.square().sum((1, 2), keepdim=True)
            direction = residual + size / before.clamp(min=1e-30) * direction
        total = (solution * found * free).sum() / free.sum()
        return self.loss(tables, weights) + total - total.detach()


def gradient(method: Callable[[Tables], Tensor], tables: Tables) -> Tensor:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in tables.items()}
    normal = {k: v.log_softmax(-1) for k, v in leaves.items()}
    return torch.cat([g.flatten() for g in torch.autograd.grad(method(normal), list(leaves.values()))])


def saved(method: Callable[[Tables], Tensor], tables: Tables) -> int:
    """Bytes of the tensors that autograd keeps until the end of the call, each once."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        leaves = {k: v.detach().clone().requires_grad_() for k, v in tables.items()}
        method({k: v.log_softmax(-1) for k, v in leaves.items()})
    return sum(seen.values())


def methods(batch: Batch) -> dict[str, Callable[[Tables], Tensor]]:
    result: dict[str, Callable[[Tables], Tensor]] = {}
    for n in (1, 2, 20):
        result[f"unrolled {n}"] = lambda t, n=n: batch.unrolled(t, n)
        result[f"constant w, {n}"] = lambda t, n=n: batch.constant(t, n)
        if n > 1:
            result[f"last of {n}"] = lambda t, n=n: batch.last(t, n)
    for c in (5, 20, 50):
        result[f"implicit {c}"] = lambda t, c=c: batch.implicit(t, c)
    return result


def cosine(a: Tensor, b: Tensor) -> float:
    return round(float(torch.nn.functional.cosine_similarity(a.double(), b.double(), 0)), 4)


def measure(batch: Batch, tables: Tables) -> dict:
    wide = {k: v.double() for k, v in tables.items()}
    exact = gradient(lambda t: batch.implicit(t, 120, 500, 1e-7), wide)
    nearly = gradient(lambda t: batch.implicit(t, 80, 500, 1e-7), wide)
    found, taken = methods(batch), dict[str, list[float]]()
    gradients = {name: gradient(method, tables) for name, method in found.items()}
    for _ in range(ROUNDS):
        for name, method in found.items():
            began = time.process_time()
            gradient(method, tables)
            taken.setdefault(name, []).append(time.process_time() - began)
    rows = {}
    for name, method in found.items():
        n = name.split()[-1]
        same = gradients.get(f"unrolled {n}")
        rows[name] = {
            "ms": round(1e3 * statistics.median(taken[name]), 1),
            "saved_mb": round(saved(method, tables) / 2**20, 1),
            "cosine_to_exact": cosine(gradients[name], exact),
            "length_to_exact": round(float(gradients[name].norm() / exact.norm()), 3),
            "cosine_to_unrolled_of_as_many": None if same is None else cosine(gradients[name], same),
        }
        print(name, rows[name], flush=True)
    return {"reference_converged": cosine(exact, nearly), "methods": rows}


def training(states: int, tables: Tables, draw: Callable[[int], Batch], updates: int) -> dict:
    """Held-out loss of the one-sweep law after training the tables with each gradient, bits per masked token."""
    held_out, report = [draw(10_000 + i) for i in range(8)], {}

    def judged(leaves: Tables) -> float:
        with torch.no_grad():
            normal = {k: v.log_softmax(-1) for k, v in leaves.items()}
            return (
                float(sum(b.unrolled(normal, 1) for b in held_out))
                / len(held_out)
                / torch.tensor(2.0).log().item()
            )

    report["before"] = round(judged(tables), 4)
    for name in ("unrolled 1", "constant w, 1", "last of 2", "unrolled 2"):
        leaves = {k: v.clone().requires_grad_() for k, v in tables.items()}
        optimizer, began = torch.optim.Adam(list(leaves.values()), 0.01), time.process_time()
        for i in range(updates):
            loss = methods(draw(i))[name]({k: v.log_softmax(-1) for k, v in leaves.items()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        report[name] = {"bits": round(judged(leaves), 4), "seconds": round(time.process_time() - began, 1)}
        print(states, name, report[name], flush=True)
    return report


def write(report: dict) -> None:
    target = Path(__file__).with_suffix(".json")
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, target)


def main(path: str) -> None:
    report = {
        "command": "python tests/benchmarks/projection_gradients.py TEXT",
        "text": Path(path).name,
        "date": str(date.today()),
        "device": f"CPU, 1 thread of {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "sites": SITES,
        "vocab": VOCAB,
        "batch": BATCH,
        "masked": MASKED,
        "states": {},
    }
    blocks = text(path).reshape(-1, SITES)
    train, valid = blocks[:-2000], blocks[-2000:]
    net = network(train, 60.0)
    for states, updates in SIZES:
        graph = topologies.hidden_markov(SITES, VOCAB, states)
        tables, _ = baum_welch(graph, train, epochs=1, progress=False)

        def draw(seed: int, states: int = states) -> Batch:
            generator = torch.Generator().manual_seed(seed)
            source = valid if seed >= 10_000 else train
            x0 = source[torch.randint(len(source), (BATCH,), generator=generator)]
            known = torch.rand(x0.shape, generator=generator) >= MASKED
            with torch.no_grad():
                log_q = net(torch.where(known, x0, VOCAB)).logits.log_softmax(-1)
            return Batch(states, x0, log_q, known)

        found = report["states"][str(states)] = measure(draw(0), tables)
        write(report)
        if updates:
            found["updates"], found["training"] = updates, training(states, tables, draw, updates)
            write(report)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
