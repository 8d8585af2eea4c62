"""One run of expectation maximisation, update by update, from one start."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from codd_ppl.graphs import FactorGraph
from codd_ppl.potentials.expectation import Expectation
from codd_ppl.potentials.running_counts import RunningCounts
from codd_ppl.potentials.starts import Start, token_values
from codd_ppl.potentials.statistics import log_unigram
from codd_ppl.potentials.table import table_shapes
from codd_ppl.potentials.trace import Trace
from codd_ppl.typing import Float, Int

__all__ = ["Fit", "Problem"]

START_WEIGHT = 1.0
"""Of the start's tables among the counts, in blocks."""

LEAST = 1e-12
"""Prior counts of a child in minibatches, whatever the smoothing: the next one may hold it."""


@dataclass(frozen=True)
class Problem:
    """What is fitted, and how; see :func:`codd_ppl.potentials.baum_welch`."""

    graph: FactorGraph
    expectation: Expectation
    blocks: Tensor
    valid_blocks: Tensor | None
    batch_size: int | None
    step_power: float
    smoothing: float
    tolerance: float
    dtype: torch.dtype
    device: torch.device | str
    keep_zeros: bool
    held_out_every: int | None = None

    @property
    def updates_of_a_pass(self) -> int:
        """Updates that see every block once."""
        return 1 if self.batch_size is None else -(-len(self.blocks) // self.batch_size)


class Fit:
    """A run: the counts that make the tables now, and what happened so far.

    Args:
        problem: shared by all restarts.
        start: where it starts.
        seed: of the start and the order of the blocks.
        began: when the seconds of the trace start, by ``time.perf_counter``.
    """

    def __init__(self, problem: Problem, start: Start, seed: int, began: float) -> None:
        self.problem, self.began, self.trace = problem, began, Trace()
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.counts = _first_counts(problem, start.tables(problem.graph, problem.blocks, self.generator))

    @classmethod
    def resumed(
        cls,
        problem: Problem,
        counts: dict[str, RunningCounts],
        trace: Trace,
        generator: Tensor,
        order: Tensor,
        began: float,
    ) -> Fit:
        """A run that goes on from where another one stood.

        Args:
            problem: the same.
            counts, trace, order: of that one, between two updates.
            generator: state of its generator.
            began: when this one began, by ``time.perf_counter``.
        """
        fit = cls.__new__(cls)
        fit.problem, fit.counts, fit.trace, fit.order = problem, counts, trace, order
        fit.began = began - (trace.seconds[-1] if trace.seconds else 0.0)
        fit.generator = torch.Generator()
        fit.generator.set_state(generator)
        return fit

    def update(self) -> None:
        """One expectation and one maximisation step."""
        trace, k = self.trace, len(self.trace.log_likelihood)
        per_pass, size = self.problem.updates_of_a_pass, self.problem.batch_size
        if size is None:
            seen = self._full_update()
        else:
            if k % per_pass == 0:
                self.order = torch.randperm(len(self.problem.blocks), generator=self.generator)
            first = (k % per_pass) * size
            batch = self.problem.blocks[self.order[first : first + size]]
            seen = self._small_update(batch, (k + 2.0) ** -self.problem.step_power)
        trace.tokens.append(seen + (trace.tokens[-1] if trace.tokens else 0))
        trace.seconds.append(time.perf_counter() - self.began)
        if (k + 1) % (self.problem.held_out_every or per_pass) == 0:
            self.hold_out()

    def hold_out(self) -> None:
        """Note the likelihood of the held-out blocks, if there are any."""
        blocks, trace = self.problem.valid_blocks, self.trace
        if blocks is not None and not (trace.held_out and trace.held_out[-1][0] == trace.tokens[-1]):
            trace.held_out.append((trace.tokens[-1], self.log_likelihood(blocks)))

    def log_likelihood(self, blocks: Int[Tensor, "blocks sites"]) -> float:
        """Mean under the present tables, nats per token."""
        found = self.problem.expectation.log_likelihood(self.counts, blocks.to(self.problem.device).long())
        return float(found.mean(dtype=torch.float64)) / blocks.shape[1]

    def tables(self) -> dict[str, Float[Tensor, "..."]]:
        """Tie or factor name -> log-probabilities over the last axis."""
        return {name: counts.table() for name, counts in self.counts.items()}

    def _small_update(self, batch: Tensor, step: float) -> int:
        """Move the counts by a minibatch; the number of its tokens."""
        found = [self.problem.expectation(self.counts, part) for part in self._chunks(batch)]
        for counts in self.counts.values():
            counts.decay(step)
        likelihood = sum(some.add_to(self.counts, step / len(batch)) for some in found)
        self.trace.log_likelihood.append(likelihood / batch.numel())
        return batch.numel()

    def _full_update(self) -> int:
        """Replace the counts by those of all blocks; the number of their tokens."""
        blocks, trace = self.problem.blocks, self.trace
        fresh = {name: counts.empty() for name, counts in self.counts.items()}
        likelihood = 0.0
        for part in self._chunks(blocks):
            likelihood += self.problem.expectation(self.counts, part).add_to(fresh, 1.0 / len(blocks))
        penalty = sum(float(counts.penalty()) for counts in self.counts.values())
        trace.log_likelihood.append(likelihood / blocks.numel())
        trace.objective.append(likelihood / len(blocks) + penalty)
        self.counts = fresh
        rise = trace.objective[-1] - trace.objective[-2] if len(trace.objective) > 1 else torch.inf
        trace.converged = self.problem.tolerance > 0 and rise < self.problem.tolerance * blocks.shape[1]
        return blocks.numel()

    def _chunks(self, blocks: Tensor) -> list[Tensor]:
        return [part.to(self.problem.device).long() for part in blocks.split(self.problem.expectation.chunk)]


def _first_counts(problem: Problem, start: dict[str, Tensor]) -> dict[str, RunningCounts]:
    """Counts of :data:`START_WEIGHT` blocks that make the tables of a start."""
    graph, shapes, start = problem.graph, table_shapes(problem.graph), dict(start)
    frequency = log_unigram(problem.blocks, token_values(graph)).exp()
    result: dict[str, RunningCounts] = {}
    for factor in graph.factors.values():
        name, child = factor.tie or factor.name, graph.variables[factor.scope[-1]]
        if name in result:
            continue
        users = sum((f.tie or f.name) == name for f in graph.factors.values())
        weight = START_WEIGHT * users / torch.Size(shapes[name][:-1]).numel()
        uniform = torch.full((child.cardinality,), 1.0 / child.cardinality, dtype=torch.float64)
        prior = problem.smoothing * (uniform if child.latent else frequency + 1e-3 * uniform)
        prior = prior if problem.batch_size is None else prior.clamp(min=LEAST)
        table = start.pop(name).detach().to(device=problem.device, dtype=problem.dtype)  # large
        support = table > -torch.inf if problem.keep_zeros else None
        result[name] = RunningCounts(table.exp().mul_(weight), prior.to(problem.device), support)
    return result
