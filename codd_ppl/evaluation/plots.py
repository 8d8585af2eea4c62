"""Figures of a table of bounds and of a generation; matplotlib objects only, no pyplot state."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from codd_ppl.errors import ShapeError
from codd_ppl.evaluation.table import NelboTable
from codd_ppl.sampling import Generation

__all__ = ["plot_curves", "plot_nelbo", "plot_reveal_history", "save_figure"]


def plot_nelbo(
    table: NelboTable,
    models: Sequence[str] | None = None,
    entropy: float | None = None,
    axes: Axes | None = None,
) -> Figure:
    """NELBO_T against T on a log axis, one line per model, bars of two standard errors.

    Args:
        table: the bounds.
        models: which models, in which order; all if None.
        entropy: bits per token of the data where it is known (toy distributions): drawn as the floor.
        axes: where to draw; a new figure if None.

    Returns:
        The figure that holds the axes.
    """
    curves: dict[str, dict[int, tuple[float, float]]] = {}
    for model in table.models if models is None else models:
        steps = sorted(table.values[model]) if model in table.values else [table.sites]
        curves[model] = {T: (table.mean(model, T), 2.0 * table.standard_error(model, T)) for T in steps}
    return plot_curves(curves, entropy, axes)


def plot_curves(
    curves: Mapping[str, Mapping[int, tuple[float, float]]],
    entropy: float | None = None,
    axes: Axes | None = None,
) -> Figure:
    """As `plot_nelbo`, of given figures: model -> T -> (bits per token, half the length of the bar)."""
    axes = _axes(axes, width=6.0)
    for model, row in curves.items():
        means, errors = [mean for mean, _ in row.values()], [error for _, error in row.values()]
        axes.errorbar(list(row), means, yerr=errors, marker="o", markersize=4, capsize=2, label=model)
    if entropy is not None:
        axes.axhline(entropy, color="black", linestyle=":", label="entropy of the data")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({T for row in curves.values() for T in row}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("reverse steps T")
    axes.set_ylabel("NELBO$_T$ (bits per token)")
    axes.legend()
    return _figure(axes)


def plot_reveal_history(generation: Generation, axes: Axes | None = None) -> Figure:
    """The step in which each site was revealed, one row per sequence; given tokens are left blank.

    Raises:
        ShapeError: a history with nothing in it.
    """
    history = generation.history.detach().cpu()
    if history.numel() == 0:
        raise ShapeError(
            f"history: expected at least one site, found {tuple(history.shape)}; generate something first"
        )
    rows = history.reshape(-1, history.shape[-1]).double()
    axes = _axes(axes, width=max(6.0, 0.1 * rows.shape[1]))
    last = max(1.0, float(rows.max()))
    image = axes.imshow(
        rows.masked_fill(rows < 0, float("nan")).numpy(),
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=last,
    )
    axes.set_xlabel("site")
    axes.set_ylabel("sequence")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure = _figure(axes)
    figure.colorbar(image, ax=axes, label="step", ticks=MaxNLocator(integer=True))
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write the figure in the format of the suffix (png, pdf, svg), never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(temporary, dpi=dpi)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _axes(axes: Axes | None, width: float) -> Axes:
    return Figure(figsize=(width, 4.0), layout="constrained").add_subplot() if axes is None else axes


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None  # axes made by this module or by matplotlib always sit in a figure
    return figure
