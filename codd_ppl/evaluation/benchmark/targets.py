"""What the inference engine is meant to reach, and what it reached: ratios, at most so much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from codd_ppl.evaluation.benchmark.ours import OURS
from codd_ppl.evaluation.benchmark.result import Result
from codd_ppl.evaluation.benchmark.rounds import Timing
from codd_ppl.evaluation.benchmark.tasks import Cell

__all__ = ["Target", "targets"]


@dataclass(frozen=True)
class Target:
    """A ratio that should be at most ``most`` (and at least ``least``) in every case.

    Attributes:
        name: what is compared with what.
        ratios: case -> ratio.
    """

    name: str
    most: float
    ratios: dict[str, float]
    least: float = 0.0

    @property
    def reached(self) -> int:
        """In how many cases."""
        return sum(self.least <= r <= self.most for r in self.ratios.values())

    @property
    def middle(self) -> float:
        """The median ratio."""
        return median(self.ratios.values())

    @property
    def worst(self) -> tuple[str, float]:
        """The case with the largest ratio, and the ratio."""
        return max(self.ratios.items(), key=lambda item: item[1])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = {"name": self.name, "most": self.most, "least": self.least}
        return {**figures, "reached": self.reached, "cases": len(self.ratios), "ratios": self.ratios}


Rival = Callable[[Cell, dict[str, Timing]], float | None]


def targets(result: Result) -> list[Target]:
    """All targets for which the result has figures."""
    log = ("log_partition",)
    three = ("log_partition", "marginals", "sample")
    every = ("log_partition", "gradient", "marginals", "mode", "sample")
    chains = ("T1", "T2", "T3", "T4")

    def target(
        name: str,
        most: float,
        tasks: tuple[str, ...],
        queries: tuple[str, ...],
        rival: Rival,
        keep: Callable[[Cell], bool] = lambda cell: True,
    ) -> Target:
        ratios = {}
        for cell, timings in result.cells:
            if cell.task in tasks and cell.query in queries and keep(cell):
                mine, other = timings[OURS].median, rival(cell, timings)
                if mine is not None and other:
                    ratios[f"{cell.query} {cell.case.name}"] = mine / other
        return Target(name, most, ratios)

    def peer(name: str) -> Rival:
        return lambda cell, timings: timings[name].median if name in timings else None

    def limit(cell: Cell, timings: dict[str, Timing]) -> float:
        return result.limits.seconds(cell.query, cell.case)

    def single(cell: Cell, timings: dict[str, Timing]) -> float | None:
        return result.timing(replace(cell, query="sample"), OURS)

    def partition(cell: Cell, timings: dict[str, Timing]) -> float | None:
        return result.timing(replace(cell, query="log_partition"), OURS)

    def big(cell: Cell) -> bool:
        return (cell.case.vocab, cell.case.states, cell.case.batch) == (32_768, 1024, 8)

    found = [
        target("log_partition / plain", 1.1, ("T1",), log, _best("plain")),
        target(
            "log_partition and gradient / plain with autograd", 0.4, ("T1",), ("gradient",), _best("plain")
        ),
        target("marginals / plain with autograd", 0.4, ("T2",), ("marginals",), _autograd),
        Target(
            "peak extra memory / input",
            2.0,
            {f"{q} {case}": r[OURS] for case, rows in result.memory.items() for q, r in rows.items()},
        ),
        target("/ torch-struct, 8 states", 0.4, chains, every, peer("torch-struct"), _states(8, 9)),
        target("/ torch-struct, 32 states", 0.02, chains, every, peer("torch-struct"), _states(32, 33)),
        target(
            "mode / best other, 128 states and more, shared",
            0.5,
            ("T3",),
            ("mode",),
            _best("plain", "peer"),
            lambda cell: cell.case.layout == "shared" and cell.case.states >= 128,
        ),
        target("sample / plain", 1.0, ("T4",), ("sample",), _best("plain")),
        target("64 samples / one", 4.0, ("T4",), ("samples",), single),
        target("/ dynamax jit, 8 states", 3.0, chains, three, peer("dynamax"), _states(8, 9)),
        target(
            "/ dynamax jit, 32 states and more", 1.5, chains, three, peer("dynamax"), _states(32, 1 << 30)
        ),
        target(
            "tokens: log_partition / (gemm + exp) limit, V=32768 H=1024 B=8", 1.3, ("T5",), log, limit, big
        ),
        target("tokens: sample / log_partition, same size", 1.5, ("T5",), ("sample",), partition, big),
        Target(
            "slope in sites (0.95 to 1.05)",
            1.05,
            {c.query: c.slope for c in result.curves if c.axis == "sites"},
            least=0.95,
        ),
    ]
    return [t for t in found if t.ratios]


def _best(*kinds: str) -> Rival:
    def best(cell: Cell, timings: dict[str, Timing]) -> float | None:
        return min((t.median for t in timings.values() if t.kind in kinds and t.median), default=None)

    return best


def _autograd(cell: Cell, timings: dict[str, Timing]) -> float | None:
    """The faster of the plain variants that differentiate."""
    return min((t.median for n, t in timings.items() if "autograd" in n and t.median), default=None)


def _states(first: int, stop: int) -> Callable[[Cell], bool]:
    return lambda cell: first <= cell.case.states < stop
