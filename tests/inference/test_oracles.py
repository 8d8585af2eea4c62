"""The oracles themselves, against numbers worked out by hand and against scipy."""

import math

import pytest
import scipy.stats
import torch

from codd_ppl import testing
from codd_ppl.errors import IntractableError, PotentialsError
from codd_ppl.graphs import FactorGraph, properties, topologies


def pair() -> tuple[FactorGraph, dict]:
    """P(x0, x1) proportional to [[1, 2], [3, 4], [0, 10]]: partition function 20."""
    graph = FactorGraph()
    graph.add_variable("x0", 3)
    graph.add_variable("x1", 2)
    graph.add_factor(("x1", "x0"), name="f")  # the scope is against the order of the variables
    return graph, {"f": torch.tensor([[1.0, 3, 0], [2, 4, 10]], dtype=torch.float64).log()}


def test_joint_by_hand():
    graph, tables = pair()
    joint = testing.enumerate_log_joint(graph, tables)
    torch.testing.assert_close(joint.exp(), torch.tensor([[1.0, 2], [3, 4], [0, 10]], dtype=torch.float64))
    assert testing.brute_log_partition(graph, tables).item() == pytest.approx(math.log(20))


def test_marginals_by_hand():
    graph, tables = pair()
    found = testing.brute_marginals(graph, tables)
    assert set(found) == {"x0", "x1", "f"}
    torch.testing.assert_close(found["x0"], torch.tensor([3.0, 7, 10], dtype=torch.float64) / 20)
    torch.testing.assert_close(found["x1"], torch.tensor([4.0, 16], dtype=torch.float64) / 20)
    torch.testing.assert_close(found["f"], tables["f"].exp() / 20)


def test_unary_and_stacked_evidence_by_hand():
    graph = topologies.independent(2, 2)
    one, two = torch.tensor([0.0, 1]), torch.tensor([[2.0, 3], [5, 7]])
    joint = testing.enumerate_log_joint(graph, {"x0": one, ("x1", "x0"): two})
    expected = torch.tensor([[0 + 5 + 2, 0 + 5 + 3], [1 + 7 + 2, 1 + 7 + 3]], dtype=torch.float64)
    torch.testing.assert_close(joint, expected)


def test_a_tie_is_one_table_and_its_marginal_the_expected_counts():
    graph = topologies.chain(3, 2)
    table = torch.tensor([[1.0, 2], [3, 5]], dtype=torch.float64)
    joint = testing.enumerate_log_joint(graph, {"edge": table.log()}).exp()
    torch.testing.assert_close(joint, torch.einsum("ab,bc->abc", table, table))
    counts = testing.brute_marginals(graph, {"edge": table.log()})["edge"]
    p = joint / joint.sum()
    torch.testing.assert_close(counts, p.sum(2) + p.sum(0))


def test_a_missing_table_is_named():
    with pytest.raises(PotentialsError, match="factor 'f'"):
        testing.enumerate_log_joint(pair()[0], {})


def test_mode_lists_every_winner():
    graph = topologies.independent(1, 3)
    best, winners = testing.brute_mode(graph, {"x0": torch.tensor([2.0, 1, 2])})
    assert best.item() == 2
    assert winners.tolist() == [True, False, True]


def test_entropy_by_hand():
    graph, tables = pair()
    p = [1 / 20, 2 / 20, 3 / 20, 4 / 20, 10 / 20]
    expected = -sum(q * math.log(q) for q in p)
    assert testing.brute_entropy(graph, tables).item() == pytest.approx(expected)


def test_score_by_hand_with_sample_dimensions():
    graph, tables = pair()
    x0, x1 = torch.tensor([[0, 2], [2, 1]]), torch.tensor([[1, 0], [1, 1]])
    found = testing.brute_log_score(graph, tables, {"x0": x0, "x1": x1})
    torch.testing.assert_close(found.exp(), torch.tensor([[2.0, 0], [10, 4]], dtype=torch.float64))


def test_joint_counts_are_row_major():
    graph, _ = pair()
    draws = {"x0": torch.tensor([0, 2, 2, 1]), "x1": torch.tensor([1, 0, 0, 1])}
    assert testing.joint_counts(graph, draws).tolist() == [0, 1, 0, 1, 2, 0]


def test_too_large_joints_are_refused():
    graph = topologies.independent(40, 4)
    with pytest.raises(IntractableError, match="use fewer"):
        testing.enumerate_log_joint(graph, {})
    with pytest.raises(IntractableError, match="use fewer"):
        testing.brute_marginal(graph, {}, ["x0"])
    with pytest.raises(IntractableError, match="27 tokens at 64 sites"):
        testing.enumerate_sequences(27, 64)


def test_enumerate_sequences():
    assert testing.enumerate_sequences(2, 3).tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1],
    ]  # fmt: skip
    assert testing.enumerate_sequences(3, 4).unique(dim=0).shape == (81, 4)
    assert testing.enumerate_sequences(5, 0).shape == (1, 0)


# -- chi-square ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_p_value_is_that_of_scipy_when_nothing_is_pooled(seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(7, generator=generator, dtype=torch.float64) + 0.5
    p /= p.sum()
    counts = torch.randint(60, 100, (7,), generator=generator)
    expected = scipy.stats.chisquare(counts.numpy(), (p * counts.sum()).numpy()).pvalue
    assert testing.chi_square_p_value(counts, p) == pytest.approx(expected, rel=1e-9)


def test_small_cells_are_pooled():
    p = torch.tensor([0.5, 0.47, 0.01, 0.01, 0.01])
    counts = torch.tensor([52, 44, 2, 1, 1])  # the three small cells expect 3: they join the next one
    expected = scipy.stats.chisquare([52, 48], [50, 50]).pvalue
    assert testing.chi_square_p_value(counts, p) == pytest.approx(expected, rel=1e-5)


def test_an_impossible_draw_fails_and_a_single_cell_passes():
    assert testing.chi_square_p_value([99, 1], [1.0, 0.0]) == 0.0
    assert testing.chi_square_p_value([100, 0], [1.0, 0.0]) == 1.0


def test_p_value_sees_a_wrong_distribution():
    graph, tables = pair()
    draws = torch.randint(6, (2000,), generator=torch.Generator().manual_seed(0))
    samples = {"x0": draws // 2, "x1": draws % 2}
    assert testing.sample_p_value(graph, tables, samples) < 1e-10


# -- random graphs ---------------------------------------------------------------------------------


def test_random_forests_cover_what_they_promise():
    graphs = [testing.random_forest(seed) for seed in range(200)]
    assert all(properties.is_forest(graph) for graph in graphs)
    variables = [variable for graph in graphs for variable in graph]
    assert {variable.cardinality for variable in variables} == {1, 2, 3, 4}
    assert any(variable.latent for variable in variables)
    assert {factor.order for graph in graphs for factor in graph.factors.values()} == {1, 2, 3}
    assert any(len(group) > 1 for graph in graphs for group in graph.ties.values())
    assert any(len(properties.components(graph)) > 1 for graph in graphs)
    assert any(not graph.factors for graph in graphs)
    isolated = [
        set(graph.variables) - {v for f in graph.factors.values() for v in f.scope} for graph in graphs
    ]
    assert any(isolated)
    position = [[list(g.variables).index(v) for v in f.scope] for g in graphs for f in g.factors.values()]
    assert any(place != sorted(place) for place in position)


def test_random_forest_is_reproducible():
    assert testing.random_forest(5) == testing.random_forest(5)
    assert testing.random_forest(5) != testing.random_forest(6)


@pytest.mark.parametrize("seed", range(30))
def test_random_potentials_always_leave_one_joint_value(seed):
    graph = testing.random_forest(seed)
    tables = testing.random_log_potentials(graph, (2,), infinite=0.9, evidence=0.5, seed=seed)
    assert torch.isfinite(testing.brute_log_partition(graph, tables)).all()


def test_random_potentials_shapes_dtype_and_global_state():
    graph = topologies.hidden_markov(3, 4, 2)
    state = torch.get_rng_state()
    tables = testing.random_log_potentials(graph, (2, 5), dtype=torch.float32, seed=1)
    assert {key: tuple(table.shape) for key, table in tables.items()} == {
        "initial": (2, 5, 2),
        "emission": (2, 5, 2, 4),
        "transition": (2, 5, 2, 2),
    }
    assert {table.dtype for table in tables.values()} == {torch.float32}
    assert torch.equal(torch.get_rng_state(), state)
    mixed = {
        table.shape
        for seed in range(20)
        for table in testing.random_log_potentials(graph, (2, 5), mixed=True, seed=seed).values()
    }
    assert (2, 2) in mixed and (5, 2, 4) in mixed and any(shape[:2] == (1, 5) for shape in mixed)
