"""Plots and a self-contained HTML report of the demonstration."""

from __future__ import annotations

import base64
import html
import os
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from codd_ppl.evaluation import NelboTable, plot_nelbo, plot_reveal_history, save_figure
from codd_ppl.graphs import FactorGraph, draw
from codd_ppl.sampling import Generation

__all__ = ["write_report"]


def write_report(
    folder: Path,
    table: NelboTable,
    samples: dict[str, list[str]],
    graph: FactorGraph,
    generation: Generation,
) -> Path:
    """Write nelbo.png, graph.png, reveals.png and report.html, which holds all of it, into ``folder``."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    draw(graph, figure.add_subplot())
    figures = {
        "nelbo": ("NELBO_T on held-out text", plot_nelbo(table)),
        "graph": ("The coupling (first six sites)", figure),
        "reveals": ("The step in which each site was revealed", plot_reveal_history(generation)),
    }
    parts = ["<h1>codd demo</h1>", f"<pre>{html.escape(_text(table))}</pre>"]
    for name, (caption, drawing) in figures.items():
        path = folder / f"{name}.png"
        save_figure(drawing, path)
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        parts.append(f'<h2>{caption}</h2><img alt="{caption}" src="data:image/png;base64,{data}">')
    parts.append("<h2>Samples at 4 steps</h2>")
    for name, rows in samples.items():
        body = "\n".join(html.escape(row.replace("\n", "⏎")) for row in rows)
        parts.append(f"<h3>{html.escape(name)}</h3><pre>{body}</pre>")
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>codd demo</title>'
        "<style>body{font-family:sans-serif;max-width:60em;margin:2em auto}pre{overflow-x:auto}"
        "img{max-width:100%}</style>" + "\n".join(parts) + "</html>\n"
    )
    target = folder / "report.html"
    draft = folder / f".report.{os.getpid()}.tmp"
    try:
        draft.write_text(page, encoding="utf-8")
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def _text(table: NelboTable) -> str:
    """The table as plain text."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(file=nowhere, width=100, record=True)
        console.print(table.render("factorised", equivalent=(1, 4)))
        return console.export_text()
