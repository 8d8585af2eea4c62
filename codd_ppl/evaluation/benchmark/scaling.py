"""How our cost grows with sites, states and vocabulary: sizes timed in turn, and the slope of a line in logarithms."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from codd_ppl.evaluation.benchmark.cases import Case, make_inputs
from codd_ppl.evaluation.benchmark.ours import answers
from codd_ppl.evaluation.benchmark.rounds import Candidate, Clock, measure

__all__ = ["AXES", "Curve", "curves", "slope"]

AXES = ("sites", "states", "vocab")


@dataclass(frozen=True)
class Curve:
    """Times of one query along one axis.

    Attributes:
        axis: "sites", "states" or "vocab".
        query: what was asked.
        sizes, seconds: of each point.
    """

    axis: str
    query: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def slope(self) -> float:
        """Of log seconds against log size: 1 is linear."""
        return slope(self.sizes, self.seconds)


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Least squares in logarithms; NaN for fewer than two sizes."""
    if len(sizes) < 2:
        return math.nan
    logs = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    return statistics.linear_regression(*logs).slope


def curves(
    axis: str, quick: bool = False, budget: float = 6.0, clock: Clock = time.perf_counter
) -> list[Curve]:
    """Measure an axis: 8 chains of 32 states with a shared table (sites), 4 of 32 sites (states), or tokens (vocab)."""
    sizes: tuple[int, ...]
    queries: tuple[str, ...]
    if axis == "sites":
        sizes = (64, 128, 256) if quick else (256, 1024, 4096, 16_384)
        queries = ("log_partition", "gradient", "marginals", "mode", "sample")
        cases = [Case("shared", 8, size, 32) for size in sizes]
    elif axis == "states":
        sizes = (8, 16, 32) if quick else (32, 64, 128, 256, 512, 1024)
        queries = ("log_partition", "marginals")
        cases = [Case("shared", 4, 32, size) for size in sizes]
    else:
        sizes = (512, 1024, 2048) if quick else (2048, 4096, 8192, 16_384, 32_768)
        queries = ("log_partition", "sample")
        cases = [Case("tokens", 1, 16 if quick else 32, 32 if quick else 256, size) for size in sizes]
    inputs = [make_inputs(case) for case in cases]
    found = []
    for query in queries:
        each = [answers(query, i) for i in inputs]
        named = [
            Candidate(str(size), "ours", c.call, read=c.read) for size, c in zip(sizes, each, strict=True)
        ]
        timings = measure(named, budget, clock=clock)
        medians = tuple(t.median or math.nan for t in timings.values())
        found.append(Curve(axis, query, sizes, medians))
    return found
