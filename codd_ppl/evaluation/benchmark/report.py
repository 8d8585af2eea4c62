"""Tables of a result for the terminal and as markdown, and the files that a run leaves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from codd_ppl.evaluation.benchmark.ours import OURS
from codd_ppl.evaluation.benchmark.result import Result
from codd_ppl.evaluation.benchmark.rounds import Timing
from codd_ppl.evaluation.benchmark.targets import targets
from codd_ppl.evaluation.benchmark.tasks import STREAMED, TASKS

__all__ = ["Sheet", "save", "sheets", "write"]

_STREAM = (
    f"'{STREAMED}': exp of each edge's table when its turn comes, in cache, not of the whole table before"
)


@dataclass(frozen=True)
class Sheet:
    """A table of strings with a title and notes below."""

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def rich(self) -> Table:
        """For the terminal."""
        grid = Table(title=Text(self.title), box=SIMPLE_HEAD, title_justify="left", caption_justify="left")
        for i, name in enumerate(self.heading):
            grid.add_column(Text(name), justify="left" if i == 0 else "right")
        for row in self.rows:
            grid.add_row(*(Text(cell) for cell in row))
        if self.notes:
            grid.caption = Text("\n".join(self.notes))
        return grid

    def markdown(self) -> str:
        """The same for a page."""
        lines = [f"## {self.title}", "", "| " + " | ".join(self.heading) + " |"]
        lines.append("|" + "---|" * len(self.heading))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *(["", *(f"- {note}" for note in self.notes)] if self.notes else []), ""])


def sheets(result: Result) -> list[Sheet]:
    """Every table of the result: targets first."""
    found = [_targets(result), _machine(result)]
    keys = dict.fromkeys((cell.task, cell.query, cell.case.layout) for cell, _ in result.cells)
    found += [_timings(result, *key) for key in keys]
    if result.memory:
        rows = [
            [f"{query} {case}", name, _number(ratio)]
            for case, queries in result.memory.items()
            for query, ratios in queries.items()
            for name, ratio in ratios.items()
        ]
        found.append(Sheet("Peak extra memory / input", ["query", "candidate", "ratio"], rows))
    found += _numerics(result)
    if result.curves:
        rows = []
        for c in result.curves:
            points = ", ".join(f"{n:,}: {1e3 * s:.3g}" for n, s in zip(c.sizes, c.seconds, strict=True))
            rows.append([f"{c.axis}: {c.query}", f"{c.slope:.2f}", points])
        found.append(Sheet("Growth of our cost", ["axis: query", "slope", "ms"], rows))
    if result.skipped:
        found.append(Sheet("Not measured", ["what", "why"], [[k, v] for k, v in result.skipped.items()]))
    return found


def _targets(result: Result) -> Sheet:
    rows = []
    for t in targets(result):
        case, worst = t.worst
        reached = f"{t.reached} of {len(t.ratios)}"
        rows.append([t.name, f"<= {t.most:g}", _number(t.middle), f"{_number(worst)} ({case})", reached])
    return Sheet(
        "Ratios of codd_ppl against targets", ["ratio", "target", "median", "worst", "reached"], rows
    )


def _ratios(result: Result) -> Sheet:
    """Every ratio that a target is about."""
    rows = []
    for t in targets(result):
        for case, ratio in t.ratios.items():
            reached = "yes" if t.least <= ratio <= t.most else "no"
            rows.append([t.name, case, f"{ratio:.3g}", f"{t.most:g}", reached])
    return Sheet("Every ratio", ["ratio", "case", "measured", "target", "reached"], rows)


def _machine(result: Result) -> Sheet:
    limits = result.limits
    rows = [
        ["matrix product, GFLOP/s (float32)", f"{limits.gemm / 1e9:.3g}"],
        ["copy, GB/s read and written", f"{limits.copy / 1e9:.3g}"],
        ["exp, G elements/s", f"{limits.exp / 1e9:.3g}"],
        ["one small operation, microseconds", f"{limits.op * 1e6:.3g}"],
    ]
    about = [f"{key}: {value}" for key, value in result.about.items() if key != "versions"]
    about.append("versions: " + ", ".join(f"{k} {v}" for k, v in result.about.get("versions", {}).items()))
    return Sheet("The machine", ["limit", "measured"], rows, about)


def _timings(result: Result, task: str, query: str, layout: str) -> Sheet:
    """Medians in ms, ratios to the first plain column, then ours over the limit; absent candidates as notes."""
    some = [
        (cell, t)
        for cell, t in result.cells
        if (cell.task, cell.query, cell.case.layout) == (task, query, layout)
    ]
    names = list(dict.fromkeys(name for _, timings in some for name in timings))
    shown = [n for n in names if any(n in t and t[n].median is not None for _, t in some)]
    rows, reasons, wrong = [], dict[tuple[str, str], list[str]](), []
    for cell, timings in some:
        sizes = cell.case.name.removeprefix(f"{layout} ")
        base = next((t.median for t in timings.values() if t.kind == "plain"), None)
        limit = result.limits.seconds(query, cell.case)
        row = [sizes, *(_cell(timings.get(name), base) for name in shown), f"{1e3 * limit:.3g}"]
        mine = timings[OURS].median if OURS in timings else None
        rows.append([*row, "-" if mine is None else _number(mine / limit)])
        for name, timing in timings.items():
            if timing.reason:
                reasons.setdefault((name, timing.reason), []).append(sizes)
            if timing.error is not None and not timing.error < 1e-3:
                wrong.append(f"{name} is wrong at {sizes}: error {timing.error:.2g}")
    where = f"batch,sites,states{',vocab' if layout == 'tokens' else ''}"
    notes = [] if not any(n.endswith(STREAMED) for n in shown) else [_STREAM]
    notes += [f"{name}: {why} ({'; '.join(at)})" for (name, why), at in reasons.items()]
    title = f"{task} {query}, {layout} ({TASKS[task]}): ms, xR = ratio to the first column"
    return Sheet(title, [where, *shown, "limit ms", f"{OURS} / limit"], rows, [*notes, *wrong])


def _cell(timing: Timing | None, base: float | None) -> str:
    if timing is None or timing.median is None:
        return "-"
    ratio = f" x{_number(timing.median / base)}" if base and timing.median != base else ""
    return f"{1e3 * timing.median:.3g}{ratio}"


def _numerics(result: Result) -> list[Sheet]:
    found = []
    titles = {"log_partition": "log Z, nats", "marginals": "site marginals"}
    for query, title in titles.items():
        rows = result.numerics
        names = list(dict.fromkeys(n for row in rows.values() for n, e in row.items() if query in e))
        table = [[p, *(_number(row.get(n, {}).get(query, "-")) for n in names)] for p, row in rows.items()]
        if table:
            found.append(
                Sheet(f"float32 error against float64 in log space: {title}", ["problem", *names], table)
            )
    return found


def _number(value: Any) -> str:
    if not isinstance(value, float | int):
        return str(value)
    return f"{value:.2g}" if value < 10 or math.isinf(value) else f"{value:.0f}"


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(result: Result, folder: Path) -> list[Path]:
    """inference_cpu.json, .md and, if there are curves, .png: the paths written."""
    from codd_ppl.evaluation.benchmark.figure import plot_curves
    from codd_ppl.evaluation.plots import save_figure

    paths = [folder / "inference_cpu.json", folder / "inference_cpu.md"]
    write(paths[0], json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n")
    about = "\n".join(sheet.markdown() for sheet in [*sheets(result), _ratios(result)])
    write(paths[1], f"# codd bench inference\n\n{about}")
    if result.curves:
        paths.append(folder / "inference_cpu.png")
        save_figure(plot_curves(result.curves), paths[-1])
    return paths
