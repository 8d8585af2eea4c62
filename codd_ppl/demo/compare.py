"""What the coupling gains: bounds and wall clock on held-out text, samples at few steps, and the report of both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from codd_ppl.coupling import CouplingLayer
from codd_ppl.demo.report import write_report
from codd_ppl.demo.settings import DemoSettings
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.evaluation import NelboTable, nelbo_table, time_sampling
from codd_ppl.graphs import topologies
from codd_ppl.sampling import Generation, Sampler
from codd_ppl.typing import Int, Tensor

__all__ = ["DemoResult", "compare"]


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found and wrote."""

    table: NelboTable
    samples: dict[str, list[str]]
    folder: Path
    seconds: float


def compare(
    denoiser: BidirectionalTransformer,
    coupling: CouplingLayer,
    blocks: Int[Tensor, "blocks sites"],
    decode: Callable[[Tensor], str],
    folder: Path,
    console: Console,
    settings: DemoSettings,
    begin: float,
) -> DemoResult:
    """Bound, time, sample, write; ``begin`` is when the whole began."""
    sites, vocab = coupling.sites, coupling.vocab_size
    console.print("[bold]3[/] bounds on held-out text, and wall clock")
    models = {"factorised": (denoiser, None), "coupled": (denoiser, coupling)}
    steps = sorted({T for T in (1, 2, 4, 8, 16, 32) if sites > T} | {sites})
    table = nelbo_table(models, blocks, steps, seed=settings.seed, draws=settings.draws, progress=True)
    seconds = time_sampling(
        models, steps, sites, batch_size=4, repeats=3, budget=settings.timing_seconds, progress=True
    )
    table = table.with_seconds(seconds, timing_batch_size=4)
    console.print(table.render("factorised", equivalent=(1, 4)))
    independent = CouplingLayer(topologies.independent(sites, vocab), vocab)
    drawn: dict[str, Generation] = {}
    for name, layer in (("factorised", independent), ("coupled", coupling)):
        template = torch.full((4, sites), denoiser.mask_token_id)
        generator = torch.Generator().manual_seed(settings.seed)
        drawn[name] = Sampler(denoiser, layer, steps=4).generate(template, generator)
    samples = {name: [decode(row) for row in g.tokens] for name, g in drawn.items()}
    console.print("\n[bold]samples at 4 steps[/]")
    for name, rows in samples.items():
        for row in rows:
            console.print(f"{name:>11} │ ", end="")
            console.print(row.replace("\n", "⏎"), markup=False, highlight=False)
    folder.mkdir(parents=True, exist_ok=True)
    table.save(folder / "nelbo.json")
    small = topologies.hidden_markov(6, vocab, 64)
    report = write_report(folder, table, samples, small, drawn["coupled"])
    total = time.perf_counter() - begin
    console.print(
        f"\nmodel   {folder / 'model'}\nplots   {folder}/*.png\nreport  {report}\n{total:.0f} seconds"
    )
    return DemoResult(table, samples, folder, total)
