"""``python -m codd_ppl.demo.toys``: the published toys of latent-variable denoisers, factorised and coupled.

Two tokens, and a law whose modes lie apart: tokens drawn independently fall between them. The network is the same for
all models; the couplings are started from the same samples as it (counts, Baum-Welch) and projected onto a pool of its
marginals and their own, fitted to held-out pairs.
Validity is the share of drawn pairs inside the cells that hold 99 % of the law (see ``toy_laws.support``).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch.utils.data import DataLoader

from codd_ppl.coupling import CouplingLayer
from codd_ppl.demo.toy_card import toy_card
from codd_ppl.demo.toy_laws import QUOTED, Toy, draw_pairs, support, toys
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.diffusion.closed_forms import product_of_marginals, total_correlation
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.potentials import LogarithmicPool
from codd_ppl.sampling import Sampler
from codd_ppl.training import CoDDModule, fit_pool
from codd_ppl.typing import Float, Int, Tensor

__all__ = ["ToySettings", "main", "run_toy", "run_toys"]

HELD_OUT = 1_000
"""Added to a seed for the held-out pairs."""


@dataclass(frozen=True)
class ToySettings:
    """Sizes of the comparison.

    Attributes:
        samples: training pairs, drawn anew for each seed. held_out: pairs that the pools are fitted to.
        drawn: pairs generated for each figure.
        hidden, layers, train_steps, batch_size, learning_rate: of the network.
        epochs: of Baum-Welch. steps: numbers of reverse steps, hence of network calls. seeds: one run each.
    """

    samples: int = 50_000
    held_out: int = 10_000
    drawn: int = 5_000
    hidden: int = 64
    layers: int = 1
    train_steps: int = 1000
    batch_size: int = 512
    learning_rate: float = 3e-3
    epochs: float = 10.0
    steps: tuple[int, ...] = (1, 2, 4, 8)
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass
class _Found:
    """Figures of one model: validity by number of steps, KL(law || one-step model) in nats, CPU seconds to fit."""

    validity: dict[int, list[float]] = field(default_factory=dict)
    one_step_kl: list[float] = field(default_factory=list)
    fit_seconds: list[float] = field(default_factory=list)


def run_toy(toy: Toy, settings: ToySettings | None = None) -> dict[str, Any]:
    """Train the network and start the couplings for each seed; what is found, as JSON takes it.

    ``exact`` holds the closed forms: validity of the law itself, and of the best factorised denoiser in T steps, which
    reveals both tokens at once with chance 1/T: v_1 / T + (1 - 1/T) v_law, v_1 that of the product of the marginals.
    """
    settings = settings or ToySettings()
    joint, valid = toy.joint, support(toy.joint)
    law, product = (float(p[valid].sum()) for p in (joint, product_of_marginals(joint)))
    models: dict[str, _Found] = {}
    for seed in settings.seeds:
        blocks = draw_pairs(joint, settings.samples, seed)
        begin = time.process_time()
        denoiser = _network(blocks, toy, settings, seed)
        trained = time.process_time() - begin
        for name, coupling in _couplings(toy).items():
            begin = time.process_time()
            if name == "table":
                coupling.init_from_corpus(blocks, pseudo_count=toy.pseudo_count)
            elif name == "mixture":
                coupling.init_from_corpus(
                    blocks,
                    progress=False,
                    seed=seed,
                    epochs=settings.epochs,
                    batch_size=settings.batch_size,
                    smoothing=toy.smoothing,
                )
            if coupling.pool is not None:
                held_out = draw_pairs(joint, settings.held_out, HELD_OUT + seed)
                fit_pool(denoiser, coupling, held_out, sites=settings.held_out, batch_size=1024)
            found = models.setdefault(name, _Found())
            found.fit_seconds.append(trained if name == "factorised" else time.process_time() - begin)
            found.one_step_kl.append(_one_step_kl(denoiser, coupling, joint))
            for steps in settings.steps:
                drawn = _draw(denoiser, coupling, steps, settings.drawn, seed)
                share = float(valid[drawn[:, 0], drawn[:, 1]].double().mean())
                found.validity.setdefault(steps, []).append(share)
    return {
        "law": toy.law,
        "vocab": len(joint),
        "cells": int(valid.sum()),
        "exact": {
            "law": law,
            "total_correlation": float(total_correlation(joint)),
            "best_factorised": {T: product / T + (1 - 1 / T) * law for T in settings.steps},
        },
        "models": {name: asdict(found) for name, found in models.items()},
    }


def _couplings(toy: Toy) -> dict[str, CouplingLayer]:
    vocab = len(toy.joint)

    def pooled(graph: FactorGraph) -> CouplingLayer:
        return CouplingLayer(
            graph, vocab, pool=LogarithmicPool((0.5, 1.0))
        )  # one of two tokens masked, or both

    return {
        "factorised": CouplingLayer(topologies.independent(2, vocab), vocab),
        "table": pooled(topologies.chain(2, vocab)),
        "mixture": pooled(topologies.star(2, vocab, states=toy.states)),
    }


def _network(
    blocks: Int[Tensor, "n 2"], toy: Toy, settings: ToySettings, seed: int
) -> BidirectionalTransformer:
    """The factorised model, MDLM's loss."""
    vocab = len(toy.joint)
    with torch.random.fork_rng([]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")  # Lightning's hints about loggers and workers
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        denoiser = BidirectionalTransformer(vocab, settings.hidden, settings.layers, kernel_size=3)
        module = CoDDModule(
            denoiser,
            CouplingLayer(topologies.independent(2, vocab), vocab),
            steps=2,
            learning_rate=settings.learning_rate,
            seed=seed,
        )
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=toy.train_steps or settings.train_steps,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        batches = cast(Any, blocks.split(settings.batch_size))
        trainer.fit(module, DataLoader(batches, batch_size=None, shuffle=True))
    return denoiser.eval()


def _draw(
    denoiser: BidirectionalTransformer, coupling: CouplingLayer, steps: int, n: int, seed: int
) -> Int[Tensor, "n 2"]:
    """Pairs written from nothing; each T has ``steps`` network calls."""
    template = torch.full((n, 2), denoiser.mask_token_id)
    generator = torch.Generator().manual_seed(seed)
    return Sampler(denoiser, coupling, steps=steps).generate(template, generator).tokens


@torch.no_grad()
def _one_step_kl(
    denoiser: BidirectionalTransformer, coupling: CouplingLayer, joint: Float[Tensor, "vocab vocab"]
) -> float:
    """KL(law || p(x0, x1 | all masked)), nats, over all cells: validity alone can't tell a lost mode."""
    cells = (joint > 0).nonzero()
    xt = torch.full((len(cells), 2), denoiser.mask_token_id)
    logits = denoiser(xt[:1]).logits.expand(len(cells), -1, -1)
    log_q = coupling(logits, tokens=xt, known=torch.zeros_like(xt, dtype=torch.bool)).log_prob(cells)
    p = joint[cells[:, 0], cells[:, 1]]
    return float((p * (p.log() - log_q.double())).sum())


def run_toys(folder: str | Path, settings: ToySettings | None = None) -> dict[str, Any]:
    """Run all toys on one thread and write ``results.json`` and the card ``README.md`` made from it."""
    settings = settings or ToySettings()
    begin, cpu = time.perf_counter(), time.process_time()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {}
        for name, toy in toys().items():
            print(f"{name} ..", flush=True)
            found[name] = run_toy(toy, settings)
    finally:
        torch.set_num_threads(threads)
    results: dict[str, Any] = {
        "command": "python -m codd_ppl.demo.toys",
        "date": date.today().isoformat(),
        "device": f"CPU, 1 thread, torch {torch.__version__}",
        "seconds": round(time.perf_counter() - begin),
        "cpu_seconds": round(time.process_time() - cpu),
        "settings": asdict(settings),
        "toys": found,
        "quoted": QUOTED,
    }
    results = json.loads(json.dumps(results))  # keys as they are read back
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("results.json", json.dumps(results, indent=1) + "\n"),
        ("README.md", toy_card(results)),
    ):
        draft = folder / f".{name}.{os.getpid()}.tmp"
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, folder / name)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison and print the card."""
    parser = argparse.ArgumentParser(prog="python -m codd_ppl.demo.toys", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("models/toys"), help="folder to write to")
    print(toy_card(run_toys(parser.parse_args(arguments).output)))


if __name__ == "__main__":
    main()
