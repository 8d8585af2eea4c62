"""Baum-Welch: expectation maximisation of a directed latent forest on text, in minibatches or over all of it.

The expected counts of a table are the gradient of the log-partition with respect to it, whatever the topology
(:mod:`codd_ppl.potentials.expectation`), so that one routine fits hidden Markov models (Baum, Petrie, Soules and Weiss
1970), latent trees and mixtures (Dempster, Laird and Rubin 1977).
"""

from __future__ import annotations

import os
import time
from math import log

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from codd_ppl.errors import ConfigError
from codd_ppl.graphs import FactorGraph
from codd_ppl.potentials.expectation import Expectation
from codd_ppl.potentials.fit import Fit, Problem
from codd_ppl.potentials.fit_file import FitFile, fit_key
from codd_ppl.potentials.starts import Clusters, Start
from codd_ppl.potentials.statistics import check_blocks
from codd_ppl.potentials.trace import Trace
from codd_ppl.typing import Float, Int

__all__ = ["baum_welch"]

SHORT = 0.1
"""Share of a fit that each restart runs before they are compared."""

JUDGED = 512
"""Blocks of the text on which restarts are compared where none are held out."""


def baum_welch(
    graph: FactorGraph,
    blocks: Int[Tensor, "blocks sites"],
    *,
    epochs: float = 3.0,
    batch_size: int | None = 32,
    step_power: float = 0.6,
    smoothing: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
    start: Start | None = None,
    restarts: int = 1,
    tolerance: float = 0.0,
    valid_blocks: Int[Tensor, "valid sites"] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    keep_zeros: bool = False,
    held_out_every: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 120.0,
) -> tuple[dict[str, Float[Tensor, "..."]], Trace]:
    """Fit the conditional tables of a directed forest to blocks of text.

    With c the expected counts of a table in one block, on average over blocks, every update makes

        P(child | parent) = (c(parent, child) + prior(child)) / (sum over children of the same).

    In minibatches c is a running mean that minibatch k moves by (k + 2)^-step_power (stepwise EM: Cappe and Moulines
    2009, arXiv:0712.4273; Liang and Klein 2009). With ``batch_size=None`` c is exact, from all blocks, and

        mean over blocks of log p(x) + sum over tables, parents and children of prior(child) log P(child | parent)

    never falls (Dempster, Laird and Rubin 1977); with ``smoothing=0`` that is the likelihood itself.

    Args:
        graph: scopes (parent, child) along a directed forest, unary factors on roots only.
        blocks: (n, sites) token ids, of any integer type; they are not copied.
        epochs: passes over the blocks; may be a fraction. With ``batch_size=None`` each is one update.
        batch_size: blocks of a minibatch; None: all of them, in chunks that fit into memory.
        step_power: of the minibatches' steps, 0.5 < step_power <= 1.
        smoothing: sum of ``prior`` over children: tokens in proportion to their frequencies, plus a tiny uniform part;
            latents uniformly. In minibatches each child has at least 1e-12, so that nothing is impossible.
        seed: of the starts and the order of the blocks; restart k has seed + k.
        progress: show a progress bar with bits per token.
        start: an object with ``tables(graph, blocks, generator)``, such as :class:`codd_ppl.potentials.Clusters` (the
            default), ``Clones`` or ``RandomStart``.
        restarts: so many runs start, and each goes a tenth of the way; the one with the best likelihood of the
            held-out blocks (without them, of some of the text) goes on.
        tolerance: end when the objective above rises by less in one update, nats per token (``batch_size=None`` only).
        valid_blocks: (m, sites) held-out text; its likelihood is noted after each pass, and shown.
        dtype: float32 or float64, of counts and tables.
        device: where to compute; the tables are returned there.
        keep_zeros: what the start makes impossible (-inf) stays so: ``prior`` goes to the other children alone.
        held_out_every: note the held-out likelihood after so many updates instead of each pass.
        checkpoint: a .safetensors file for where the fit stands, written after ``checkpoint_seconds`` and at the end;
            one that is there is gone on from. Whatever interrupts a fit, the one that goes on gives the same tables, to
            the last bit where the device computes alike. Of several restarts it is written for the chosen one.
        checkpoint_seconds: between two writes.

    Returns:
        Tie or factor name -> log-probabilities over the last axis (the child), and the trace.
        Ctrl-C ends the fit early, with the tables reached so far; the trace says so.

    Raises:
        GraphError: not a directed forest.
        ConfigError: a setting out of range; a checkpoint of another text or other settings.
        DataError: a checkpoint that can't be read.
        ShapeError, TokenError: blocks that don't fit the graph.
    """
    began = time.perf_counter()
    expectation = Expectation(graph)
    _check_settings(epochs, batch_size, step_power, smoothing, restarts, tolerance, dtype, held_out_every)
    for text in (blocks,) if valid_blocks is None else (blocks, valid_blocks):
        check_blocks(text, len(graph.tokens), graph.variables[graph.tokens[0]].cardinality)
    blocks = blocks.cpu()
    valid_blocks = None if valid_blocks is None else valid_blocks.cpu()
    settings = (batch_size, step_power, smoothing, tolerance, dtype, device, keep_zeros, held_out_every)
    problem = Problem(graph, expectation, blocks, valid_blocks, *settings)
    total = max(1, round(epochs * problem.updates_of_a_pass))
    short = total if restarts == 1 else max(1, round(SHORT * total))
    start = Clusters() if start is None else start
    file: FitFile | None = None
    if checkpoint is not None:
        file = FitFile(checkpoint, fit_key(problem, start, seed=seed, restarts=restarts, total=total))
    saved = None if file is None else file.load(problem, began)
    best = Fit(problem, start, seed, began) if saved is None else saved
    done = len(best.trace.log_likelihood)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bits]}"),
        TimeRemainingColumn(),
        disable=not progress,
    ) as bar:
        others = 0 if saved is not None else restarts - 1
        task = bar.add_task("Baum-Welch", total=total + others * short, completed=done, bits="")
        written = time.perf_counter()

        def run(fit: Fit, until: int, into: FitFile | None = None) -> None:
            nonlocal written
            while len(fit.trace.log_likelihood) < until and not fit.trace.converged:
                fit.update()
                bits = -fit.trace.log_likelihood[-1] / log(2.0)
                held = f", {-fit.trace.held_out[-1][1] / log(2.0):.3f} held out" if fit.trace.held_out else ""
                bar.update(task, advance=1, bits=f"{bits:.3f} bits per token{held}")
                if into is not None and time.perf_counter() - written > checkpoint_seconds:
                    into.save(fit)
                    written = time.perf_counter()

        try:
            if others:
                run(best, short)
                judges = blocks[:JUDGED] if valid_blocks is None else valid_blocks
                top = best.log_likelihood(judges)
                for k in range(1, restarts):
                    other = Fit(problem, start, seed + k, began)
                    run(other, short)
                    value = other.log_likelihood(judges)
                    if value > top:
                        best, top = other, value
            run(best, total, file)
            best.hold_out()
            if file is not None and len(best.trace.log_likelihood) > done:
                file.save(best)
        except KeyboardInterrupt:
            best.trace.interrupted = True
    return best.tables(), best.trace


def _check_settings(
    epochs: float,
    batch_size: int | None,
    step_power: float,
    smoothing: float,
    restarts: int,
    tolerance: float,
    dtype: torch.dtype,
    held_out_every: int | None,
) -> None:
    if epochs <= 0 or (batch_size is not None and batch_size < 1) or not 0.5 < step_power <= 1:
        raise ConfigError(
            "expected epochs > 0, batch_size >= 1 or None (all blocks) and 0.5 < step_power <= 1, found "
            f"epochs={epochs}, batch_size={batch_size}, step_power={step_power}"
        )
    if smoothing < 0 or restarts < 1 or tolerance < 0:
        raise ConfigError(
            "expected smoothing >= 0, restarts >= 1 and tolerance >= 0, found "
            f"smoothing={smoothing}, restarts={restarts}, tolerance={tolerance}"
        )
    if tolerance > 0 and batch_size is not None:
        raise ConfigError(
            f"tolerance={tolerance} ends full-batch fits: minibatches rise and fall; pass batch_size=None too, or "
            "choose epochs"
        )
    if held_out_every is not None and held_out_every < 1:
        raise ConfigError(f"expected held_out_every >= 1 or None (each pass), found {held_out_every}")
    if dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"expected dtype torch.float32 or torch.float64, found {dtype}")
