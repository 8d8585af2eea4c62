"""What drawing site by site costs beside one exact joint draw: ``python tests/benchmarks/any_order.py``, a minute.

Writes any_order.json here: hidden Markov models of 32 sites and 256 states, nothing known, every law made anew for
each call (so that nothing is cached); processor time on one thread, medians of interleaved rounds, as ratios to the
joint draw.
``turns`` is AnyOrder's: how many passes over the text; "strict" is the order of the heuristic itself.
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
from codd_ppl.sampling import AnyOrder, Joint, Latent

SITES, STATES, ROUNDS = 32, 256, 9
SIZES = ((27, 1), (27, 16), (27, 64), (1024, 1), (1024, 16), (4096, 1), (4096, 16))


@torch.no_grad()
def measure(vocab: int, batch: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    coupling = CouplingLayer(topologies.hidden_markov(SITES, vocab, STATES), vocab)
    tokens = torch.zeros(batch, SITES, dtype=torch.int64)
    known = torch.zeros(batch, SITES, dtype=torch.bool)
    tables = coupling.log_potentials(None, known)
    evidence = (2 * torch.randn(batch, SITES, vocab, generator=generator)).log_softmax(-1)

    def law() -> CoupledCategorical:
        return CoupledCategorical(coupling.plan, tables, evidence, tokens, known)

    draws = {"joint": Joint(), "latent": Latent(0.7)}
    draws |= {f"turns={n}": AnyOrder(0.7, turns=n) for n in (1, 2, 4, 8)} | {
        "strict": AnyOrder(0.7, turns=None)
    }
    calls = {name: lambda draw=draw: draw.draw(law(), ~known, generator) for name, draw in draws.items()}
    calls["marginals"] = lambda: law().marginals
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            taken[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values[1:]) for name, values in taken.items()}
    base = medians["joint"]
    return {
        "vocab": vocab,
        "batch": batch,
        "joint_ms": round(1e3 * base, 2),
        "ratio": {name: round(seconds / base, 2) for name, seconds in medians.items() if name != "joint"},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    report = {
        "command": "python tests/benchmarks/any_order.py",
        "date": str(date.today()),
        "device": f"CPU, 1 thread of {os.cpu_count()} cores, {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "sites": SITES,
        "states": STATES,
        "sizes": [measure(*size) for size in SIZES],
    }
    target = Path(__file__).with_suffix(".json")
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, target)
