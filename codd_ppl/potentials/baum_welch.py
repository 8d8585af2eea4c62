"""Baum-Welch: expectation maximisation of a directed latent forest on text, in minibatches or over all of it.

The expected counts of a table are the gradient of the log-partition with respect to it, whatever the topology
(:mod:`codd_ppl.potentials.expectation`), so that one routine fits hidden Markov models (Baum, Petrie, Soules and Weiss
1970), latent trees and mixtures (Dempster, Laird and Rubin 1977).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import log, nan

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from codd_ppl.errors import ConfigError
from codd_ppl.graphs import FactorGraph
from codd_ppl.potentials.expectation import Expectation
from codd_ppl.potentials.running_counts import RunningCounts
from codd_ppl.potentials.starts import Clones, Start
from codd_ppl.potentials.statistics import check_blocks, log_unigram
from codd_ppl.potentials.table import table_shapes
from codd_ppl.typing import Float, Int

__all__ = ["Trace", "baum_welch"]

START_WEIGHT = 1.0
"""Of the start's tables among the counts, in blocks."""


@dataclass
class Trace:
    """What the fit did.

    Attributes:
        log_likelihood: mean log-likelihood of each minibatch before its update, nats per token.
        seconds, tokens: since the start of the fit and seen by it, after each of these updates.
        interrupted: it was stopped by Ctrl-C; the tables are those reached so far.
    """

    log_likelihood: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    interrupted: bool = False

    @property
    def final(self) -> float:
        """Mean over the last tenth of the minibatches, nats per token; NaN if there was none."""
        tail = self.log_likelihood[-max(1, len(self.log_likelihood) // 10) :]
        return sum(tail) / len(tail) if tail else nan


def baum_welch(
    graph: FactorGraph,
    blocks: Int[Tensor, "blocks sites"],
    *,
    epochs: float = 3.0,
    batch_size: int = 32,
    step_power: float = 0.6,
    smoothing: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
    start: Start | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Float[Tensor, "..."]], Trace]:
    """Fit the conditional tables of a directed forest to blocks of text.

    Args:
        graph: scopes (parent, child) along a directed forest, unary factors on roots only.
        blocks: (n, sites) int64 token ids.
        epochs: passes over the blocks; may be a fraction.
        batch_size: blocks of a minibatch.
        step_power: minibatch k moves the running counts by (k + 2)^-step_power, 0.5 < step_power <= 1 (stepwise EM:
            Cappe and Moulines 2009, arXiv:0712.4273; Liang and Klein 2009).
        smoothing: counts given to every row, per block: tokens in proportion to their frequencies plus a tiny uniform
            part, latents uniformly, so that nothing is impossible.
        seed: of the start and the order of the blocks.
        progress: show a progress bar with bits per token.
        start: :class:`Clones` by default.
        dtype: float32 or float64, of counts and tables.
        device: where to compute; the tables are returned there.

    Returns:
        Tie or factor name -> log-probabilities over the last axis (the child), and the trace.
        Ctrl-C ends the fit early; the trace says so.

    Raises:
        GraphError: not a directed forest.
        ConfigError: a setting out of range.
        ShapeError, TokenError: blocks that don't fit the graph.
    """
    expectation = Expectation(graph)
    if epochs <= 0 or batch_size < 1 or not 0.5 < step_power <= 1 or smoothing < 0:
        raise ConfigError(
            f"expected epochs > 0, batch_size >= 1, 0.5 < step_power <= 1 and smoothing >= 0, found epochs={epochs}, "
            f"batch_size={batch_size}, step_power={step_power}, smoothing={smoothing}"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"expected dtype torch.float32 or torch.float64, found {dtype}")
    tokens = [graph.variables[name] for name in graph.tokens]
    check_blocks(blocks, len(tokens), tokens[0].cardinality)
    blocks = blocks.cpu().long()
    generator = torch.Generator().manual_seed(seed)
    start = Clones() if start is None else start
    tables = _counts(graph, start.tables(graph, blocks, generator), blocks, smoothing, dtype, device)
    per_epoch = max(1, -(-len(blocks) // batch_size))
    total = max(1, round(epochs * per_epoch))
    trace, order, began = Trace(), torch.empty(0, dtype=torch.int64), time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bits]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("Baum-Welch", total=total, bits="")
        try:
            for k in range(total):
                if k % per_epoch == 0:
                    order = torch.randperm(len(blocks), generator=generator)
                first = (k % per_epoch) * batch_size
                batch = blocks[order[first : first + batch_size]].to(device)
                likelihood = _update(expectation, tables, batch, (k + 2.0) ** -step_power)
                trace.log_likelihood.append(likelihood / batch.numel())
                trace.seconds.append(time.perf_counter() - began)
                trace.tokens.append(batch.numel() + (trace.tokens[-1] if trace.tokens else 0))
                bits = -trace.log_likelihood[-1] / log(2.0)
                bar.update(task, advance=1, bits=f"{bits:.3f} bits per token")
        except KeyboardInterrupt:
            trace.interrupted = True
    return {name: counts.table() for name, counts in tables.items()}, trace


def _counts(
    graph: FactorGraph,
    start: dict[str, Tensor],
    blocks: Tensor,
    smoothing: float,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, RunningCounts]:
    """Counts of one block that make the tables of a start."""
    shapes, result = table_shapes(graph), dict[str, RunningCounts]()
    frequency = log_unigram(blocks, graph.variables[graph.tokens[0]].cardinality).exp()
    for factor in graph.factors.values():
        name, child = factor.tie or factor.name, graph.variables[factor.scope[-1]]
        if name in result:
            continue
        users = sum((f.tie or f.name) == name for f in graph.factors.values())
        parents = torch.Size(shapes[name][:-1]).numel()
        weight = START_WEIGHT * users / parents
        uniform = torch.full((child.cardinality,), 1.0 / child.cardinality, dtype=torch.float64)
        prior = smoothing * (uniform if child.latent else frequency + 1e-3 * uniform)
        table = start[name].to(device=device, dtype=dtype)
        result[name] = RunningCounts(table.exp() * weight, prior.clamp(min=1e-12).to(device=device))
    return result


def _update(expectation: Expectation, tables: dict[str, RunningCounts], batch: Tensor, step: float) -> float:
    """Move the counts by one minibatch; its summed log-likelihood before that."""
    found = expectation(tables, batch)
    weight = step / len(batch)
    for counts in tables.values():
        counts.decay(step)
    for name, value in found.dense.items():
        tables[name].add(value, weight)
    for name, (tokens, rows) in found.rows.items():
        tables[name].add_rows(tokens, rows, weight)
    return found.log_likelihood
