"""Cost against size in logarithms, one panel for each axis."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from codd_ppl.evaluation.benchmark.scaling import AXES, Curve

__all__ = ["plot_curves"]


def plot_curves(curves: Sequence[Curve]) -> Figure:
    """One panel for each axis that was measured, one line for each query, its slope in the legend."""
    axes = [axis for axis in AXES if any(c.axis == axis for c in curves)]
    figure = Figure(figsize=(4.5 * len(axes), 4.0), layout="constrained")
    for panel, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
        for curve in (c for c in curves if c.axis == axis):
            label = f"{curve.query}: slope {curve.slope:.2f}"
            panel.plot(curve.sizes, [1e3 * s for s in curve.seconds], marker="o", markersize=4, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(axis)
        panel.set_ylabel("milliseconds")
        panel.legend(fontsize="small")
    return figure
