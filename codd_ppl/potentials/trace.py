"""What a fit by expectation maximisation did."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import nan

__all__ = ["Trace"]


@dataclass
class Trace:
    """What the fit did; of several restarts, the one that went on.

    Attributes:
        log_likelihood: mean log-likelihood before each update of what it looked at, nats per token.
        objective: what full-batch updates raise, before each of them, nats per block; empty for minibatches.
        seconds: since the fit began, other restarts included, after each update.
        tokens: seen after each update.
        held_out: (tokens seen, mean log-likelihood of the held-out blocks, nats per token), after each pass.
        converged: it ended because the objective rose by less than the tolerance.
        interrupted: it was stopped by Ctrl-C; the tables are those reached so far.
    """

    log_likelihood: list[float] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    converged: bool = False
    interrupted: bool = False

    @property
    def final(self) -> float:
        """Mean of ``log_likelihood`` over the last tenth of the updates; NaN if there was none."""
        tail = self.log_likelihood[-max(1, len(self.log_likelihood) // 10) :]
        return sum(tail) / len(tail) if tail else nan
