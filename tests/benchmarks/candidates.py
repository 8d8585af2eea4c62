"""What candidates cost and lose: ``python tests/benchmarks/candidates.py``, two minutes; writes candidates.json here.

Ratios to one pass of evidence through the same model (log_partition with all sites free), processor time, medians of
interleaved rounds; beside them the mean total variation of a site's marginals from the network's.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch

from codd_ppl import CouplingLayer, topologies
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.inference.projection import project

SIZES = ((32768, 256, 32, 8, (64, 256, 1024)), (4096, 256, 64, 8, (32, 64, 128)))
ROUNDS = 7


@torch.no_grad()
def measure(vocab: int, states: int, sites: int, batch: int, counts: tuple[int, ...]) -> dict:
    generator = torch.Generator().manual_seed(0)
    graph = topologies.hidden_markov(sites, vocab, states)
    coupling = CouplingLayer(graph, vocab)
    tables = coupling.potentials()
    log_q = (3 * torch.randn(batch, sites, vocab, generator=generator)).log_softmax(-1)
    tokens = torch.zeros(batch, sites, dtype=torch.int64)
    known = torch.zeros(batch, sites, dtype=torch.bool)

    def law(evidence: torch.Tensor) -> CoupledCategorical:
        return CoupledCategorical(coupling.plan, tables, evidence, tokens, known)

    def sweep(count: int | None) -> torch.Tensor:
        return project(coupling.plan, tables, graph.tokens, log_q, ~known, tokens=tokens, candidates=count)

    calls = {"evidence": lambda: law(log_q).log_partition, "all": lambda: sweep(None)}
    calls |= {str(count): lambda count=count: sweep(count) for count in counts}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            taken[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values[1:]) for name, values in taken.items()}
    base = medians.pop("evidence")
    found = {}
    for name, seconds in medians.items():
        marginals = law(sweep(None if name == "all" else int(name))).marginals
        variation = 0.5 * (marginals - log_q.exp()).abs().sum(-1).mean()
        found[name] = {"ratio": round(seconds / base, 2), "total_variation": round(float(variation), 4)}
    return {
        "vocab": vocab,
        "states": states,
        "sites": sites,
        "batch": batch,
        "evidence_ms": round(1e3 * base, 1),
        "candidates": found,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    report = {
        "command": "python tests/benchmarks/candidates.py",
        "date": str(date.today()),
        "device": f"CPU, 1 thread of {os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "sizes": [measure(*size) for size in SIZES],
    }
    target = Path(__file__).with_suffix(".json")
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, target)
    print(json.dumps(report, indent=1))
