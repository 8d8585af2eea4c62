"""Loopy belief propagation: exact on forests, near on weak loops, never chosen silently, never silent about failure."""

import math
import warnings

import networkx as nx
import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import LoopyBeliefPropagation, compile
from codd_ppl.errors import (
    ConfigError,
    ConvergenceWarning,
    GraphError,
    InfeasibleError,
    IntractableError,
    PotentialsError,
)
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.inference import entropy, log_partition, log_score, marginals, mode, sample
from codd_ppl.inference.loopy import belief_propagation

EAGER = LoopyBeliefPropagation(iterations=50, damping=0.0, tolerance=1e-12)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(80))
def test_exact_on_forests(seed):
    graph = testing.random_forest(seed, max_order=4 if seed % 7 == 0 else 3)
    shape = [(), (3,), (2, 3), (0,)][seed % 4]
    tables = testing.random_log_potentials(
        graph, shape, infinite=0.25 * (seed % 2), evidence=0.5, mixed=seed % 5 == 0, seed=seed
    )
    tables = tables or {next(iter(graph.variables)): torch.zeros(next(iter(graph)).cardinality).double()}
    plan = compile(graph, approximate=EAGER)
    result = belief_propagation(plan, tables)
    assert bool(result.converged.all())
    assert result.iterations <= len(graph.variables) + 1  # a fixed point after the diameter
    close(log_partition(plan, tables), testing.brute_log_partition(graph, tables))
    found, expected = marginals(plan, tables), testing.brute_marginals(graph, tables)
    assert set(found) == set(tables) | set(graph.variables)
    for key, table in found.items():
        close(table, expected[key].expand(table.shape))


@pytest.mark.parametrize("seed", range(10))
def test_near_on_weakly_coupled_grids(seed):
    """Couplings of deviation 0.3: log Z within 0.01 nats, marginals within 0.01; at 0.1, a hundred times nearer."""
    graph = topologies.grid(3, 3, 2, tie=False)
    plan = compile(graph, approximate=LoopyBeliefPropagation(damping=0.3, tolerance=1e-10))
    for scale, bound in ((0.3, 1e-2), (0.1, 1e-4)):
        tables = testing.random_log_potentials(graph, (4,), scale=scale, seed=seed)
        tables[graph.tokens] = torch.randn(4, 9, 2, generator=torch.Generator().manual_seed(seed)).double()
        gap = log_partition(plan, tables) - testing.brute_log_partition(graph, tables)
        assert float(gap.abs().max()) < bound
        found, expected = marginals(plan, tables), testing.brute_marginals(graph, tables)
        assert max(float((found[key] - expected[key]).abs().max()) for key in found) < bound


def test_a_single_loop_of_known_error():
    """Ising ring: Bethe log Z is n log(2 cosh J) at the symmetric fixed point; the truth adds log(1 + tanh(J)^n)."""
    n, J = 4, 0.4
    graph = topologies.grid(2, 2, 2)
    spin = torch.tensor([[J, -J], [-J, J]], dtype=torch.float64)
    found = log_partition(compile(graph, approximate=EAGER), {"right": spin, "down": spin})
    assert found.item() == pytest.approx(n * math.log(2 * math.cosh(J)), rel=1e-12)
    exact = log_partition(compile(graph), {"right": spin, "down": spin})
    assert exact.item() == pytest.approx(found.item() + math.log(1 + math.tanh(J) ** n), rel=1e-12)


def test_hard_constraints_stay_hard():
    graph = topologies.grid(2, 3, 2)
    tables = testing.random_log_potentials(graph, (3,), infinite=0.25, evidence=0.5, seed=1)
    plan = compile(graph, approximate=LoopyBeliefPropagation(damping=0.5, tolerance=1e-10, iterations=500))
    found, expected = marginals(plan, tables), testing.brute_marginals(graph, tables)
    for key, table in tables.items():
        assert bool(
            (
                found[key].expand(expected[key].shape)[(table == -math.inf).expand(expected[key].shape)] == 0
            ).all()
        )
    for name in graph.variables:
        close(found[name].sum(-1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_gradients_go_through_the_rounds(damping):
    graph = topologies.grid(2, 2, 2)
    plan = compile(graph, approximate=LoopyBeliefPropagation(6, damping, tolerance=0.0))
    tables = testing.random_log_potentials(graph, (2,), evidence=1.0, seed=0)
    leaves = tuple(table.requires_grad_() for table in tables.values())

    def function(*values):
        result = belief_propagation(plan, dict(zip(tables, values, strict=True)))
        return result.log_partition, result.marginals["x0"], result.marginals["right"]

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_the_gradient_of_the_bethe_partition_is_the_beliefs():
    """At a fixed point the messages are stationary, so only the explicit dependence counts."""
    graph = topologies.grid(3, 3, 2)
    plan = compile(graph, approximate=LoopyBeliefPropagation(tolerance=1e-13, iterations=1000))
    tables = testing.random_log_potentials(graph, infinite=0.0, scale=0.5, evidence=1.0, seed=2)
    leaves = {key: table.requires_grad_() for key, table in tables.items()}
    log_partition(plan, leaves).backward()
    beliefs = marginals(plan, tables)
    for key, leaf in leaves.items():
        close(leaf.grad, beliefs[key], 1e-6)


def test_gradients_are_finite_with_impossible_entries():
    graph = topologies.grid(2, 3, 2)
    tables = testing.random_log_potentials(graph, (2,), infinite=0.3, scale=5.0, seed=3)
    leaves = {key: table.float().requires_grad_() for key, table in tables.items()}
    plan = compile(graph, approximate=LoopyBeliefPropagation(iterations=30))
    belief_propagation(plan, leaves).log_partition.sum().backward()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves.values())


# -- the report ------------------------------------------------------------------------------------


def frustrated():
    """Five spins that all repel each other, more and more from element to element: undamped messages overshoot."""
    graph = FactorGraph.from_networkx(nx.complete_graph(5), cardinality=2, tie="repel")
    strength = torch.tensor([0.05, 0.1, 1.0, 2.0, 3.0], dtype=torch.float64)
    tables = {"repel": strength[:, None, None] * torch.tensor([[-1.0, 1.0], [1.0, -1.0]])}
    fields = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    return graph, tables | {graph.tokens: fields}


def test_what_has_not_converged_is_reported_and_warned_about():
    graph, tables = frustrated()
    plan = compile(graph, approximate=LoopyBeliefPropagation(iterations=40, damping=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = belief_propagation(plan, tables)  # the report itself doesn't warn
    assert result.residual.shape == result.converged.shape == result.log_partition.shape == (5,)
    assert not bool(result.converged.all()) and result.iterations == 40
    assert torch.equal(result.converged, result.residual <= 1e-6)
    missed = int((~result.converged).sum())
    for query in (log_partition, marginals):
        with pytest.warns(ConvergenceWarning, match=f"for {missed} of 5 batch elements in 40 iterations"):
            query(plan, tables)


def test_damping_helps():
    graph, tables = frustrated()
    plan = compile(graph, approximate=LoopyBeliefPropagation(iterations=300, damping=0.7))
    assert int(belief_propagation(plan, tables).converged.sum()) > int(
        belief_propagation(
            compile(graph, approximate=LoopyBeliefPropagation(iterations=300, damping=0.0)), tables
        ).converged.sum()
    )


def test_an_element_does_not_depend_on_its_batch():
    graph = topologies.grid(3, 3, 2)
    tables = testing.random_log_potentials(graph, (6,), scale=1.5, seed=5)
    plan = compile(graph, approximate=LoopyBeliefPropagation(tolerance=1e-4))
    together = belief_propagation(plan, tables)
    for i in range(6):
        alone = belief_propagation(plan, {key: table[i] for key, table in tables.items()})
        close(together.log_partition[i], alone.log_partition, 1e-13)
        close(together.residual[i], alone.residual, 1e-12)


def test_float32_converges_at_the_default_tolerance():
    graph = topologies.grid(4, 4, 3)
    tables = testing.random_log_potentials(graph, (4,), dtype=torch.float32, scale=0.5, seed=0)
    result = belief_propagation(compile(graph, approximate=LoopyBeliefPropagation()), tables)
    assert bool(result.converged.all()) and result.log_partition.dtype == torch.float32


@pytest.mark.parametrize("scale", [30.0, 100.0])
def test_peaked_tables_in_float32(scale):
    graph = topologies.chain(6, 4, tie=None)
    tables = testing.random_log_potentials(graph, (3,), dtype=torch.float32, scale=scale, seed=0)
    found = log_partition(compile(graph, approximate=LoopyBeliefPropagation(damping=0.0)), tables)
    torch.testing.assert_close(
        found.double(), testing.brute_log_partition(graph, tables), rtol=1e-5, atol=1e-4
    )


# -- what it is not --------------------------------------------------------------------------------


def test_it_is_never_chosen_silently_and_always_said():
    graph = topologies.grid(2, 2, 2)
    assert compile(graph).approximation is None
    plan = compile(graph, approximate=EAGER)
    assert plan.route == "loopy belief propagation"
    assert all(
        word in plan.explain() for word in ("loopy belief propagation", "NOT EXACT", "damping 0", "50 rounds")
    )
    assert plan == compile(graph, approximate=EAGER) != compile(graph, approximate=LoopyBeliefPropagation())
    assert hash(plan) == hash(compile(graph, approximate=EAGER))
    assert compile(topologies.grid(12, 12, 27), approximate=EAGER).route == "loopy belief propagation"


@pytest.mark.parametrize("query", [mode, sample, entropy])
def test_queries_that_beliefs_cannot_answer(query):
    graph = topologies.grid(2, 2, 2)
    tables = testing.random_log_potentials(graph, seed=0)
    with pytest.raises(IntractableError, match=f"{query.__name__} is not defined.*compile\\(graph\\)"):
        query(compile(graph, approximate=EAGER), tables)


def test_log_score_is_exact_all_the_same():
    graph = topologies.grid(2, 2, 2)
    tables = testing.random_log_potentials(graph, (3,), evidence=0.5, seed=0)
    assignment = {name: torch.tensor([0, 1, 1]) for name in graph.variables}
    found = log_score(compile(graph, approximate=EAGER), tables, assignment)
    close(found, testing.brute_log_score(graph, tables, assignment))


def test_infeasible_and_malformed_potentials():
    graph = topologies.grid(2, 2, 2)
    plan = compile(graph, approximate=EAGER)
    tables = testing.random_log_potentials(graph, (2,), scale=0.3, seed=0)
    dead = torch.zeros(2, 2, dtype=torch.float64)
    dead[1] = -math.inf
    assert log_partition(plan, tables | {"x2": dead}).isinf().tolist() == [False, True]
    with pytest.raises(InfeasibleError, match=r"batch element \(1,\)"):
        marginals(plan, tables | {"x2": dead})
    with pytest.raises(PotentialsError, match="'x2' holds NaN"):
        log_partition(plan, tables | {"x2": dead * math.nan})


def test_settings_and_uses_are_checked():
    for settings in ({"iterations": 0}, {"damping": 1.0}, {"damping": -0.1}, {"tolerance": math.nan}):
        with pytest.raises(ConfigError, match=f"expected {next(iter(settings))}"):
            LoopyBeliefPropagation(**settings)
    graph = topologies.grid(2, 2, 2)
    with pytest.raises(GraphError, match="LoopyBeliefPropagation"):
        compile(graph, approximate=True)
    with pytest.raises(GraphError, match="leave one of them out"):
        compile(graph, route="clique contraction", approximate=EAGER)
    with pytest.raises(IntractableError, match="clique contraction"):
        belief_propagation(compile(graph), testing.random_log_potentials(graph, seed=0))
