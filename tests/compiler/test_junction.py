"""Clique trees: what makes them right (coverage, running intersection) and what they tell."""

import networkx as nx
import pytest

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.compiler.triangulation import CHILDREN
from codd_ppl.errors import TreewidthError
from codd_ppl.graphs import FactorGraph, properties, topologies


def check(graph: FactorGraph) -> None:
    """Everything that exact message passing on a tree of cliques rests on."""
    tree = compile(graph, route="clique contraction").junction
    cliques = tree.cliques
    links = nx.Graph()
    links.add_nodes_from(range(len(cliques)))
    for i, clique in enumerate(cliques):
        assert set(clique.separator) | set(clique.residual) == set(clique.variables)
        assert clique.residual, "a clique within its parent does nothing"
        for child in clique.children:
            assert child < i, "children come first"
            assert cliques[child].parent == i
        if clique.parent >= 0:
            links.add_edge(i, clique.parent)
            assert i in cliques[clique.parent].children
            assert set(clique.separator) == set(clique.variables) & set(cliques[clique.parent].variables)
    assert nx.is_forest(links)
    assert nx.number_connected_components(links) == len(properties.components(graph))
    for variable in graph.variables:  # running intersection: the cliques of a variable hang together
        own = [i for i, clique in enumerate(cliques) if variable in clique.variables]
        assert nx.is_connected(links.subgraph(own)), variable
        assert sum(variable in clique.residual for clique in cliques) == 1
    placed = [name for clique in cliques for name in clique.factors]
    assert sorted(placed) == sorted(f.name for f in graph.factors.values() if f.order > 1)
    for clique in cliques:
        for name in clique.factors:
            assert set(graph.factors[name].scope) <= set(clique.variables)
        for part in (clique.up, *clique.down, *clique.cavities):
            assert {v for scope in part.scopes for v in scope} <= set(clique.variables)
            assert set(part.output) <= {v for scope in part.scopes for v in scope}


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs(seed):
    width = 2 + seed % 2
    graph = testing.random_loopy_graph(seed, treewidth=width, variables=12, max_joint=10**6)
    check(graph)
    assert compile(graph).junction.treewidth == width
    check(testing.random_forest(seed))


@pytest.mark.parametrize(
    ("graph", "width"),
    [
        (FactorGraph.from_networkx(nx.cycle_graph(7), cardinality=2), 2),
        (topologies.grid(3, 6, 2), 3),
        (topologies.skip_chain(20, 2), 2),
        (topologies.skip_chain(20, 2, skips=(1, 2, 3)), 3),
        (FactorGraph.from_networkx(nx.complete_graph(5), cardinality=2), 4),
        (topologies.hidden_markov(5, 4, 3), 1),
    ],
    ids=["ring", "grid", "skip chain", "three skips", "complete", "forest"],
)
def test_known_treewidths(graph, width):
    check(graph)
    assert compile(graph, route="clique contraction").junction.treewidth == width


def test_the_cost_counts_states_not_only_variables():
    """A hub of 50 states in a ring of small variables stays out of the cliques where it isn't needed."""
    graph = FactorGraph()
    for i, size in enumerate((50, 2, 50, 2, 50, 2)):
        graph.add_variable(f"x{i}", size)
    for i in range(6):
        graph.add_factor((f"x{i}", f"x{(i + 1) % 6}"))
    assert compile(graph).junction.largest.entries == 50 * 2 * 2


def test_the_leaves_of_a_star_are_spread_over_cliques():
    graph = topologies.star(100, 2, states=3, tie="leaf")
    graph.add_factor(("x0", "x1"))
    check(graph)
    assert max(len(c.children) for c in compile(graph).junction.cliques) <= CHILDREN


def test_a_grid_that_fits_in_reading_order_is_not_refused():
    """Min-fill and min-weight find cliques of 11 variables where 9 are enough."""
    assert compile(topologies.grid(8, 8, 8)).junction.largest.entries == 8**9


def test_a_hopeless_graph_is_refused_at_once():
    """The first clique that is too large ends it: no time goes into the rest of a dense graph."""
    graph = FactorGraph.from_networkx(nx.complete_graph(150), cardinality=2)
    with pytest.raises(TreewidthError, match="of 150 variables"):
        compile(graph)


def test_explain_prints_cliques_separators_and_cost():
    plan = compile(topologies.skip_chain(5, 3))
    text = plan.explain(batch=7)
    assert "treewidth: 2" in text
    assert "(x0, x1, x2), 27 entries, separator (x1, x2) to 2, factors: x0,x1, x0,x2" in text
    assert "bc,bd,b->cd, path" in text and "FLOPs and 36 bytes x batch" in text
    assert f"{plan.flops:,} FLOPs x batch" in text
    assert f"at batch 7: {7 * plan.flops:,} FLOPs" in text
    assert "27 entries = 108 bytes x batch" in text
    assert plan.flops == sum(c.up.flops for c in plan.junction.cliques) > 0
    assert len(compile(topologies.skip_chain(500, 3)).explain().splitlines()) < 60


def test_contractions_are_cheaper_than_the_clique_table():
    """The path of a ring of factors never forms the joint table of its five variables."""
    graph = FactorGraph()
    for i in range(5):
        graph.add_variable(f"x{i}", 10)
    for i in range(4):
        graph.add_factor((f"x{i}", f"x{i + 1}"))
    graph.add_factor(("x0", "x4"))
    tree = compile(graph).junction
    assert tree.flops < 10**4
