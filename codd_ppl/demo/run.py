"""``codd demo``: a small network and a hidden Markov coupling, trained before or now; compare, sample, report."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from statistics import quantiles

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, RichProgressBar
from rich.console import Console
from torch import Tensor

from codd_ppl.coupling import CouplingLayer
from codd_ppl.data import demo_model_path, sample_text_path
from codd_ppl.demo.compare import DemoResult, compare
from codd_ppl.demo.settings import DemoSettings
from codd_ppl.demo.threads import fastest_threads
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.errors import ConfigError
from codd_ppl.graphs import topologies
from codd_ppl.model_folder import load_model, save_model
from codd_ppl.potentials import LogarithmicPool
from codd_ppl.training import CoDDModule, TextDataModule, fit_pool
from codd_ppl.training.blocks import spread_blocks

__all__ = ["run_demo"]


def run_demo(
    text: str | Path | None = None,
    folder: str | Path = "codd-demo",
    settings: DemoSettings | None = None,
    console: Console | None = None,
    train: bool = True,
) -> DemoResult:
    """Train on a text, or take the model that comes with the package; print the table of bounds and samples at four

    steps, write model, plots and report. Ctrl-C while training leaves a usable model folder and raises
    KeyboardInterrupt again.

    Args:
        text: to train on; None: the Shakespeare that comes with the package.
        folder: to write to.
        settings: sizes; those of the network and the coupling matter only where they are trained.
        console: to print to.
        train: False: the model that comes with the package, which was made from its text.

    Raises:
        DataError: a text that can't be used.
        ConfigError: ``folder`` holds something else, or a text without ``train``.
    """
    begin = time.perf_counter()
    settings = settings or DemoSettings()
    console = console or Console()
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, expected a folder to write to; pass another with --output")
    if text is not None and not train:
        raise ConfigError(
            "the model that comes with the package was made from its own text; pass train=True with yours"
        )
    torch.manual_seed(settings.seed)
    saved = None if train else load_model(demo_model_path())
    data = TextDataModule(
        text or sample_text_path(),
        tokenizer="char" if saved is None or saved.tokenizer is None else saved.tokenizer,
        block_length=settings.sites,
        batch_size=settings.batch_size,
        random_offsets=True,
        seed=settings.seed,
    )
    vocab = data.vocab_size
    if saved is None:
        graph = topologies.hidden_markov(settings.sites, vocab, settings.states)
        denoiser = BidirectionalTransformer(
            vocab, settings.hidden, settings.layers, 4, dropout=settings.dropout
        )
        coupling = CouplingLayer(graph, vocab, pool=LogarithmicPool())
    else:
        denoiser, coupling = saved.denoiser, saved.coupling
    console.print(
        f"{text or 'tinyshakespeare (excerpt)'}: {len(data.train_blocks())} training blocks of {settings.sites} "
        f"characters, vocabulary {vocab}"
    )
    tokens = data.train_blocks()[: settings.batch_size]

    def call() -> None:
        with torch.no_grad():
            denoiser(tokens)

    with fastest_threads(call):
        # Half of the held-out text is for the weights of the pool, the other for the bounds.
        held_out = data.valid_blocks()
        if saved is None:
            about = {"text": str(text or "tinyshakespeare")}
            _make(denoiser, coupling, data, held_out[0::2], folder, settings, console)
        else:
            about = {**saved.about, "trained": "before, it came with the package"}
            console.print("the model that comes with the package; --train makes one from scratch")
        where = save_model(folder / "model", denoiser, coupling, data.tokenizer, about)
        console.print(f"model in {where}")
        blocks = spread_blocks(held_out[1::2], settings.valid_blocks)
        return compare(denoiser, coupling, blocks, data.decode, folder, console, settings, begin)


def _make(
    denoiser: BidirectionalTransformer,
    coupling: CouplingLayer,
    data: TextDataModule,
    held_out: Tensor,
    folder: Path,
    settings: DemoSettings,
    console: Console,
) -> None:
    """Train the network, fit the coupling."""
    try:
        console.print("[bold]1[/] network, factorised loss")
        _train(denoiser, data, settings, console)
        console.print("[bold]2[/] coupling, from the text alone (Baum-Welch)")
        _fit(coupling, data, settings)
        fit_pool(denoiser, coupling, held_out, sites=settings.pool_sites, seed=settings.seed)
    except (KeyboardInterrupt, SystemExit) as stopped:  # Lightning turns Ctrl-C into SystemExit
        where = save_model(folder / "model", denoiser, coupling, data.tokenizer, {"interrupted": True})
        console.print(f"interrupted; what was trained so far is in {where}")
        raise KeyboardInterrupt from stopped


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
