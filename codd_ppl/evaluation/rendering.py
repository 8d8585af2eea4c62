"""A table of bounds for the terminal: one row per number of steps, one part per coupled model."""

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from codd_ppl.errors import ConfigError
from codd_ppl.evaluation.table import NelboTable

__all__ = ["render_table"]


def render_table(
    table: NelboTable, factorised: str | None = None, equivalent: Sequence[int] = (4,), resamples: int = 2000
) -> RenderableType:
    """NELBO_T with standard error per model and T; what the couplings gain, if told which model is factorised.

    Then each coupled model stands beside the factorised one: how far it is below, gap_closed with its 95 % bootstrap
    interval (below T = sites), and a line "coupled at T steps = factorised at N steps" for each T of ``equivalent``
    that is in the table. Seconds per sample stand in every row where they were measured, and then a line says what
    the factorised model reaches in the same time.

    Raises:
        ConfigError: ``factorised`` is none of the models.
    """
    parts: list[RenderableType] = [Text(f"NELBO_T, bits per token ({table.sites} sites; ± standard error)\n")]
    if factorised is None:
        return Group(*parts, _grid(table, table.models, None, resamples))
    if factorised not in table.models:
        raise ConfigError(
            f"factorised: expected one of {', '.join(table.models)}, found {factorised!r}; pass a name of the table"
        )
    others = [model for model in table.models if model != factorised]
    pairs: list[tuple[str, ...]] = [(factorised, model) for model in others] or [(factorised,)]
    for i, pair in enumerate(pairs):
        parts += [Text()] if i else []
        parts.append(_grid(table, pair, factorised, resamples))
        for T in equivalent:
            if T in table.values[pair[-1]] and len(pair) == 2:
                lines = _comparison(table, pair[-1], factorised, T, resamples)
                parts += [Text(line) for line in lines]  # as Text: square brackets are no markup
    return Group(*parts)


def _grid(table: NelboTable, models: Sequence[str], factorised: str | None, resamples: int) -> Table:
    """One row per number of steps."""
    grid = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    grid.add_column("T", justify="right", no_wrap=True, min_width=len(str(max(table.steps, default=1))))
    rows: dict[int, list[str]] = {
        T: [str(T)] for T in table.steps if any(T in table.values[m] for m in models)
    }
    for model in models:
        headings = [model]
        columns = [[_bound(table, model, T) for T in rows]]
        if table.seconds_per_sample.get(model):
            headings.append("s/sample")
            columns.append([_seconds(table.seconds(model, T)) for T in rows])
        if factorised is not None and model != factorised:
            headings += ["below", "gap closed"]
            gains = [_gain(table, model, factorised, T, resamples) for T in rows]
            columns += [[gain[0] for gain in gains], [gain[1] for gain in gains]]
        for heading, column in zip(headings, columns, strict=True):
            grid.add_column(Text(heading), justify="right", no_wrap=True)
            for cells, cell in zip(rows.values(), column, strict=True):
                cells.append(cell)
    for cells in rows.values():
        grid.add_row(*cells)
    return grid


def _bound(table: NelboTable, model: str, T: int) -> str:
    if T not in table.values[model]:
        return ""
    error = table.standard_error(model, T)
    return f"{table.mean(model, T):.3f}" + ("" if math.isnan(error) else f"±{error:.3f}")


def _gain(table: NelboTable, model: str, factorised: str, T: int, resamples: int) -> list[str]:
    if T not in table.values[model] or T not in table.values.get(factorised, ()):
        return ["", ""]
    gain = table.relative_gain(model, factorised, T, resamples=1).value
    below = f"{round(100 * gain, 1) + 0.0 if math.isfinite(gain) else gain:.1f} %"  # + 0.0: no -0.0
    if table.sites <= T or table.sites not in table.values[factorised]:
        return [below, ""]
    gap = table.gap_closed(model, factorised, T, resamples)
    return [below, "no gap" if math.isnan(gap.value) else f"{gap.value:.2f} [{gap.low:.2f}, {gap.high:.2f}]"]


def _steps(number: float) -> str:
    return "1 step" if number == 1 else f"{number:.3g} steps"


def _seconds(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _comparison(table: NelboTable, model: str, factorised: str, T: int, resamples: int) -> list[str]:
    """Sentences below the table: equal bounds, and equal times."""
    found = table.equivalent_steps(model, factorised, T, resamples)
    sentence = {
        "=": f"= {factorised} at {_steps(found.steps)} [{found.low:.3g}, {found.high:.3g}]",
        ">=": f"is better than {factorised} at {_steps(found.steps)}",
        "<=": f"is no better than {factorised} at {_steps(found.steps)}",
    }[found.relation]
    lines = [f"{model} at {_steps(T)} {sentence}"]
    steps, bits = table.in_the_same_time(model, factorised, T)
    if not math.isnan(steps):
        lines.append(
            f"in the time of {model} at {_steps(T)}, {factorised} makes {steps:.3g}: {bits:.3f} bits per token "
            f"against {table.mean(model, T):.3f}"
        )
    return lines
