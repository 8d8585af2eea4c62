"""Spanning trees: the heaviest of all, the same for the same weights, tied or not; errors."""

import itertools
import random

import networkx as nx
import pytest
import torch

from codd_ppl.errors import GraphError
from codd_ppl.graphs import FactorGraph, properties, topologies


def edges(graph: FactorGraph) -> set[tuple[int, int]]:
    return {tuple(int(name[1:]) for name in factor.scope) for factor in graph.factors.values()}


def symmetric(sites: int, seed: int) -> list[list[float]]:
    draw = random.Random(seed)
    rows = [[0.0] * sites for _ in range(sites)]
    for i, j in itertools.combinations(range(sites), 2):
        rows[i][j] = rows[j][i] = draw.random()
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_no_spanning_tree_is_heavier(seed: int) -> None:
    weights = symmetric(5, seed)
    graph = topologies.chow_liu(5, 3, weights)
    found = sum(weights[i][j] for i, j in edges(graph))
    every = [tuple(sorted(e)) for e in itertools.combinations(range(5), 2)]
    trees = [
        t for t in itertools.combinations(every, 4) if nx.is_connected(nx.Graph(t)) and len(nx.Graph(t)) == 5
    ]
    assert len(trees) == 5**3 and found == pytest.approx(max(sum(weights[i][j] for i, j in t) for t in trees))
    assert properties.is_forest(graph) and len(properties.components(graph)) == 1 and graph.ties == {}
    for same in (torch.tensor(weights, dtype=torch.float64), torch.tensor(weights).double().numpy()):
        assert topologies.chow_liu(5, 3, same) == graph


def test_by_offset_the_edges_are_tied() -> None:
    graph = topologies.chow_liu(7, 4, {1: 0.2, 2: 0.1, 3: 0.9, 50: 1.0})
    assert set(graph.ties["skip3"]) == {"x0,x3", "x1,x4", "x2,x5", "x3,x6"}
    assert set(graph.ties["skip1"]) == {"x0,x1", "x1,x2"} and set(graph.ties) == {"skip1", "skip3"}
    assert topologies.chow_liu(7, 4, {3: 0.9, 1: 0.2}, tie=False).ties == {}
    matrix = [[{0: 5.0, 3: 0.9, 1: 0.2, 2: 0.1}.get(abs(i - j), 0.0) for j in range(7)] for i in range(7)]
    assert topologies.chow_liu(7, 4, matrix, tie=True) == graph
    assert edges(topologies.chow_liu(5, 2, {1: 0.3, 2: 0.1})) == edges(topologies.chain(5, 2))


def test_equal_weights_are_decided_for_short_edges() -> None:
    chain = topologies.chain(6, 2, tie=None)
    assert topologies.chow_liu(6, 2, [[1.0] * 6] * 6) == chain
    assert topologies.chow_liu(6, 2, {5: 0.5, 2: 0.5, 1: 0.5}, tie=False) == chain


def test_what_carries_nothing_may_be_left_out() -> None:
    weights = {1: -0.01, 2: 0.3, 3: 0.0}
    assert edges(topologies.chow_liu(5, 2, weights, above=0.0)) == {(0, 2), (1, 3), (2, 4)}
    assert len(edges(topologies.chow_liu(5, 2, weights))) == 4
    assert topologies.chow_liu(4, 2, {}) == topologies.independent(4, 2)
    assert topologies.chow_liu(1, 2, [[0.7]]) == topologies.independent(1, 2)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({0: 1.0}, "expected offsets that are integers"),
        ({"1": 1.0}, "expected offsets that are integers"),
        ({1: float("nan")}, r"found weights\[1\] = nan"),
        ([[0.0, 1.0]], "a matrix of 3 x 3"),
        ([0.0, 1.0, 2.0], "a matrix of 3 x 3"),
        ([[0, 1, 2], [1, 0, 3], [2, 4, 0]], r"expected a symmetric matrix, found weights\[1\]\[2\] = 3"),
        ([[0, 1, 2], [1, 0, float("inf")], [2, float("inf"), 0]], "expected finite weights"),
    ],
)
def test_errors(weights: object, said: str) -> None:
    with pytest.raises(GraphError, match=said):
        topologies.chow_liu(3, 2, weights)
    with pytest.raises(GraphError, match="sites must be an integer"):
        topologies.chow_liu(0, 2, {})
