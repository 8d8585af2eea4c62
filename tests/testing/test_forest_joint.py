"""The closest law of a forest over tokens: its divergence in closed form, and nothing of the forest is closer."""

import pytest
import torch

from codd_ppl import FactorGraph, compile, inference, topologies
from codd_ppl.diffusion import total_correlation
from codd_ppl.errors import ConfigError
from codd_ppl.testing import (
    chow_liu_joint,
    forest_joint,
    kl_divergence,
    mutual_information_matrix,
    product_of_marginals,
    random_log_potentials,
)


def random_joint(sites: int, seed: int = 0) -> torch.Tensor:
    table = torch.rand((3,) * sites, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return table / table.sum()


@pytest.mark.parametrize(
    "graph",
    [
        topologies.independent(4, 3),
        topologies.chain(4, 3),
        topologies.star(4, 3),
        topologies.tree([None, 0, None, 2], 3),
    ],
    ids=["independent", "chain", "star", "two trees"],
)
def test_closed_form_and_optimality(graph):
    joint = random_joint(4)
    law = forest_joint(joint, graph)
    assert law.sum().item() == pytest.approx(1, abs=1e-12)
    information = mutual_information_matrix(joint)
    edges = [tuple(graph.tokens.index(name) for name in f.scope) for f in graph.factors.values()]
    kept = sum(information[i, j] for i, j in edges)
    least = kl_divergence(joint, law)
    assert abs(least - (total_correlation(joint) - kept)) < 1e-12
    plan = compile(graph)
    for seed in range(20):  # other laws of the same forest are further away
        other = inference.marginal(plan, random_log_potentials(graph, evidence=1.0, seed=seed), graph.tokens)
        assert kl_divergence(joint, other) > least


def test_a_law_of_the_forest_is_its_own():
    graph = topologies.caterpillar(2, 1, 3)
    law = inference.marginal(
        compile(graph), random_log_potentials(graph, evidence=1.0, scale=3.0), graph.tokens
    )
    assert (forest_joint(law, graph) - law).abs().max() < 1e-12


def test_the_best_tree_is_one_of_them():
    joint = random_joint(4, seed=1)
    graph, law = chow_liu_joint(joint)
    assert torch.equal(forest_joint(joint, graph), law)
    assert torch.equal(forest_joint(joint, topologies.independent(4, 3)), product_of_marginals(joint))


@pytest.mark.parametrize(
    "graph",
    [
        topologies.hidden_markov(4, 3, 2),
        topologies.grid(2, 2, 3),
        topologies.chain(3, 3),
        topologies.chain(4, 2),
        FactorGraph(),
    ],
    ids=["latents", "loop", "too short", "other values", "empty"],
)
def test_no_closed_form(graph):
    with pytest.raises(ConfigError, match="forest of pairwise factors"):
        forest_joint(random_joint(4), graph)
