"""The ladder that users inherit, on the ready-made topologies, and proof that it notices a wrong engine."""

import networkx as nx
import pytest
import torch

from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.testing import TopologyTestCase, topology_case


class TestChain(TopologyTestCase):
    graph = topologies.chain(4, 3)


class TestFreeChain(TopologyTestCase):
    graph = topologies.chain(4, 3, tie=None)


class TestHiddenMarkov(TopologyTestCase):
    graph = topologies.hidden_markov(3, 3, 2)


class TestLatentTree(TopologyTestCase):
    graph = topologies.latent_tree(4, 2, 2)


class TestStar(TopologyTestCase):
    graph = topologies.star(4, 3)


class TestMixture(TopologyTestCase):
    graph = topologies.star(3, 3, states=2, tie="emission")


class TestCaterpillar(TopologyTestCase):
    graph = topologies.caterpillar(2, 2, 2)


class TestForest(TopologyTestCase):
    graph = topologies.tree([None, 0, 0, None, 3], 3)


class TestIndependent(TopologyTestCase):
    graph = topologies.independent(3, 4)


class TestFromNetworkx(TopologyTestCase):
    graph = FactorGraph.from_networkx(nx.balanced_tree(2, 2), cardinality=2)


class TestTernary(TopologyTestCase):
    graph = FactorGraph()
    for name, size in (("x0", 2), ("x1", 3), ("z0", 2), ("x2", 3)):
        graph.add_variable(name, size, latent=name == "z0")
    graph.add_factor(("z0", "x1", "x0"))
    graph.add_factor(("x2", "z0"))


# -- the ladder can fail ---------------------------------------------------------------------------


def ladder() -> TopologyTestCase:
    return type("Ladder", (TopologyTestCase,), {"graph": topologies.chain(3, 2)})()


def doubled(result):
    if isinstance(result, dict):
        return {key: 2 * value for key, value in result.items()}
    return (result[0] + 1e-6, result[1]) if isinstance(result, tuple) else result + 1e-6


@pytest.mark.parametrize(
    ("query", "test"),
    [
        ("log_partition", "test_log_partition"),
        ("marginals", "test_marginals"),
        ("entropy", "test_entropy"),
        ("log_score", "test_log_score"),
        ("marginal", "test_marginal"),
        ("log_prob", "test_log_prob"),
        ("condition", "test_condition"),
        ("k_best", "test_k_best"),
        ("kl", "test_divergences"),
        ("cross_entropy", "test_divergences"),
        ("expectation", "test_expectation"),
    ],
)
def test_a_wrong_value_is_noticed(monkeypatch, query, test):
    right = getattr(topology_case, query)
    monkeypatch.setattr(topology_case, query, lambda *args, **options: doubled(right(*args, **options)))
    with pytest.raises(AssertionError, match=query):
        getattr(ladder(), test)()


def test_a_wrong_mode_is_noticed(monkeypatch):
    def worst(plan, tables):
        negated = {key: torch.where(table.isinf(), table, -table) for key, table in tables.items()}
        return right(plan, negated)

    right = topology_case.mode
    monkeypatch.setattr(topology_case, "mode", worst)
    with pytest.raises(AssertionError, match="score of the mode"):
        ladder().test_mode()


def test_independent_draws_from_the_marginals_are_noticed(monkeypatch):
    """The factorization barrier itself: right marginals, wrong joint."""

    def independent(plan, tables, sample_shape, generator):
        beliefs = topology_case.marginals(plan, tables)
        draws = torch.Generator().manual_seed(0)
        return {
            name: torch.multinomial(
                beliefs[name].reshape(-1, 2), sample_shape[0], replacement=True, generator=draws
            ).mT.reshape(*sample_shape, *beliefs[name].shape[:-1])
            for name in ("x0", "x1", "x2")
        }

    monkeypatch.setattr(topology_case, "sample", independent)
    with pytest.raises(AssertionError, match="chi-square"):
        ladder().test_sample()


def test_a_wrong_gradient_is_noticed(monkeypatch):
    right = topology_case.log_partition

    def detached(plan, tables):
        return (
            right(plan, {**tables, "edge": tables["edge"].detach()})
            + 0 * tables["edge"].nan_to_num(0, 0, 0).sum()
        )

    monkeypatch.setattr(topology_case, "log_partition", detached)
    with pytest.raises(AssertionError, match="gradient of 'edge'"):
        ladder().test_gradient_is_marginals()
