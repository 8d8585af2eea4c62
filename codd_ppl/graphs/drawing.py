"""Pictures of factor graphs: variables round, factors square, latents shaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import networkx as nx

from codd_ppl.graphs.factor_graph import FactorGraph

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "layout"]

TOKEN, LATENT, FACTOR, INK = "#ffffff", "#c9d7e8", "#3b3b3b", "#222222"


def layout(graph: FactorGraph) -> dict[tuple[str, str], tuple[float, float]]:
    """Positions of the nodes of ``graph.to_networkx()``: tokens in a row in reading order, latents above them.

    A latent stands over the mean of the tokens below it, as many rows up as it is links away from the nearest
    token; a factor stands at the mean of its scope. Works for any graph, loops included.
    """
    links = nx.Graph()
    links.add_nodes_from(graph.variables)
    for factor in graph.factors.values():
        links.add_edges_from((a, b) for a in factor.scope for b in factor.scope if a < b)
    tokens = graph.tokens
    where: dict[str, tuple[float, float]] = {name: (float(i), 0.0) for i, name in enumerate(tokens)}
    heights = nx.multi_source_dijkstra_path_length(links, set(tokens)) if tokens else {}
    for name in sorted(graph.latents, key=lambda n: (heights.get(n, 1), n)):
        height = float(heights.get(name, 1))
        below = [where[n][0] for n in links[name] if n in where and heights.get(n, 1) < height]
        x = sum(below) / len(below) if below else float(len(where) - len(tokens))
        where[name] = (x, 1.4 * height)
    positions = {("variable", name): xy for name, xy in where.items()}
    for factor in graph.factors.values():
        xs, ys = zip(*(where[v] for v in factor.scope), strict=True)
        lift = (
            0.55 if factor.order == 1 else (0.45 if max(ys) == min(ys) and max(xs) - min(xs) > 1.5 else 0.0)
        )
        positions["factor", factor.name] = (sum(xs) / len(xs), sum(ys) / len(ys) + lift)
    return positions


def draw(graph: FactorGraph, ax: Axes | None = None, labels: bool = True) -> Axes:
    """Draw the graph with matplotlib.

    Args:
        graph: any factor graph; loops are drawn as well.
        ax: axes to draw on; a new figure is made without one (no global pyplot state is touched).
        labels: write variable names, and ties beside their first factor.

    Returns:
        The axes; ``draw(graph).figure.savefig("graph.svg")`` writes it to a file.
    """
    if ax is None:
        from matplotlib.figure import Figure

        width = min(16.0, 2.0 + 0.75 * max(len(graph.tokens), len(graph.latents)))
        ax = Figure(figsize=(width, 3.2), layout="constrained").add_subplot()
    bipartite, positions = graph.to_networkx(), layout(graph)
    nx.draw_networkx_edges(bipartite, positions, ax=ax, edge_color="#888888", width=1.2)
    groups = [
        ([("variable", n) for n in graph.tokens], "o", TOKEN, 420),
        ([("variable", n) for n in graph.latents], "o", LATENT, 420),
        ([("factor", n) for n in graph.factors], "s", FACTOR, 60),
    ]
    for nodes, shape, colour, size in groups:
        if nodes:
            nx.draw_networkx_nodes(
                bipartite,
                positions,
                nodelist=nodes,
                node_shape=shape,
                node_color=colour,
                node_size=size,
                edgecolors=INK,
                ax=ax,
            )
    if labels:
        names = {("variable", n): n for n in graph.variables}
        nx.draw_networkx_labels(bipartite, positions, names, font_size=8, font_color=INK, ax=ax)
        for tie, factors in graph.ties.items():
            x, y = positions["factor", factors[0]]
            ax.annotate(tie, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7, color="#555555")
    ax.set_axis_off()
    ax.margins(0.08, 0.25)
    return ax
