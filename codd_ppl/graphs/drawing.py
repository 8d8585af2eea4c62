"""Pictures of factor graphs: variables round, factors square, latents shaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import networkx as nx

from codd_ppl.errors import GraphError
from codd_ppl.graphs.factor_graph import FactorGraph

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "layout"]

TOKEN, LATENT, FACTOR, INK = "#ffffff", "#c9d7e8", "#3b3b3b", "#222222"
SMALLEST, LARGEST = 14.0, 40.0  # diameter of a variable, in points

Point = tuple[float, float]


def layout(
    graph: FactorGraph, positions: Mapping[str, Point] | None = None
) -> dict[tuple[str, str], tuple[float, float]]:
    """Positions of the nodes of ``graph.to_networkx()``: tokens in a row in reading order, latents above them.

    A latent stands over the mean of the tokens below it, as many rows up as it is links away from the nearest
    token; a factor stands at the mean of its scope, and above the row the higher the further its tokens are apart,
    so that long edges are arches over short ones. Works for any graph, loops included.

    Args:
        graph: any factor graph.
        positions: variable -> (x, y), of all variables, instead; factors then stand at the mean of their scope.

    Raises:
        GraphError: a variable has no position.
    """
    lifted = positions is None
    where = _rows(graph) if positions is None else dict(positions)
    for name in graph.variables:
        if name not in where:
            raise GraphError(f"expected a position for every variable, found none for {name!r}; add it")
    places = {("variable", name): where[name] for name in graph.variables}
    for factor in graph.factors.values():
        xs, ys = zip(*(where[v] for v in factor.scope), strict=True)
        span, lift = max(xs) - min(xs), 0.0
        if factor.order == 1:
            lift = 0.7
        elif lifted and max(ys) == min(ys) and span > 1.5:
            lift = 0.4 * (span - 1) ** 0.75
        places["factor", factor.name] = (sum(xs) / len(xs), sum(ys) / len(ys) + lift)
    return places


def _rows(graph: FactorGraph) -> dict[str, Point]:
    links = nx.Graph()
    links.add_nodes_from(graph.variables)
    for factor in graph.factors.values():
        links.add_edges_from((a, b) for a in factor.scope for b in factor.scope if a < b)
    tokens = graph.tokens
    where: dict[str, Point] = {name: (float(i), 0.0) for i, name in enumerate(tokens)}
    heights = nx.multi_source_dijkstra_path_length(links, set(tokens)) if tokens else {}
    for name in sorted(graph.latents, key=lambda n: (heights.get(n, 1), n)):
        height = float(heights.get(name, 1))
        below = [where[n][0] for n in links[name] if n in where and heights.get(n, 1) < height]
        x = sum(below) / len(below) if below else float(len(where) - len(tokens))
        where[name] = (x, 1.4 * height)
    return where


def draw(
    graph: FactorGraph,
    ax: Axes | None = None,
    labels: bool = True,
    positions: Mapping[str, Point] | None = None,
) -> Axes:
    """Draw the graph with matplotlib; circles and letters are as large as the axes have room for.

    Args:
        graph: any factor graph; loops are drawn as well.
        ax: axes to draw on; a new figure is made without one (no global pyplot state is touched).
        labels: write variable names, and ties beside their first factor.
        positions: variable -> (x, y), as in :func:`layout`; tokens in a row and latents above them without.

    Returns:
        The axes; ``draw(graph).figure.savefig("graph.svg")`` writes it to a file.
    """
    if ax is None:
        from matplotlib.figure import Figure

        width = min(16.0, 2.0 + 0.75 * max(len(graph.tokens), len(graph.latents)))
        ax = Figure(figsize=(width, 3.2), layout="constrained").add_subplot()
    bipartite, places = graph.to_networkx(), layout(graph, positions)
    size = _diameter(ax, list(places.values()))
    nx.draw_networkx_edges(bipartite, places, ax=ax, edge_color="#777777", width=max(1.2, size / 20))
    groups = [
        ([("variable", n) for n in graph.tokens], "o", TOKEN, 1.0),
        ([("variable", n) for n in graph.latents], "o", LATENT, 1.0),
        ([("factor", n) for n in graph.factors], "s", FACTOR, 0.33),
    ]
    for nodes, shape, colour, part in groups:
        if nodes:
            drawn = nx.draw_networkx_nodes(
                bipartite,
                places,
                nodelist=nodes,
                node_shape=shape,
                node_color=colour,
                node_size=(part * size) ** 2,
                edgecolors=INK,
                linewidths=max(1.0, size / 26),
                ax=ax,
            )
            drawn.set_zorder(2 if shape == "s" else 3)
    if labels:
        letters = 0.5 * size * min(1.0, 2.4 / max(map(len, graph.variables), default=1))
        for name in graph.variables:
            ax.text(
                *places["variable", name],
                name,
                fontsize=letters,
                color=INK,
                ha="center",
                va="center",
                zorder=4,
            )
        for tie, factors in graph.ties.items():
            first = graph.factors[factors[0]]
            level = len({places["variable", v][1] for v in first.scope}) == 1
            ax.annotate(
                tie,
                places["factor", first.name],
                xytext=(0, 0.5 * size) if level else (-0.3 * size, 0),
                textcoords="offset points",
                fontsize=max(9.5, 0.45 * size),
                color="#444444",
                ha="center" if level else "right",
                va="bottom" if level else "center",
                zorder=5,
            )
    ax.set_axis_off()
    ax.margins(0.08, 0.25)
    return ax


def _diameter(ax: Axes, points: list[Point]) -> float:
    """Of a variable, in points: such that neither columns nor rows touch."""
    figure = ax.get_figure(root=True)
    if figure is None:
        return SMALLEST
    box, inch = ax.get_position(), figure.get_size_inches()
    if figure.get_layout_engine() is not None:  # it will use the margins, too
        inch = 1.25 * inch
    fit = LARGEST
    for axis, (extent, length) in enumerate(((box.width, inch[0]), (box.height, inch[1]))):
        values = [p[axis] for p in points]
        span = max(values, default=0.0) - min(values, default=0.0)
        gap = 1.0 if axis == 0 else 1.4
        fit = min(fit, 0.62 * 72 * extent * length * gap / max(1.2 * span, gap))
    return max(SMALLEST, fit)
