"""The parallel-scan route of chains: the same answers as the tree sweep, with none of torch-struct's traps."""

import math

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.inference import entropy, log_partition, marginals, mode, sample


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tie", [None, "edge"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize(("sites", "states"), [(2, 3), (3, 2), (5, 3), (4, 1)])
def test_partition(sites, states, batch, tie):
    graph = topologies.chain(sites, states, tie=tie)
    tables = testing.random_log_potentials(graph, batch, infinite=0.2, evidence=0.5, seed=sites)
    plan = compile(graph, route="chain scan")
    close(log_partition(plan, tables), testing.brute_log_partition(graph, tables))


def test_mixed_batches_and_stacked_evidence():
    graph = topologies.chain(4, 3, tie=None)
    tables = testing.random_log_potentials(graph, (2, 3), mixed=True, seed=1)
    generator = torch.Generator().manual_seed(0)
    tables["x0", "x1", "x2", "x3"] = torch.randn(3, 4, 3, dtype=torch.float64, generator=generator)
    plan = compile(graph, route="chain scan")
    close(log_partition(plan, tables), testing.brute_log_partition(graph, tables))


def test_scopes_turned_round_and_declared_out_of_order():
    graph = FactorGraph()
    for name in ("x2", "x0", "x3", "x1"):
        graph.add_variable(name, 3)
    for scope in (("x3", "x2"), ("x0", "x1"), ("x2", "x1")):
        graph.add_factor(scope)
    graph.add_factor(("x1",), name="prior")
    tables = testing.random_log_potentials(graph, (2,), seed=1)
    plan = compile(graph, route="chain scan")
    close(log_partition(plan, tables), testing.brute_log_partition(graph, tables))


def test_every_other_query_agrees():
    graph = topologies.chain(4, 3)
    tables = testing.random_log_potentials(graph, (2,), infinite=0.2, evidence=1.0, seed=2)
    scan, sweep = compile(graph, route="chain scan"), compile(graph)
    close(entropy(scan, tables), entropy(sweep, tables))
    expected = marginals(sweep, tables)
    for key, table in marginals(scan, tables).items():
        close(table, expected[key])
    best = mode(sweep, tables)
    assert all(torch.equal(value, best[name]) for name, value in mode(scan, tables).items())
    draws = sample(scan, tables, (3000,), generator=torch.Generator().manual_seed(0))
    assert testing.sample_p_value(graph, tables, draws) > 1e-4


def test_gradient_and_second_derivative():
    graph = topologies.chain(3, 2)
    tables = testing.random_log_potentials(graph, (2,), evidence=1.0, seed=3)
    plan, keys = compile(graph, route="chain scan"), list(tables)

    def function(*values):
        return log_partition(plan, dict(zip(keys, values, strict=True)))

    leaves = tuple(table.requires_grad_() for table in tables.values())
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_gradient_with_impossible_entries():
    graph = topologies.chain(4, 3)
    tables = testing.random_log_potentials(graph, (2,), infinite=0.4, evidence=1.0, seed=4)
    leaves = {key: table.clone().requires_grad_() for key, table in tables.items()}
    log_partition(compile(graph, route="chain scan"), leaves).sum().backward()
    expected = testing.brute_marginals(graph, tables)
    for key, leaf in leaves.items():
        close(leaf.grad, expected[key])


def test_infeasible_is_minus_infinity():
    equal = torch.full((3, 3), -math.inf, dtype=torch.float64).fill_diagonal_(0.0)
    first, last = (torch.full((3,), -math.inf, dtype=torch.float64) for _ in range(2))
    first[0] = last[1] = 0.0
    plan = compile(topologies.chain(3, 3), route="chain scan")
    assert log_partition(plan, {"edge": equal, "x0": first, "x2": last}).item() == -math.inf


@pytest.mark.parametrize("shift", [-1e6, 1e6])
def test_below_the_log_zero_of_torch_struct(shift):
    graph = topologies.chain(4, 3)
    tables = testing.random_log_potentials(graph, seed=5)
    moved = {"edge": tables["edge"] + shift}
    truth = testing.brute_log_partition(graph, moved)
    torch.testing.assert_close(log_partition(compile(graph, route="chain scan"), moved), truth)


def test_no_grad_gives_no_graph_and_inputs_keep_their_flags():
    graph = topologies.chain(4, 3)
    tables = testing.random_log_potentials(graph, seed=5)
    plan = compile(graph, route="chain scan")
    assert not log_partition(plan, tables).requires_grad
    assert not tables["edge"].requires_grad
    tables["edge"].requires_grad_()
    with torch.no_grad():
        assert not log_partition(plan, tables).requires_grad


def test_peaked_float32():
    generator = torch.Generator().manual_seed(0)
    edges = torch.randn(63, 6, 6, generator=generator) * 100
    graph = topologies.chain(64, 6, tie=None)
    tables = dict(zip(graph.factors, edges, strict=True))
    double = {key: table.double() for key, table in tables.items()}
    found = log_partition(compile(graph, route="chain scan"), tables).item()
    assert found == pytest.approx(log_partition(compile(graph), double).item(), rel=1e-5)
