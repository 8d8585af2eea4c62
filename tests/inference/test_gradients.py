"""Derivatives: finite differences of first and second order, -inf entries, and no graph where none is wanted."""

import math

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.graphs import topologies
from codd_ppl.inference import entropy, log_partition, log_score, marginals, mode, sample

INF = math.inf
SMALL = [0, 1, 2, 3, 5, 8, 13, 21, 34, 55]


def leaves_of(graph, batch=(), **options):
    tables = testing.random_log_potentials(graph, batch, evidence=0.5, **options)
    return list(tables), tuple(table.requires_grad_() for table in tables.values())


def small(seed):
    return testing.random_forest(seed, variables=4, max_cardinality=3, connectivity=1.0)


@pytest.mark.parametrize("seed", SMALL)
def test_gradcheck_and_gradgradcheck(seed):
    graph = small(seed)
    plan, (keys, leaves) = compile(graph), leaves_of(graph, (2,) if seed % 2 else (), seed=seed)
    if not leaves:
        pytest.skip("this graph has nothing to differentiate")

    def function(*values):
        return log_partition(plan, dict(zip(keys, values, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_gradcheck_in_full_on_a_hidden_markov_model():
    graph = topologies.hidden_markov(3, 2, 2)
    plan, (keys, leaves) = compile(graph), leaves_of(graph, seed=0)

    def function(*values):
        return log_partition(plan, dict(zip(keys, values, strict=True)))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradcheck_with_stacked_evidence_and_broadcast_batches():
    graph = topologies.hidden_markov(3, 2, 2)
    plan, tokens = compile(graph), ("x0", "x1", "x2")
    tables = testing.random_log_potentials(graph, seed=0)
    tables[tokens] = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    keys = list(tables)

    def function(*values):
        return log_partition(plan, dict(zip(keys, values, strict=True)))

    leaves = tuple(table.requires_grad_() for table in tables.values())
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("seed", SMALL[:6])
def test_marginals_and_entropy_have_gradients(seed):
    graph = small(seed)
    plan, (keys, leaves) = compile(graph), leaves_of(graph, seed=seed)
    if not leaves:
        pytest.skip("this graph has nothing to differentiate")
    name = next(iter(graph.variables))

    def belief(*values):
        return marginals(plan, dict(zip(keys, values, strict=True)))[name]

    def uncertainty(*values):
        return entropy(plan, dict(zip(keys, values, strict=True)))

    if belief(*leaves).requires_grad:  # a variable that no table touches is uniform whatever they hold
        assert torch.autograd.gradcheck(belief, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(uncertainty, leaves, fast_mode=True)


def test_gradient_of_the_entropy_against_enumeration():
    graph = topologies.hidden_markov(3, 3, 2)
    keys, leaves = leaves_of(graph, seed=4)
    tables = dict(zip(keys, leaves, strict=True))
    found = torch.autograd.grad(entropy(compile(graph), tables), leaves)
    expected = torch.autograd.grad(testing.brute_entropy(graph, tables), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gradient_of_the_score_is_the_counts():
    graph = topologies.chain(4, 2)
    table = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    values = {f"x{i}": torch.tensor(v) for i, v in enumerate((0, 1, 1, 1))}
    log_score(compile(graph), {"edge": table}, values).backward()
    assert table.grad.tolist() == [[0, 1], [0, 2]]


def test_hessian_is_the_covariance():
    graph = topologies.chain(3, 2, tie=None)
    tables = testing.random_log_potentials(graph, seed=1)
    plan = compile(graph)
    evidence = torch.zeros(2, dtype=torch.float64)

    def function(value):
        return log_partition(plan, {**tables, "x1": value})

    p = marginals(plan, tables)["x1"]
    hessian = torch.autograd.functional.hessian(function, evidence)
    torch.testing.assert_close(hessian, p.diag() - torch.outer(p, p), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 10.0), (torch.float64, 100.0)])
@pytest.mark.parametrize("seed", range(6))
def test_second_derivatives_of_peaked_chains(seed, dtype, scale):
    """Where a product of messages is so small that one over its square is more than the largest number."""
    graph = topologies.chain(5, 3, tie=None)
    plan = compile(graph)
    tables = testing.random_log_potentials(graph, (3,), scale=scale, evidence=1.0, dtype=dtype, seed=seed)
    along = {key: torch.randn_like(table) for key, table in tables.items()}

    def derivative(query, dtype):
        leaves = {key: table.to(dtype).requires_grad_() for key, table in tables.items()}
        total = query(leaves).sum()
        first = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
        slope = sum((g * along[key]).sum() for key, g in zip(leaves, first, strict=True))
        return torch.autograd.grad(slope, list(leaves.values()))

    found = derivative(lambda t: log_partition(plan, t), dtype)
    expected = derivative(lambda t: testing.brute_log_partition(graph, t), torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e3 * torch.finfo(dtype).eps)


# -- -inf ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_gradients_with_impossible_entries_are_finite_and_right(seed):
    graph = testing.random_forest(seed, max_joint=512)
    keys, leaves = leaves_of(graph, (2,), infinite=0.4, seed=seed)
    if not leaves:
        pytest.skip("this graph has nothing to differentiate")
    tables = dict(zip(keys, leaves, strict=True))
    log_partition(compile(graph), tables).sum().backward()
    expected = testing.brute_marginals(graph, {key: leaf.detach() for key, leaf in tables.items()})
    for key, leaf in tables.items():
        assert torch.isfinite(leaf.grad).all()
        torch.testing.assert_close(leaf.grad, expected[key], rtol=1e-9, atol=1e-9)


def test_a_dead_state_has_gradient_zero():
    graph = topologies.chain(3, 3)
    table = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table[1] = -INF
    table[:, 1] = -INF
    table.requires_grad_()
    log_partition(compile(graph), {"edge": table}).backward()
    assert torch.isfinite(table.grad).all()
    assert table.grad[1].abs().sum() == 0 and table.grad[:, 1].abs().sum() == 0
    assert table.grad.sum().item() == pytest.approx(2.0)


def test_second_derivative_with_impossible_entries_is_finite_and_right():
    graph = topologies.chain(3, 3, tie=None)
    tables = testing.random_log_potentials(graph, infinite=0.4, seed=5)
    plan, evidence = compile(graph), torch.zeros(3, dtype=torch.float64)

    def hessian(f):
        return torch.autograd.functional.hessian(f, evidence)

    found = hessian(lambda value: log_partition(plan, {**tables, "x2": value}))
    p = marginals(plan, tables)["x2"]
    torch.testing.assert_close(found, p.diag() - torch.outer(p, p), rtol=1e-9, atol=1e-9)


def test_entropy_gradient_with_impossible_entries_is_finite():
    graph = topologies.hidden_markov(3, 3, 3)
    keys, leaves = leaves_of(graph, infinite=0.4, seed=2)
    entropy(compile(graph), dict(zip(keys, leaves, strict=True))).backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("seed", range(4))
def test_entropy_gradient_with_impossible_entries_is_that_of_very_unlikely_ones(seed):
    graph = topologies.hidden_markov(3, 3, 3)
    keys, leaves = leaves_of(graph, infinite=0.3, seed=seed)
    finite = tuple(leaf.detach().clamp(min=-900.0).requires_grad_() for leaf in leaves)  # exp(-900) is 0, too
    values = [entropy(compile(graph), dict(zip(keys, group, strict=True))) for group in (leaves, finite)]
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)
    for value in values:
        value.backward()
    for one, other in zip(leaves, finite, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_an_infeasible_element_does_not_spoil_the_others():
    """Shared table, three sequences, the middle one impossible: mask it out of the loss and all is finite."""
    graph = topologies.chain(2, 2)
    table = torch.tensor([[0.3, -INF], [-INF, 0.7]], dtype=torch.float64, requires_grad=True)
    evidence = torch.tensor([[0.0, -INF], [0.0, -INF], [0.1, 0.2]], dtype=torch.float64)
    other = torch.tensor([[0.0, -INF], [-INF, 0.0], [0.3, 0.1]], dtype=torch.float64)
    value = log_partition(compile(graph), {"edge": table, "x0": evidence, "x1": other})
    feasible = torch.isfinite(value)
    assert feasible.tolist() == [True, False, True]
    value[feasible].sum().backward()
    p = torch.tensor([0.3 + 0.1 + 0.3, 0.7 + 0.2 + 0.1], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(table.grad, torch.tensor([[1 + p[0], 0], [0, p[1]]], dtype=torch.float64))


def test_an_infeasible_partition_has_gradient_zero():
    table = torch.full((2, 2), -INF, dtype=torch.float64, requires_grad=True)
    evidence = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    value = log_partition(compile(topologies.chain(2, 2)), {"edge": table, "x0": evidence})
    assert value.tolist() == [-INF] * 3
    value.sum().backward()
    assert table.grad.abs().sum() == 0 and evidence.grad.abs().sum() == 0


# -- hygiene ---------------------------------------------------------------------------------------


def queries(plan, tables, graph):
    zeros = {name: torch.tensor(0) for name in graph.variables}
    yield log_partition(plan, tables)
    yield entropy(plan, tables)
    yield log_score(plan, tables, zeros)
    yield from marginals(plan, tables).values()
    yield from mode(plan, tables).values()
    yield from sample(plan, tables, (2,)).values()


def test_no_grad_gives_no_graph_even_if_inputs_want_one():
    graph = topologies.hidden_markov(3, 3, 2)
    keys, leaves = leaves_of(graph, seed=0)
    with torch.no_grad():
        for result in queries(compile(graph), dict(zip(keys, leaves, strict=True)), graph):
            assert not result.requires_grad and result.grad_fn is None


def test_inference_mode_works():
    graph = topologies.hidden_markov(3, 3, 2)
    tables = testing.random_log_potentials(graph, seed=0)
    with torch.inference_mode():
        assert all(not result.requires_grad for result in queries(compile(graph), tables, graph))


def test_inputs_keep_their_values_versions_and_flags():
    graph = topologies.hidden_markov(3, 3, 2)
    tables = testing.random_log_potentials(graph, (2,), infinite=0.2, evidence=1.0, seed=0)
    keys, before = list(tables), {key: table.clone() for key, table in tables.items()}
    versions = {key: table._version for key, table in tables.items()}
    plan = compile(graph)
    for result in queries(plan, tables, graph):
        assert not result.requires_grad
    assert list(tables) == keys
    for key, table in tables.items():
        assert torch.equal(table, before[key]) and table._version == versions[key]
        assert not table.requires_grad


def test_samples_and_modes_carry_no_gradient():
    graph = topologies.chain(3, 3)
    table = torch.randn(3, 3, requires_grad=True)
    for result in (mode(compile(graph), {"edge": table}), sample(compile(graph), {"edge": table})):
        assert all(not value.requires_grad for value in result.values())


def test_backward_twice_with_retain_graph_adds_up():
    graph = topologies.hidden_markov(3, 3, 2)
    keys, leaves = leaves_of(graph, seed=3)
    value = log_partition(compile(graph), dict(zip(keys, leaves, strict=True)))
    value.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    value.backward()
    for leaf, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad)


def test_only_some_tables_want_gradients():
    graph = topologies.hidden_markov(3, 3, 2)
    tables = testing.random_log_potentials(graph, seed=3)
    tables["transition"].requires_grad_()
    log_partition(compile(graph), tables).backward()
    expected = testing.brute_marginals(graph, {key: table.detach() for key, table in tables.items()})
    torch.testing.assert_close(tables["transition"].grad, expected["transition"], rtol=1e-9, atol=1e-9)
    assert tables["emission"].grad is None


def test_a_parameter_used_under_two_keys_collects_both_gradients():
    graph = topologies.chain(3, 3, tie=None)
    table = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    tables = {"x0,x1": table, "x1,x2": table}
    log_partition(compile(graph), tables).backward()
    expected = testing.brute_marginals(graph, {key: value.detach() for key, value in tables.items()})
    torch.testing.assert_close(table.grad, expected["x0,x1"] + expected["x1,x2"], rtol=1e-9, atol=1e-9)
