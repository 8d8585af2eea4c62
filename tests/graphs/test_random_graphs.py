"""Random graphs with loops: what the oracles' hundreds of cases are made of."""

from collections import Counter

import pytest

from codd_ppl.errors import GraphError
from codd_ppl.graphs import properties
from codd_ppl.graphs.random_graphs import random_loopy_graph


@pytest.mark.parametrize("width", [2, 3, 4])
def test_the_treewidth_is_as_asked(width):
    for seed in range(40):
        graph = random_loopy_graph(seed, treewidth=width)
        assert not properties.is_forest(graph)
        assert properties.treewidth_upper_bound(graph) == width


def test_the_seed_decides():
    assert random_loopy_graph(3) == random_loopy_graph(3)
    assert random_loopy_graph(3) != random_loopy_graph(4)


def test_the_cases_are_varied():
    graphs = [random_loopy_graph(seed, treewidth=3) for seed in range(100)]
    orders = Counter(f.order for graph in graphs for f in graph.factors.values())
    assert set(orders) == {1, 2, 3, 4}
    assert {v.cardinality for graph in graphs for v in graph} == {1, 2, 3}
    assert any(graph.latents for graph in graphs) and any(not graph.latents for graph in graphs)
    assert any(len(properties.components(graph)) > 1 for graph in graphs)
    assert any(len(names) > 1 for graph in graphs for names in graph.ties.values())


def test_the_joint_table_stays_small():
    for seed in range(40):
        size = 1
        for variable in random_loopy_graph(seed, variables=20, max_joint=500):
            size *= variable.cardinality
        assert size <= 500


def test_a_forest_is_refused():
    with pytest.raises(GraphError, match="random_forest"):
        random_loopy_graph(0, treewidth=1)
