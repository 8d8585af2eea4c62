"""Minibatch Baum-Welch: expectation maximisation of a directed latent forest on text, by counts of the engine.

The expected counts of a table are the gradient of the log-partition with respect to it, whatever the topology
(Eisner 2016, "Inside-outside and forward-backward algorithms are just backprop"), so that one routine fits hidden
Markov models, latent trees and mixtures. Counts of successive minibatches are averaged with a decaying step
(stepwise EM: Cappe and Moulines 2009, arXiv:0712.4273; Liang and Klein 2009), which converges in a few passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log, nan

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from codd_ppl.compiler import ContractionPlan, compile
from codd_ppl.errors import ConfigError, GraphError
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import directed_parents
from codd_ppl.inference import log_partition
from codd_ppl.potentials.statistics import check_blocks, log_unigram
from codd_ppl.potentials.table import table_shapes
from codd_ppl.typing import Float, Int

__all__ = ["Trace", "baum_welch"]


@dataclass
class Trace:
    """What the fit did.

    Attributes:
        log_likelihood: mean log-likelihood of each minibatch before its update, nats per token.
        interrupted: it was stopped by Ctrl-C; the tables are those reached so far.
    """

    log_likelihood: list[float] = field(default_factory=list)
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
) -> tuple[dict[str, Float[Tensor, "..."]], Trace]:
    """Fit the conditional tables of a directed forest to blocks of text.

    Args:
        graph: scopes (parent, child) along a directed forest, unary factors on roots only.
        blocks: (n, sites) int64 token ids.
        epochs: passes over the blocks; may be a fraction.
        batch_size: blocks of a minibatch.
        step_power: minibatch k moves the running counts by (k + 2)^-step_power, 0.5 < step_power <= 1.
        smoothing: counts given to every row in proportion to its children's frequencies, plus a tiny uniform one, so
            that nothing is impossible.
        seed: of the random start and the order of the blocks.
        progress: show a progress bar with bits per token.

    Returns:
        Tie or factor name -> log-probabilities over the last axis (the child), and the trace.
        Ctrl-C ends the fit early; the trace says so.

    Raises:
        GraphError: not a directed forest.
        ConfigError: a setting out of range.
        ShapeError, TokenError: blocks that don't fit the graph.
    """
    parents = directed_parents(graph)
    if parents is None:
        raise GraphError("Baum-Welch needs scopes that read (parent, child) along a directed forest")
    if epochs <= 0 or batch_size < 1 or not 0.5 < step_power <= 1 or smoothing < 0:
        raise ConfigError(
            f"expected epochs > 0, batch_size >= 1, 0.5 < step_power <= 1 and smoothing >= 0, found epochs={epochs}, "
            f"batch_size={batch_size}, step_power={step_power}, smoothing={smoothing}"
        )
    tokens = [graph.variables[name] for name in graph.tokens]
    check_blocks(blocks, len(tokens), tokens[0].cardinality)
    blocks = blocks.cpu().long()
    plan = compile(graph)
    # A root without a unary factor is uniform over its values.
    unary = {f.scope[0] for f in graph.factors.values() if f.order == 1}
    constant = sum(log(v.cardinality) for v in graph if parents[v.name] is None and v.name not in unary)
    names = tuple(v.name for v in tokens)
    generator = torch.Generator().manual_seed(seed)
    tables = _start(graph, blocks, generator)
    one_hot = torch.where(torch.eye(tokens[0].cardinality, dtype=torch.bool), 0.0, -torch.inf)
    per_epoch = max(1, -(-len(blocks) // batch_size))
    total = max(1, round(epochs * per_epoch))
    trace, counts, order = Trace(), dict[str, Tensor](), torch.empty(0, dtype=torch.int64)
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
                start = (k % per_epoch) * batch_size
                batch = blocks[order[start : start + batch_size]]
                expected, likelihood = _expect(plan, tables, names, one_hot[batch])
                step = (k + 2.0) ** -step_power
                for name, value in expected.items():
                    value = value / batch.shape[0]
                    counts[name] = value if k == 0 else (1 - step) * counts[name] + step * value
                trace.log_likelihood.append((likelihood / len(batch) - constant) / batch.shape[1])
                tables = {name: _maximise(value, smoothing) for name, value in counts.items()}
                bits = -trace.log_likelihood[-1] / torch.log(torch.tensor(2.0)).item()
                bar.update(task, advance=1, bits=f"{bits:.3f} bits per token")
        except KeyboardInterrupt:
            trace.interrupted = True
    return {name: table.detach() for name, table in tables.items()}, trace


def _start(graph: FactorGraph, blocks: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tables, near uniform over latent children and near the frequencies over token children.

    Where each token has a latent of its own (hidden Markov models, latent trees) every state starts as a clone of one
    token, frequent tokens having several: the chain starts as a bigram model and learns contexts from there.
    """
    parents = [f.scope[0] for f in graph.factors.values() if not graph.variables[f.scope[-1]].latent]
    clones = len(set(parents)) == len(parents)
    vocab = next(v for v in graph if not v.latent).cardinality
    frequency = log_unigram(blocks, vocab).float()
    shares = (0.7 * frequency).softmax(-1).cumsum(-1)
    tables = {}
    for factor in graph.factors.values():
        name, child = factor.tie or factor.name, graph.variables[factor.scope[-1]]
        if name in tables:
            continue
        shape = table_shapes(graph)[name]
        noise = torch.randn(shape, generator=generator)
        if child.latent:
            tables[name] = (0.3 * noise).log_softmax(-1)
        elif clones and len(shape) == 2:
            states = torch.arange(shape[0])
            own = torch.searchsorted(shares, (states + 0.5) / shape[0]).clamp(max=vocab - 1)
            mixed = 0.5 * frequency.exp() + 0.5 * torch.nn.functional.one_hot(own, vocab)
            tables[name] = (mixed.log() + 0.5 * noise).log_softmax(-1)
        else:
            tables[name] = (frequency + noise).log_softmax(-1)
    return tables


def _expect(
    plan: ContractionPlan, tables: dict[str, Tensor], names: tuple[str, ...], evidence: Tensor
) -> tuple[dict[str, Tensor], float]:
    """Expected counts of every table and the summed log-likelihood of a minibatch."""
    leaves = {name: table.detach().requires_grad_() for name, table in tables.items()}
    with torch.enable_grad():
        potentials: dict[str | tuple[str, ...], Tensor] = {names: evidence}
        potentials.update(leaves)
        total = log_partition(plan, potentials).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True)), float(total.detach())


def _maximise(counts: Tensor, smoothing: float) -> Tensor:
    """Log-probabilities over the last axis from expected counts."""
    child = counts.flatten(0, -2).sum(0) if counts.dim() > 1 else counts
    frequency = child / child.sum().clamp(min=1e-30)
    floor = smoothing * (frequency + 1e-3 / counts.shape[-1])
    return (counts.clamp(min=0) + floor.clamp(min=1e-12)).log().log_softmax(-1)
