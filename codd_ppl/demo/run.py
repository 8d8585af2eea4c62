"""``codd demo``: train a small network and a hidden Markov coupling on text, compare, sample, report."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, RichProgressBar
from rich.console import Console

from codd_ppl.coupling import CouplingLayer
from codd_ppl.data import sample_text_path
from codd_ppl.demo.report import write_report
from codd_ppl.demo.threads import fastest_threads
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.errors import ConfigError
from codd_ppl.evaluation import NelboTable, nelbo_table, time_sampling
from codd_ppl.graphs import topologies
from codd_ppl.model_folder import save_model
from codd_ppl.sampling import Generation, Sampler
from codd_ppl.training import CoDDModule, TextDataModule
from codd_ppl.training.blocks import spread_blocks

__all__ = ["DemoResult", "DemoSettings", "run_demo"]


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demonstration; seconds are upper bounds for each part on the machine at hand.

    Attributes:
        sites: tokens of a block. states: of the hidden Markov coupling. hidden, layers: of the network.
        train_steps: optimiser steps of the network, fewer where ``train_seconds`` would not hold them.
        epochs: passes of Baum-Welch, fewer where ``fit_seconds`` would not hold them.
        valid_blocks, draws: of the bound.
    """

    sites: int = 64
    states: int = 64
    hidden: int = 96
    layers: int = 2
    batch_size: int = 64
    train_steps: int = 750
    train_seconds: float = 80.0
    epochs: float = 3.0
    fit_seconds: float = 30.0
    valid_blocks: int = 192
    draws: int = 2
    timing_seconds: float = 8.0
    seed: int = 0

    @classmethod
    def fast(cls) -> DemoSettings:
        """About a third of the time, and noisier figures."""
        return cls(
            train_steps=260,
            train_seconds=28.0,
            epochs=1.0,
            fit_seconds=9.0,
            valid_blocks=96,
            draws=1,
            timing_seconds=1.0,
        )


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found and wrote."""

    table: NelboTable
    samples: dict[str, list[str]]
    folder: Path
    seconds: float


def run_demo(
    text: str | Path | None = None,
    folder: str | Path = "codd-demo",
    settings: DemoSettings | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Train on a text, print the table of bounds and samples at four steps, write model, plots and report.

    Ctrl-C while training leaves a usable model folder and raises KeyboardInterrupt again.

    Raises:
        DataError: a text that can't be used.
        ConfigError: ``folder`` holds something else.
    """
    begin = time.perf_counter()
    settings = settings or DemoSettings()
    console = console or Console()
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, expected a folder to write to; pass another with --output")
    torch.manual_seed(settings.seed)
    data = TextDataModule(
        text or sample_text_path(),
        block_length=settings.sites,
        batch_size=settings.batch_size,
        random_offsets=True,
        seed=settings.seed,
    )
    vocab = data.vocab_size
    graph = topologies.hidden_markov(settings.sites, vocab, settings.states)
    denoiser = BidirectionalTransformer(vocab, settings.hidden, settings.layers, 4)
    coupling = CouplingLayer(graph, vocab, hidden_size=settings.hidden, sweeps=4)
    console.print(
        f"{text or 'tinyshakespeare (excerpt)'}: {len(data.train_blocks())} training blocks of {settings.sites} "
        f"characters, vocabulary {vocab}"
    )
    tokens = data.train_blocks()[: settings.batch_size]

    def call() -> None:
        with torch.no_grad():
            denoiser(tokens)

    with fastest_threads(call):
        return _compare(text, folder, settings, console, data, denoiser, coupling, begin)


def _compare(
    text: str | Path | None,
    folder: Path,
    settings: DemoSettings,
    console: Console,
    data: TextDataModule,
    denoiser: BidirectionalTransformer,
    coupling: CouplingLayer,
    begin: float,
) -> DemoResult:
    """Train, bound, sample, write."""
    vocab = data.vocab_size
    try:
        console.print("[bold]1[/] network, factorised loss")
        _train(denoiser, data, settings, console)
        console.print("[bold]2[/] coupling, from the text alone (Baum-Welch)")
        _fit(coupling, data, settings)
    except (KeyboardInterrupt, SystemExit) as stopped:  # Lightning turns Ctrl-C into SystemExit
        where = save_model(folder / "model", denoiser, coupling, data.tokenizer, {"interrupted": True})
        console.print(f"interrupted; what was trained so far is in {where}")
        raise KeyboardInterrupt from stopped
    made_from = {"text": str(text or "tinyshakespeare")}
    where = save_model(folder / "model", denoiser, coupling, data.tokenizer, made_from)
    console.print(f"model in {where}")
    console.print("[bold]3[/] bounds on held-out text, and wall clock")
    models = {"factorised": (denoiser, None), "coupled": (denoiser, coupling)}
    steps = sorted({T for T in (1, 2, 4, 8, 16, 32) if settings.sites > T} | {settings.sites})
    held_out = spread_blocks(data.valid_blocks(), settings.valid_blocks)
    table = nelbo_table(models, held_out, steps, seed=settings.seed, draws=settings.draws, progress=True)
    seconds = time_sampling(
        models,
        steps,
        settings.sites,
        batch_size=4,
        repeats=3,
        budget=settings.timing_seconds,
        progress=True,
    )
    table = table.with_seconds(seconds, timing_batch_size=4)
    console.print(table.render("factorised", equivalent=(1, 4)))
    independent = CouplingLayer(topologies.independent(settings.sites, vocab), vocab)
    drawn: dict[str, Generation] = {}
    for name, layer in (("factorised", independent), ("coupled", coupling)):
        template = torch.full((4, settings.sites), denoiser.mask_token_id)
        generator = torch.Generator().manual_seed(settings.seed)
        drawn[name] = Sampler(denoiser, layer, steps=4).generate(template, generator)
    samples = {name: [data.decode(row) for row in g.tokens] for name, g in drawn.items()}
    console.print("\n[bold]samples at 4 steps[/]")
    for name, rows in samples.items():
        for row in rows:
            console.print(f"{name:>11} │ ", end="")
            console.print(row.replace("\n", "⏎"), markup=False, highlight=False)
    table.save(folder / "nelbo.json")
    small = topologies.hidden_markov(6, vocab, settings.states)
    report = write_report(folder, table, samples, small, drawn["coupled"])
    total = time.perf_counter() - begin
    console.print(f"\nmodel   {where}\nplots   {folder}/*.png\nreport  {report}\n{total:.0f} seconds")
    return DemoResult(table, samples, folder, total)


def _train(
    denoiser: BidirectionalTransformer, data: TextDataModule, settings: DemoSettings, console: Console
) -> None:
    """As many optimiser steps as fit into the time, by a measurement of the first few."""
    batch, taken = data.train_blocks()[: settings.batch_size], []
    for _ in range(12):
        begin = time.perf_counter()
        denoiser(batch).logits.log_softmax(-1).mean().backward()
        taken.append(time.perf_counter() - begin)
    denoiser.zero_grad()
    step = 1.1 * quantiles(taken)[0] + 0.005  # a good quarter of the calls; optimiser, average, data
    steps = max(20, min(settings.train_steps, int(settings.train_seconds / step)))
    independent = CouplingLayer(topologies.independent(settings.sites, data.vocab_size), data.vocab_size)
    module = CoDDModule(
        denoiser, independent, steps=settings.sites, learning_rate=3e-3, warmup_steps=40, seed=settings.seed
    )
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's hints about loggers and workers
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_time={"seconds": int(1.2 * settings.train_seconds) + 1},
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[EMAWeightAveraging(decay=0.98), *([RichProgressBar()] if console.is_terminal else [])],
            enable_progress_bar=console.is_terminal,
        )
        trainer.fit(module, data)
    console.print(f"{trainer.global_step} steps of at most {steps}")


def _fit(coupling: CouplingLayer, data: TextDataModule, settings: DemoSettings) -> None:
    """Baum-Welch on the training text, as many passes as fit into the time."""
    blocks = data.train_blocks()
    few = blocks[: 32 * 4]
    begin = time.perf_counter()
    coupling.init_from_corpus(few, progress=False, epochs=1.0)
    each = (time.perf_counter() - begin) / max(1, len(few))
    epochs = min(settings.epochs, settings.fit_seconds / (each * len(blocks)))
    coupling.init_from_corpus(blocks, epochs=epochs, seed=settings.seed)
