"""Drawing: matplotlib axes with round variables, square factors and shaded latents."""

import matplotlib
import networkx as nx
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from codd_ppl.errors import GraphError
from codd_ppl.graphs import FactorGraph, draw, topologies
from codd_ppl.graphs.drawing import layout


def markers(axes: Axes) -> list[PathCollection]:
    return [item for item in axes.collections if isinstance(item, PathCollection)]


def corners(collection: PathCollection) -> int:
    """Straight marker outlines have few vertices; a circle is made of curves with many."""
    return len(collection.get_paths()[0].vertices)


def test_round_tokens_shaded_latents_square_factors():
    graph = topologies.hidden_markov(3, 4, 2)
    tokens, latents, factors = markers(draw(graph))
    assert [len(group.get_offsets()) for group in (tokens, latents, factors)] == [3, 3, 6]
    assert corners(tokens) == corners(latents) > 8 > corners(factors)
    faces = [to_hex(group.get_facecolor()[0]) for group in (tokens, latents, factors)]
    assert faces[0] == "#ffffff"
    assert len(set(faces)) == 3


def test_labels_are_variable_names_and_ties():
    graph = topologies.hidden_markov(3, 4, 2)
    texts = {text.get_text() for text in draw(graph).texts}
    assert texts == {"x0", "x1", "x2", "z0", "z1", "z2", "emission", "transition"}
    assert not draw(graph, labels=False).texts


def test_it_draws_on_given_axes():
    axes = Figure().add_subplot()
    assert draw(topologies.chain(3, 2), ax=axes) is axes


def test_it_makes_a_figure_that_can_be_saved(tmp_path):
    axes = draw(topologies.latent_tree(5, 4, 2))
    axes.figure.savefig(tmp_path / "graph.svg")
    text = (tmp_path / "graph.svg").read_text()
    assert text.lstrip().startswith("<?xml") and "</svg>" in text


def test_no_global_pyplot_state():
    import matplotlib.pyplot as plt

    before, backend = plt.get_fignums(), matplotlib.get_backend()
    draw(topologies.chain(3, 2))
    assert (plt.get_fignums(), matplotlib.get_backend()) == (before, backend)


@pytest.mark.parametrize(
    "graph",
    [
        topologies.independent(1, 2),
        topologies.star(5, 3, states=2),
        topologies.caterpillar(3, 2, 2),
        FactorGraph.from_networkx(nx.cycle_graph(4), cardinality=2),
        FactorGraph.from_networkx(nx.grid_2d_graph(3, 3), cardinality=2),
        FactorGraph(),
    ],
    ids=["single", "star", "caterpillar", "loop", "grid", "empty"],
)
def test_any_graph_can_be_drawn(graph):
    axes = draw(graph)
    assert isinstance(axes, Axes)
    assert sum(len(group.get_offsets()) for group in markers(axes)) == len(graph) + len(graph.factors)


def test_only_latents_can_be_drawn():
    graph = FactorGraph()
    for name in ("z0", "z1"):
        graph.add_variable(name, 2, latent=True)
    graph.add_factor(("z0", "z1"))
    assert len(draw(graph).texts) == 2


def test_layout_puts_tokens_in_reading_order_and_latents_above():
    graph = topologies.hidden_markov(4, 3, 2)
    positions = layout(graph)
    xs = [positions["variable", name][0] for name in graph.tokens]
    assert xs == sorted(xs)
    assert len({positions["variable", name][1] for name in graph.tokens}) == 1
    assert all(positions["variable", f"z{i}"][1] > positions["variable", f"x{i}"][1] for i in range(4))
    assert set(positions) == set(graph.to_networkx().nodes)
    assert len(set(positions.values())) == len(positions)  # nothing on top of anything else


def test_long_edges_are_arches_over_short_ones():
    """Edges between tokens, one over the other, don't share a place."""
    graph = FactorGraph.from_networkx(nx.complete_graph(6), cardinality=2)
    positions = layout(graph)
    assert positions["factor", "x0,x5"][1] > positions["factor", "x1,x4"][1] > positions["factor", "x2,x3"][1]
    assert len(set(positions.values())) == len(positions)


def test_letters_grow_with_the_room():
    graph = topologies.chain(6, 2)
    large, small = (
        draw(graph, ax=Figure(figsize=(width, 3)).add_subplot()).texts[0].get_fontsize() for width in (11, 4)
    )
    assert large > 14 and large > 1.5 * small


def test_positions_of_ones_own():
    graph = topologies.grid(2, 2, 2)
    square = {"x0": (0.0, 1.0), "x1": (1.0, 1.0), "x2": (0.0, 0.0), "x3": (1.0, 0.0)}
    assert layout(graph, square)["factor", "x0,x2"] == (0.0, 0.5)
    assert sorted(map(tuple, markers(draw(graph, positions=square))[0].get_offsets())) == sorted(
        square.values()
    )
    with pytest.raises(GraphError, match="none for 'x3'"):
        draw(graph, positions={name: square[name] for name in ("x0", "x1", "x2")})
