"""Ready-made topologies: sizes, names, ties, and what the structural checks say of them."""

import networkx as nx
import pytest

from codd_ppl.errors import GraphError
from codd_ppl.graphs import FactorGraph, properties, topologies


def scopes(graph: FactorGraph) -> list[tuple[str, ...]]:
    return [factor.scope for factor in graph.factors.values()]


def test_independent():
    graph = topologies.independent(4, 27)
    assert graph.tokens == ("x0", "x1", "x2", "x3")
    assert graph.factors == {}
    assert {variable.cardinality for variable in graph} == {27}


@pytest.mark.parametrize("sites", [1, 2, 5])
def test_chain(sites):
    graph = topologies.chain(sites, 3)
    assert scopes(graph) == [(f"x{i}", f"x{i + 1}") for i in range(sites - 1)]
    assert properties.is_chain(graph)
    assert set(graph.ties) == ({"edge"} if sites > 1 else set())
    assert topologies.chain(sites, 3, tie=None).ties == {}


def test_tree_takes_none_and_minus_one_as_roots():
    graph = topologies.tree([None, 0, 0, -1, 3], 2)
    assert scopes(graph) == [("x0", "x1"), ("x0", "x2"), ("x3", "x4")]
    assert len(properties.components(graph)) == 2


@pytest.mark.parametrize("parents", [[None, 2], [None, 1], [-2], [None, 7]])
def test_tree_parent_out_of_range(parents):
    with pytest.raises(GraphError, match=r"parents\[\d\] = -?\d: expected another site"):
        topologies.tree(parents, 2)


def test_tree_with_a_loop_is_not_a_forest():
    assert not properties.is_forest(topologies.tree([1, 2, 0], 2))


def test_star_with_a_token_hub_and_with_a_latent_hub():
    assert scopes(topologies.star(4, 3)) == [("x0", "x1"), ("x0", "x2"), ("x0", "x3")]
    mixture = topologies.star(3, 5, states=2)
    assert mixture.latents == ("z0",)
    assert mixture.tokens == ("x0", "x1", "x2")
    assert scopes(mixture) == [("z0",), ("z0", "x0"), ("z0", "x1"), ("z0", "x2")]
    assert topologies.star(3, 5, states=2, tie="emission").ties["emission"] == ("z0,x0", "z0,x1", "z0,x2")


@pytest.mark.parametrize("sites", [1, 2, 5])
def test_hidden_markov(sites):
    graph = topologies.hidden_markov(sites, cardinality=7, states=3)
    assert graph.tokens == tuple(f"x{i}" for i in range(sites))
    assert graph.latents == tuple(f"z{i}" for i in range(sites))
    assert graph.factors["initial"].scope == ("z0",)
    assert len(graph.ties["emission"]) == sites
    assert len(graph.ties.get("transition", ())) == sites - 1
    assert all(graph.shape(name) == (3, 7) for name in graph.ties["emission"])
    for i in range(sites - 1):
        assert graph.factors[f"z{i},z{i + 1}"].tie == "transition"


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("sites", [1, 2, 3, 4, 5, 7, 8, 9])
def test_latent_tree(sites, tie):
    graph = topologies.latent_tree(sites, 4, 3, tie=tie)
    assert len(graph.tokens) == sites
    assert len(properties.components(graph)) == 1
    assert properties.is_forest(graph)
    assert properties.is_directed_forest(graph)
    parents = properties.directed_parents(graph)
    assert [name for name, parent in parents.items() if parent is None] == ["z0"]
    assert all(parents[token][0] in graph.latents for token in graph.tokens)
    depth = nx.single_source_shortest_path_length(properties.interaction_graph(graph), "z0")
    assert len({depth[token] for token in graph.tokens}) == 1  # balanced: all tokens equally deep
    assert max(depth.values()) <= 1 + (sites - 1).bit_length()
    assert bool(graph.ties) == tie


def test_caterpillar():
    graph = topologies.caterpillar(3, 2, 4)
    assert len(graph.tokens) == 9
    assert scopes(graph) == [
        *[("x0", "x3"), ("x0", "x1"), ("x0", "x2")],
        *[("x3", "x6"), ("x3", "x4"), ("x3", "x5")],
        *[("x6", "x7"), ("x6", "x8")],
    ]
    assert topologies.caterpillar(3, 2, 4, tie=False).ties == {}
    assert properties.is_chain(topologies.caterpillar(4, 0, 2))


@pytest.mark.parametrize(("spine", "legs"), [(0, 1), (1, -1)])
def test_caterpillar_sizes(spine, legs):
    with pytest.raises(GraphError, match="expected spine >= 1 and legs >= 0"):
        topologies.caterpillar(spine, legs, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: topologies.independent(n, 2),
        lambda n: topologies.chain(n, 2),
        lambda n: topologies.star(n, 2),
        lambda n: topologies.hidden_markov(n, 2, 2),
        lambda n: topologies.latent_tree(n, 2, 2),
    ],
)
@pytest.mark.parametrize("sites", [0, -1, 2.5, True, "3"])
def test_sites_must_be_a_positive_integer(make, sites):
    with pytest.raises(GraphError, match="sites must be an integer >= 1"):
        make(sites)


@pytest.mark.parametrize("states", [0, -1, 1.5])
def test_states_must_be_a_positive_integer(states):
    with pytest.raises(GraphError, match="cardinality must be an integer >= 1"):
        topologies.hidden_markov(3, 2, states)


ALL = {
    "independent": topologies.independent(4, 3),
    "chain": topologies.chain(5, 3),
    "tree": topologies.tree([None, 0, 0, 1, 1], 3),
    "star": topologies.star(4, 3),
    "latent star": topologies.star(4, 3, states=2),
    "hidden_markov": topologies.hidden_markov(4, 3, 2),
    "latent_tree": topologies.latent_tree(6, 3, 2),
    "caterpillar": topologies.caterpillar(3, 1, 2),
}
TREEWIDTH = {"independent": 0}


@pytest.mark.parametrize("name", ALL)
def test_every_topology_is_a_directed_forest_of_treewidth_one(name):
    graph = ALL[name]
    assert properties.is_forest(graph)
    assert properties.is_directed_forest(graph)
    assert properties.treewidth_upper_bound(graph) == TREEWIDTH.get(name, 1)
    assert properties.is_chain(graph) == (name == "chain")


def test_grid_is_read_row_by_row():
    graph = topologies.grid(2, 3, 5)
    assert graph.tokens == tuple(f"x{i}" for i in range(6))
    assert set(graph.ties["right"]) == {"x0,x1", "x1,x2", "x3,x4", "x4,x5"}
    assert set(graph.ties["down"]) == {"x0,x3", "x1,x4", "x2,x5"}
    assert topologies.grid(2, 3, 5, tie=False).ties == {}
    assert nx.is_isomorphic(properties.interaction_graph(graph), nx.grid_2d_graph(2, 3))
    assert properties.treewidth_upper_bound(topologies.grid(3, 5, 2)) == 3
    assert scopes(topologies.grid(1, 3, 2)) == scopes(topologies.chain(3, 2))
    for rows, columns in ((0, 2), (2, 0)):
        with pytest.raises(GraphError, match="grid: expected rows >= 1"):
            topologies.grid(rows, columns, 2)


def test_skip_chain_ties_by_offset():
    graph = topologies.skip_chain(5, 4, skips=(1, 3))
    assert set(graph.ties["skip1"]) == {"x0,x1", "x1,x2", "x2,x3", "x3,x4"}
    assert set(graph.ties["skip3"]) == {"x0,x3", "x1,x4"}
    assert topologies.skip_chain(5, 4, tie=False).ties == {}
    assert properties.treewidth_upper_bound(topologies.skip_chain(9, 2)) == 2
    assert scopes(topologies.skip_chain(4, 2, skips=(1,))) == scopes(topologies.chain(4, 2))
    for skips in ((), (0, 1), (2, 2)):
        with pytest.raises(GraphError, match="skip_chain: expected distinct skips"):
            topologies.skip_chain(5, 2, skips=skips)
