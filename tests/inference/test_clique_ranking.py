"""The best assignments of graphs with loops where batch elements run out of them, in slices, and of equal score."""

import math

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.graphs import topologies
from codd_ppl.inference import clique_ranking, k_best

GRID = topologies.grid(2, 2, 2)


def assert_k_best(graph, tables, k):
    scores, values = k_best(compile(graph), tables, k)
    expected = testing.brute_k_best(graph, tables, k)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    found = torch.stack([values[name] for name in graph.variables], -1)
    dead = scores == -math.inf
    assert bool((found[dead] == -1).all()) and bool((found[~dead] >= 0).all())
    given = {name: value.clamp(min=0).movedim(-1, 0) for name, value in values.items()}
    again = testing.brute_log_score(graph, tables, given).movedim(0, -1)
    torch.testing.assert_close(torch.where(dead, scores, again), scores, rtol=1e-9, atol=1e-9)
    for row, possible in zip(found.reshape(-1, k, len(graph)), ~dead.reshape(-1, k), strict=True):
        kept = row[possible]
        assert len(kept.unique(dim=0)) == len(kept), "an assignment comes twice"


@pytest.mark.parametrize("seed", range(12))
def test_elements_of_a_batch_with_few_possible_assignments(seed):
    """Another number of them in each; the others go on while one has none left."""
    graph = testing.random_loopy_graph(seed, treewidth=2 + seed % 2, variables=5, max_joint=200)
    tables = testing.random_log_potentials(graph, (4,), infinite=0.4, seed=seed)
    assert_k_best(graph, tables, 30)


@pytest.mark.parametrize("entries", [10, 100, 1 << 22])
def test_every_assignment_in_slices(monkeypatch, entries):
    monkeypatch.setattr(clique_ranking, "CHUNK", entries)
    assert_k_best(GRID, testing.random_log_potentials(GRID, (3,), seed=0), 20)


def test_equal_scores():
    tables = testing.random_log_potentials(GRID, seed=0)
    assert_k_best(GRID, {key: torch.zeros_like(table) for key, table in tables.items()}, 20)
