"""Structural checks against definitions worked out by hand or by networkx."""

import networkx as nx
import pytest

from codd_ppl.graphs import FactorGraph, properties, topologies
from codd_ppl.testing import random_forest


def cycle(n: int) -> FactorGraph:
    return FactorGraph.from_networkx(nx.cycle_graph(n), cardinality=2)


@pytest.mark.parametrize("seed", range(60))
def test_random_forests_are_forests(seed):
    graph = random_forest(seed)
    bipartite = graph.to_networkx()
    assert nx.is_forest(bipartite)
    assert properties.is_forest(graph)
    assert properties.find_cycle(graph) is None
    pieces = nx.connected_components(bipartite)
    parts = {frozenset(name for kind, name in piece if kind == "variable") for piece in pieces}
    assert {frozenset(part) for part in properties.components(graph)} == parts
    assert sorted(name for part in properties.components(graph) for name in part) == sorted(graph.variables)


@pytest.mark.parametrize("n", [3, 4, 7])
def test_cycle_is_named_in_order(n):
    graph = cycle(n)
    found = properties.find_cycle(graph)
    assert found is not None
    assert set(found[::2]) == set(graph.variables)
    assert set(found[1::2]) == set(graph.factors)
    for position in range(0, len(found), 2):
        variable, factor, after = found[position], found[position + 1], found[(position + 2) % len(found)]
        assert {variable, after} == set(graph.factors[factor].scope)


def test_two_factors_over_the_same_pair_are_a_loop():
    graph = topologies.chain(2, 3)
    graph.add_factor(("x1", "x0"))
    assert not properties.is_forest(graph)
    assert set(properties.find_cycle(graph)) == {"x0", "x1", "x0,x1", "x1,x0"}


def test_a_loop_with_a_tail_names_the_loop_only():
    graph = cycle(3)
    for i in range(3, 6):
        graph.add_variable(f"x{i}", 2)
        graph.add_factor((f"x{i - 1}", f"x{i}"))
    assert set(properties.find_cycle(graph)[::2]) == {"x0", "x1", "x2"}


def test_several_unary_factors_on_a_variable_are_no_loop():
    graph = topologies.independent(1, 3)
    graph.add_factor(("x0",), name="a")
    graph.add_factor(("x0",), name="b")
    assert properties.is_forest(graph)


def test_a_ternary_factor_is_a_forest_of_treewidth_two():
    graph = topologies.independent(3, 2)
    graph.add_factor(("x0", "x1", "x2"))
    assert properties.is_forest(graph)
    assert not properties.is_chain(graph)
    assert not properties.is_directed_forest(graph)
    assert properties.treewidth_upper_bound(graph) == 2


def test_chain_in_any_order_and_orientation():
    graph = FactorGraph()
    for name in ("b", "d", "a", "c"):
        graph.add_variable(name, 2)
    graph.add_factor(("c", "d"))
    graph.add_factor(("b", "a"))
    assert not properties.is_chain(graph)  # two pieces
    graph.add_factor(("c", "b"))
    assert properties.is_chain(graph)
    graph.add_factor(("b",))
    assert properties.is_chain(graph)
    graph.add_factor(("d", "a"))
    assert not properties.is_chain(graph)  # closed to a ring


@pytest.mark.parametrize(("n", "width"), [(3, 2), (6, 2)])
def test_treewidth_of_a_ring(n, width):
    assert properties.treewidth_upper_bound(cycle(n)) == width


def test_treewidth_of_the_empty_graph():
    assert properties.treewidth_upper_bound(FactorGraph()) == 0


def test_directed_parents_of_a_hidden_markov_model():
    parents = properties.directed_parents(topologies.hidden_markov(3, 4, 2))
    assert parents == {
        "z0": None,
        "z1": ("z0", "z0,z1"),
        "z2": ("z1", "z1,z2"),
        "x0": ("z0", "z0,x0"),
        "x1": ("z1", "z1,x1"),
        "x2": ("z2", "z2,x2"),
    }


def test_two_parents_or_a_unary_factor_below_the_root_are_not_directed():
    two = topologies.independent(3, 2)
    two.add_factor(("x0", "x2"))
    two.add_factor(("x1", "x2"))
    assert properties.directed_parents(two) is None
    below = topologies.chain(2, 2)
    below.add_factor(("x1",))
    assert properties.directed_parents(below) is None
    twice = topologies.independent(1, 2)
    twice.add_factor(("x0",), name="a")
    twice.add_factor(("x0",), name="b")
    assert properties.directed_parents(twice) is None
    assert properties.directed_parents(cycle(3)) is None


def test_interaction_graph_joins_what_shares_a_factor():
    graph = topologies.independent(4, 2)
    graph.add_factor(("x2", "x0", "x1"))
    primal = properties.interaction_graph(graph)
    assert set(primal.nodes) == {"x0", "x1", "x2", "x3"}
    assert {frozenset(edge) for edge in primal.edges} == {
        frozenset(pair) for pair in (("x0", "x1"), ("x0", "x2"), ("x1", "x2"))
    }


def test_long_chains_are_checked_without_recursion():
    graph = topologies.chain(3000, 2)
    assert properties.is_forest(graph)
    assert properties.is_chain(graph)
