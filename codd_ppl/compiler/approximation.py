"""Approximations, each an object that has to be asked for: ``compile(graph, approximate=...)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from codd_ppl.errors import ConfigError
from codd_ppl.graphs import Factor, Variable

__all__ = ["LoopyBeliefPropagation"]


@dataclass(frozen=True)
class LoopyBeliefPropagation:
    """Sum-product messages sent round and round a graph with loops (Pearl 1988; Murphy, Weiss and Jordan 1999).

    A fixed point is a stationary point of the Bethe free energy (Yedidia, Freeman and Weiss 2005). On a forest it is
    exact; with loops it is good where couplings are weak, and may be poor or fail to converge where they are strong.

    Args:
        iterations: rounds at most; in each every factor sends all its messages.
        damping: share of the old log-message that is kept, from 0 to below 1. 0 is fastest on forests; loops with
            strong couplings need 0.5 or more to settle.
        tolerance: a batch element has converged when none of its messages, as probabilities, changed by more than this
            in the last round, before damping.

    Raises:
        ConfigError: a setting out of range.
    """

    iterations: int = 200
    damping: float = 0.5
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ConfigError(f"expected iterations as an integer >= 1, found {self.iterations!r}")
        if not 0 <= self.damping < 1:
            raise ConfigError(f"expected damping from 0 to below 1, found {self.damping!r}")
        if not self.tolerance >= 0:
            raise ConfigError(f"expected tolerance >= 0, found {self.tolerance!r}")

    def explain(self, variables: Sequence[Variable], factors: Sequence[Factor]) -> list[str]:
        """What a query will do, and what a round costs."""
        sizes = {v.name: v.cardinality for v in variables}
        shapes = [[sizes[v] for v in f.scope] for f in factors if f.order > 1]
        flops = sum(2 * len(shape) * prod(shape) for shape in shapes)
        messages = sum(sum(shape) for shape in shapes)
        return [
            "NOT EXACT: log_partition is the Bethe approximation, marginals are beliefs",
            f"order: all {sum(map(len, shapes))} messages of a round at once; at most {self.iterations} rounds, "
            f"damping {self.damping:g}, until no message changes by more than {self.tolerance:g}",
            f"each round, float32: about {flops:,} FLOPs x batch, {4 * messages:,} bytes of messages x batch",
        ]
