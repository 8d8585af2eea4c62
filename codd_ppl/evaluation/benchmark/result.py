"""What a run of the benchmark found, as one object that goes to JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from codd_ppl.evaluation.benchmark.limits import Limits
from codd_ppl.evaluation.benchmark.rounds import Timing
from codd_ppl.evaluation.benchmark.scaling import Curve
from codd_ppl.evaluation.benchmark.tasks import Cell

__all__ = ["Result"]


@dataclass
class Result:
    """The parts that were asked for, filled one after the other.

    Attributes:
        about: command, date, device, threads, versions.
        limits: rates of the machine.
        cells: each row with its timings by candidate.
        memory: case -> query -> candidate -> peak bytes over bytes of the input.
        numerics: problem -> candidate -> errors.
        curves: cost against sizes.
        skipped: what was not measured, and why.
    """

    about: dict[str, Any]
    limits: Limits
    cells: list[tuple[Cell, dict[str, Timing]]] = field(default_factory=list)
    memory: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    numerics: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def timing(self, cell: Cell, name: str) -> float | None:
        """Median seconds of a candidate in a cell."""
        for other, timings in self.cells:
            if other == cell and name in timings:
                return timings[name].median
        return None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: seconds, and ratios without a unit."""
        from codd_ppl.evaluation.benchmark.targets import targets

        rows = [
            {
                "task": cell.task,
                "query": cell.query,
                **asdict(cell.case),
                "limit": self.limits.seconds(cell.query, cell.case),
                "candidates": {name: timing.to_dict() for name, timing in timings.items()},
            }
            for cell, timings in self.cells
        ]
        return {
            "about": self.about,
            "limits": self.limits.to_dict(),
            "targets": [target.to_dict() for target in targets(self)],
            "cells": rows,
            "memory": self.memory,
            "numerics": self.numerics,
            "scaling": [{**asdict(curve), "slope": curve.slope} for curve in self.curves],
            "skipped": self.skipped,
        }
