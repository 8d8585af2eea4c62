"""What drawing site by site costs beside one exact joint draw: ``python tests/benchmarks/any_order.py``, a minute.

Writes any_order.json here: hidden Markov models of 32 sites and 256 states, nothing known, every law made anew for
each call (so that nothing is cached); processor time on one thread, medians of interleaved rounds, as ratios to the
joint draw. ``ratio``: of a law whose evidence is there, without a projection. ``ratio_from_logits``: from the network's
logits to tokens, with the projection, which is what a step of decoding does; its messages serve the draw, too.
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

    def given() -> CoupledCategorical:
        return CoupledCategorical(coupling.plan, tables, evidence, tokens, known)

    def projected() -> CoupledCategorical:
        return coupling(evidence, tokens=tokens, known=known)

    draws = {"joint": Joint(), "latent": Latent(0.7)}
    draws |= {f"turns={n}": AnyOrder(0.7, turns=n) for n in (1, 2, 4, 8)} | {
        "strict": AnyOrder(0.7, turns=None)
    }
    calls = {
        (law.__name__, name): lambda law=law, draw=draw: draw.draw(law(), ~known, generator)
        for law in (given, projected)
        for name, draw in draws.items()
    }
    calls |= {(law.__name__, "marginals"): lambda law=law: law().marginals for law in (given, projected)}
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS + 1):
        for key, call in calls.items():
            begin = time.process_time()
            call()
            taken[key].append(time.process_time() - begin)
    medians = {key: statistics.median(values[1:]) for key, values in taken.items()}

    def ratios(law: str) -> dict[str, float]:
        base = medians[law, "joint"]
        return {
            name: round(t / base, 2) for (of, name), t in medians.items() if of == law and name != "joint"
        }

    return {
        "vocab": vocab,
        "batch": batch,
        "joint_ms": round(1e3 * medians["given", "joint"], 2),
        "ratio": ratios("given"),
        "joint_ms_from_logits": round(1e3 * medians["projected", "joint"], 2),
        "ratio_from_logits": ratios("projected"),
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
