"""The benchmark from beginning to end: the parts that were asked for, tables as they come, files after each part."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

import codd_ppl.evaluation.benchmark.report as report
from codd_ppl.errors import ConfigError
from codd_ppl.evaluation.benchmark import memory, numerics, scaling
from codd_ppl.evaluation.benchmark.cases import Case
from codd_ppl.evaluation.benchmark.limits import measure_limits
from codd_ppl.evaluation.benchmark.peers import versions
from codd_ppl.evaluation.benchmark.result import Result
from codd_ppl.evaluation.benchmark.rounds import Clock, measure
from codd_ppl.evaluation.benchmark.tasks import TASKS, cells, comparison
from codd_ppl.evaluation.machine import processor

__all__ = ["PARTS", "BenchmarkSettings", "benchmark_inference"]

WIDTH = 150
"""Columns where there is no terminal to ask."""

PARTS = (*TASKS, "memory", "numerics", "scaling")
"""What ``--only`` can name."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """What to measure, and for how long.

    Attributes:
        parts: some of `PARTS`.
        quick: small sizes only.
        budget: seconds after which no further cell is begun; those left are listed.
        cell_seconds: of timed calls in one cell.
        threads: of torch.
        clock: as for `measure`.
    """

    parts: tuple[str, ...] = PARTS
    quick: bool = False
    budget: float = 1800.0
    cell_seconds: float = 2.0
    threads: int = 1
    clock: Clock = time.perf_counter

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ConfigError(
                f"parts: expected some of {', '.join(PARTS)}, found {', '.join(unknown) or 'none'}; "
                "give them as --only T1,T3"
            )
        if not (self.budget > 0 and self.cell_seconds > 0 and self.threads >= 1):
            raise ConfigError(
                f"expected budget and cell_seconds above 0 and threads >= 1, found {self.budget}, "
                f"{self.cell_seconds} and {self.threads}; leave them out for the defaults"
            )


def benchmark_inference(
    output: Path, settings: BenchmarkSettings | None = None, command: str = "", console: Console | None = None
) -> Result:
    """Measure, print the tables, and write inference_cpu.json, .md and .png to ``output``.

    Each candidate answers in this process, one call each in turn (`measure`). The files are written anew after each
    part, whole, so that an interrupted run leaves the parts that were done.

    Raises:
        ConfigError: ``output`` is a file.
    """
    settings = BenchmarkSettings() if settings is None else settings
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file, expected a folder to write to; pass another with --output")
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        result = Result(
            _about(settings, command), measure_limits(0.05 if settings.quick else 0.5, settings.clock)
        )
        end = time.monotonic() + settings.budget
        for part in settings.parts:
            shown = len(report.sheets(result))
            _run(part, result, settings, end, console)
            result.about["load at the end"] = _load()
            report.save(result, output)
            for sheet in report.sheets(result)[shown:]:
                console.print(sheet.rich())
        for sheet in report.sheets(result)[:2]:
            console.print(sheet.rich())
        console.print(f"written to {output}", markup=False, highlight=False)
        return result
    finally:
        torch.set_num_threads(before)


def _run(part: str, result: Result, settings: BenchmarkSettings, end: float, console: Console) -> None:
    quick = settings.quick
    seconds = min(0.3, settings.cell_seconds) if quick else settings.cell_seconds

    def late(what: str) -> bool:
        if time.monotonic() < end:
            return False
        result.skipped[what] = f"the budget of {settings.budget:g} s was used up"
        return True

    with console.status(part) as status:
        for cell in cells(part, quick) if part in TASKS else ():
            if late(cell.name):
                continue
            status.update(cell.name)
            inputs, candidates = cell.candidates(settings.threads)
            compare = comparison(cell.query, inputs, candidates)
            result.cells.append((cell, measure(candidates, seconds, compare, settings.clock)))
            del inputs, candidates, compare
            gc.collect()
        if part == "memory" and not late(part):
            case = Case("full", 8, 32, 32) if quick else Case("full", 8, 128, 128)
            result.memory[case.name] = memory.peaks(case)
        for problem in numerics.problems(quick) if part == "numerics" else ():
            if not late(problem.name):
                status.update(problem.name)
                result.numerics[problem.name] = numerics.errors(problem, settings.threads)
        for axis in scaling.AXES if part == "scaling" else ():
            if not late(f"scaling in {axis}"):
                status.update(f"scaling in {axis}")
                result.curves += scaling.curves(axis, quick, seconds, settings.clock)


def _about(settings: BenchmarkSettings, command: str) -> dict[str, object]:
    found = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": processor(),
        "cores": os.cpu_count(),
        "load": _load(),
        "threads": settings.threads,
        "clock": "wall" if settings.clock is time.perf_counter else "processor time of the process",
        "python": platform.python_version(),
        "versions": found | versions(),
    }


def _load() -> float | None:
    """Processes that wanted to run in the last minute; what is above the threads asked for disturbs the times."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
