"""Paths where one table or one variable's evidence has the batch dimension and the rest doesn't."""

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.graphs import topologies
from codd_ppl.inference import entropy, kl, log_partition, marginals, mode, sample

PLACES = [("edge", f"x{i}") for i in range(6)] + [(None, f"x{i},x{i + 1}") for i in range(5)]
PLACES += [(None, f"x{i}") for i in range(6)]


@pytest.mark.parametrize(("tie", "place"), PLACES)
def test_one_place_is_batched(tie, place):
    graph = topologies.chain(6, 3, tie=tie)
    plan, tables = compile(graph), testing.random_log_potentials(graph)
    shape = (4, 3, 3) if "," in place else (4, 3)
    tables[place] = torch.randn(shape, dtype=torch.float64)
    expected = testing.brute_marginals(graph, tables)
    for key, found in marginals(plan, tables).items():
        torch.testing.assert_close(found, expected[key].expand(found.shape), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(entropy(plan, tables), testing.brute_entropy(graph, tables))
    best = testing.brute_log_score(graph, tables, mode(plan, tables))
    torch.testing.assert_close(best, testing.brute_mode(graph, tables)[0])
    draws = sample(plan, tables, (2000,), generator=torch.Generator().manual_seed(0))
    assert testing.sample_p_value(graph, tables, draws) > 1e-4
    leaves = {key: table.clone().requires_grad_() for key, table in tables.items()}
    log_partition(plan, leaves).sum().backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[key].sum_to_size(leaf.shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("place", ["x0", "x2", "x0,x1", "x3,x4"])
@pytest.mark.parametrize("first", ["x0,x1", "x2,x3"])
def test_an_empty_batch_in_one_place(first, place):
    """The first table may have entries where another one has none."""
    graph = topologies.chain(6, 3, tie=None)
    plan, tables = compile(graph), testing.random_log_potentials(graph)
    tables[first] = tables[first].expand(1, 3, 3)
    tables[place] = torch.zeros((0, 3, 3) if "," in place else (0, 3), dtype=torch.float64)
    leaves = {key: table.clone().requires_grad_() for key, table in tables.items()}
    log_partition(plan, leaves).sum().backward()
    assert all(bool((leaf.grad == 0).all()) for leaf in leaves.values())
    with torch.no_grad():
        for found in (log_partition(plan, tables), entropy(plan, tables), kl(plan, tables, tables)):
            assert found.shape == (0,)
        assert marginals(plan, tables)["x4,x5"].shape == (0, 3, 3)
        assert mode(plan, tables)["x5"].shape == (0,) and sample(plan, tables, (2,))["x5"].shape == (2, 0)


@pytest.mark.parametrize("states", [2, 17])
def test_a_large_batch_at_the_root_alone(states):
    """Memory that a compiled loop writes to has room for all of it."""
    graph = topologies.chain(6, states, tie=None)
    plan, tables = compile(graph), testing.random_log_potentials(graph)
    tables[plan.roots[0]] = torch.randn(5000, states, dtype=torch.float64)
    some = {key: table[:3] if key in plan.variable else table for key, table in tables.items()}
    leaves = {key: table.clone().requires_grad_() for key, table in tables.items()}
    log_partition(plan, leaves).sum().backward()
    total = sum(leaf.grad.sum() for key, leaf in leaves.items() if key not in plan.variable)
    torch.testing.assert_close(total, torch.tensor(5 * 5000.0, dtype=torch.float64))
    for key, found in marginals(plan, some).items():
        torch.testing.assert_close(marginals(plan, tables)[key][:3], found)
    assert all(torch.equal(mode(plan, tables)[v][:3], found) for v, found in mode(plan, some).items())


@pytest.mark.parametrize("kind", ["tied", "own", "stacked"])
@pytest.mark.parametrize("lead", [(), (1,)])
def test_the_batch_is_in_another_component(kind, lead):
    graph = topologies.chain(5, 3, tie="edge" if kind == "tied" else None)
    graph.add_variable("y", 2)
    plan, tables = compile(graph), testing.random_log_potentials(graph, lead)
    assert plan.runs
    if kind == "stacked":
        names = tuple(graph.factors)
        tables[names] = torch.stack([tables.pop(name) for name in names], len(lead))
    tables["y"] = torch.randn(3, 2, dtype=torch.float64)
    weight = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    grads = []
    for query in (log_partition, testing.brute_log_partition):
        leaves = {key: table.clone().requires_grad_() for key, table in tables.items()}
        (query(plan if query is log_partition else graph, leaves) * weight).sum().backward()
        grads.append({key: leaf.grad for key, leaf in leaves.items()})
    for key, found in grads[0].items():
        torch.testing.assert_close(found, grads[1][key])
