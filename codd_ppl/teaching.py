"""What the notebooks share: one look, figures with a description for those who can't see them, tables as pictures.

``notebooks/`` imports from here, and so may a lecture of your own:

    from codd_ppl import teaching

    teaching.use_style()
    figure, axes = plt.subplots()
    teaching.heat_map(axes, joint, rows=["New", "San"], columns=["York", "Diego"])
    teaching.show(figure, alt="The joint: half New York, half San Diego, nothing else.")
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from codd_ppl.constraints import Constraint
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.evaluation.card import markdown_table
from codd_ppl.typing import Float, Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_automaton", "heat_map", "show", "show_table", "use_style"]

INCH = 80  # pixels on the page


def use_style() -> None:
    """Large fonts; colours, dashes and markers that can be told apart by everyone, and on paper without colours."""
    from matplotlib import style

    style.use("codd_ppl.slides")


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook with a description (screen readers, HTML export), and close it.

    Raises:
        ConfigError: a description of fewer than three words, or IPython is not installed.
    """
    from matplotlib import pyplot

    Image, display = _notebook("Image", "display")
    if len(alt.split()) < 3:
        raise ConfigError(f"expected alt to say what the figure shows, found {alt!r}; write a sentence")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": ""})
    width = round(figure.get_figwidth() * INCH)
    display(Image(data=buffer.getvalue(), format="png", width=width, alt=alt))
    pyplot.close(figure)


def show_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Display a table; floats with three decimals, everything else as ``str`` says it.

    Raises:
        ConfigError: IPython is not installed.
    """
    Markdown, display = _notebook("Markdown", "display")
    words = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    display(Markdown(markdown_table([list(head), *words])))


def heat_map(
    axes: Axes,
    table: Float[Tensor, "rows columns"],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
    form: str | None = ".2f",
    largest: float | None = None,
) -> None:
    """A table of non-negative numbers as a picture, white for 0, each number in its cell.

    Args:
        axes: where to draw.
        table: the numbers.
        rows: labels from top to bottom; none if empty.
        columns: labels from left to right; none if empty.
        title: above the picture.
        form: format of the numbers; None leaves them out (large tables).
        largest: value of the darkest colour, for pictures that are compared; None: the table's own largest.

    Raises:
        ShapeError: not a table, or labels that don't fit it.
    """
    if table.ndim != 2 or any(
        len(names) not in (0, size) for names, size in zip((rows, columns), table.shape, strict=True)
    ):
        raise ShapeError(
            f"expected a table with one label per row and column, found shape {tuple(table.shape)} with "
            f"{len(rows)} and {len(columns)} labels; pass as many, or none"
        )
    top = float(table.max()) if largest is None else largest
    axes.imshow(table.detach().numpy(), vmin=0.0, vmax=top or 1.0, aspect="auto" if form is None else "equal")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(form is None)
    if title:
        axes.set_title(title)
    if form is not None:
        for i, row in enumerate(table.tolist()):
            for j, value in enumerate(row):
                ink = "white" if value > 0.55 * top else "black"
                axes.text(j, i, f"{value:{form}}", ha="center", va="center", color=ink)


def draw_automaton(axes: Axes, constraint: Constraint, alphabet: str) -> None:
    """The finite automaton of a constraint: states in a row, arrows with their characters, accepting ones doubled.

    States from which no accepting one can be reached are left out, and the arrows into them.

    Args:
        axes: where to draw.
        constraint: of one automaton over the whole text (regex, contains, ..; not a conjunction of spans).
        alphabet: the characters to show.

    Raises:
        ConfigError: a constraint of several automata.
    """
    from matplotlib.patches import Circle

    if len(constraint.clauses) != 1:
        raise ConfigError(
            f"expected a constraint of one automaton, found {len(constraint.clauses)}; draw its parts one by one"
        )
    automaton = constraint.clauses[0].automaton
    places = {int(state): k for k, state in enumerate(automaton.live.nonzero()[0])}
    arrows: dict[tuple[int, int], str] = {}
    for state in places:
        for character in alphabet:
            following = automaton.following(state, character)
            if following in places:
                edge = (places[state], places[following])
                arrows[edge] = arrows.get(edge, "") + character
    lowest = -0.3
    for (a, b), characters in arrows.items():
        side = 1 if b > a else -1
        if a == b:
            start, end, bend, label = (a - 0.1, 0.17), (a + 0.1, 0.17), -2.0, 0.52
        else:  # an arc that is as high as an eighth of its length, to the right above and to the left below
            start, end, bend = (a + 0.2 * side, 0.05 * side), (b - 0.2 * side, 0.05 * side), -0.25
            label = side * (0.17 + 0.125 * abs(b - a))
        arrow = {"arrowstyle": "-|>", "color": "black", "lw": 1.5, "connectionstyle": f"arc3,rad={bend}"}
        axes.annotate("", end, start, arrowprops=arrow)
        axes.text((a + b) / 2, label, ", ".join(characters), ha="center", va="center", fontsize=17)
        lowest = min(lowest, label - 0.12)
    for state, k in places.items():
        for radius in (0.18, 0.14)[: 1 + bool(automaton.accepting[state])]:
            axes.add_patch(Circle((k, 0), radius, facecolor="white", edgecolor="black", lw=1.5))
        axes.text(k, 0, str(k), ha="center", va="center")
    axes.set(xlim=(-0.4, len(places) - 0.6), ylim=(lowest, 0.65), aspect="equal")
    axes.set_axis_off()


def _notebook(*names: str) -> list[Any]:
    """What IPython displays with."""
    try:
        from IPython import display
    except ImportError as error:
        raise ConfigError(
            'figures and tables are displayed by IPython: install it with pip install "codd-ppl[notebooks]"'
        ) from error
    return [getattr(display, name) for name in names]
