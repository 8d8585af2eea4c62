"""Graphs with loops, exactly: hundreds of random ones against enumeration, and what is easily got wrong."""

import itertools
import math

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.errors import InfeasibleError, PotentialsError
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.inference import (
    clique_queries,
    contraction,
    entropy,
    log_partition,
    log_score,
    marginals,
    mode,
    sample,
)

SHAPES = [(), (3,), (2, 3), (0,), (1,)]


def case(seed: int):
    """A random loopy graph of treewidth 2 or 3, its plan and potentials; every second one with -inf."""
    graph = testing.random_loopy_graph(seed, treewidth=2 + seed % 2, max_joint=1024)
    tables = testing.random_log_potentials(
        graph,
        SHAPES[seed % 5],
        infinite=0.25 if seed % 4 < 2 else 0.0,
        scale=5.0 if seed % 3 == 0 else 1.0,
        evidence=0.5,
        mixed=seed % 7 == 0,
        seed=seed,
    )
    if seed % 3 == 1:  # evidence of several variables under one key
        size = max(len(names) for names in compile(graph).by_cardinality)
        names = next(n for n in compile(graph).by_cardinality if len(n) == size)
        card = graph.variables[names[0]].cardinality
        generator = torch.Generator().manual_seed(seed)
        tables[names] = torch.randn(len(names), card, generator=generator, dtype=torch.float64)
    return graph, compile(graph), tables


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(200))
def test_every_query(seed):
    graph, plan, tables = case(seed)
    assert plan.route == "clique contraction"
    before = {key: table.clone() for key, table in tables.items()}

    truth = testing.brute_log_partition(graph, tables)
    close(log_partition(plan, tables), truth)

    found, expected = marginals(plan, tables), testing.brute_marginals(graph, tables)
    assert set(found) == set(tables) | set(graph.variables)
    for key, table in found.items():
        close(table, expected[key].expand(table.shape))

    best, _ = testing.brute_mode(graph, tables)
    winner = mode(plan, tables)
    assert all(value.dtype == torch.int64 and value.shape == truth.shape for value in winner.values())
    close(testing.brute_log_score(graph, tables, winner), best)
    close(log_score(plan, tables, winner), best)

    close(entropy(plan, tables), testing.brute_entropy(graph, tables))

    draws = sample(plan, tables, (2, 5), generator=torch.Generator().manual_seed(seed))
    assert set(draws) == set(graph.variables)
    assert all(value.dtype == torch.int64 and value.shape == (2, 5, *truth.shape) for value in draws.values())
    scores = testing.brute_log_score(graph, tables, draws)
    assert torch.isfinite(scores).all()  # never an impossible value
    close(log_score(plan, tables, draws), scores)

    assert all(torch.equal(table, before[key]) for key, table in tables.items()), "inputs were modified"


@pytest.mark.parametrize("seed", range(40))
def test_sample_frequencies(seed):
    graph, plan, tables = case(seed)
    draws = sample(plan, tables, (3000,), generator=torch.Generator().manual_seed(seed))
    if testing.brute_log_partition(graph, tables).numel():
        assert testing.sample_p_value(graph, tables, draws) > 1e-4


@pytest.mark.parametrize("seed", range(60))
def test_gradient_is_the_marginals(seed):
    graph, plan, tables = case(seed)
    leaves = {key: table.clone().requires_grad_() for key, table in tables.items()}
    value = log_partition(plan, leaves)
    expected = testing.brute_marginals(graph, tables)
    weight = torch.rand(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(seed))
    (value * weight).sum().backward()
    for key, leaf in leaves.items():
        events = expected[key].dim() - value.dim()
        full = expected[key] * weight.reshape(*weight.shape, *[1] * events)
        close(leaf.grad, full.sum_to_size(leaf.shape))


@pytest.mark.parametrize("query", [log_partition, entropy], ids=["log_partition", "entropy"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow
@pytest.mark.ci
def test_first_and_second_derivatives(seed, query):
    graph = testing.random_loopy_graph(seed, treewidth=2 + seed % 2, variables=5, max_joint=100)
    plan = compile(graph)
    tables = testing.random_log_potentials(graph, (2,), evidence=0.5, mixed=True, seed=seed)
    leaves = tuple(table.requires_grad_() for table in tables.values())

    def function(*values):
        return query(plan, dict(zip(tables, values, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    if query is log_partition:
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("seed", range(6))
def test_derivatives_stay_finite_with_impossible_entries(seed, scale, dtype):
    """Gradients of marginals (second derivatives of log Z), through exact zeros and peaked tables."""
    graph = testing.random_loopy_graph(seed, treewidth=2 + seed % 2)
    plan = compile(graph)
    tables = testing.random_log_potentials(
        graph, (2,), infinite=0.4, evidence=0.5, scale=scale, dtype=dtype, seed=seed
    )
    leaves = {key: table.requires_grad_() for key, table in tables.items()}
    first = torch.autograd.grad(log_partition(plan, leaves).sum(), list(leaves.values()), create_graph=True)
    assert all(bool(g.isfinite().all()) for g in first)
    impossible = [g[leaf == -math.inf] for g, leaf in zip(first, leaves.values(), strict=True)]
    assert all(bool((g == 0).all()) for g in impossible)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))
    assert all(bool(g.isfinite().all()) for g in second)
    third = sum(m.square().sum() for m in marginals(plan, leaves).values())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(third, list(leaves.values())))


def test_an_infeasible_element_has_zero_gradient():
    graph = topologies.grid(2, 2, 2)
    tables = testing.random_log_potentials(graph, (2,), seed=0)
    evidence = torch.zeros(2, 2, dtype=torch.float64)
    evidence[1] = -math.inf
    leaves = {key: table.requires_grad_() for key, table in (tables | {"x3": evidence}).items()}
    value = log_partition(compile(graph), leaves)
    assert value[1].item() == -math.inf and bool(value[0].isfinite())
    value.sum().backward()
    for leaf in leaves.values():
        assert bool(leaf.grad.isfinite().all())
        assert bool((leaf.grad[1] == 0).all()) and bool((leaf.grad[0] != 0).any())


# -- the same answers as other routes --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_forests_as_cliques_agree_with_the_tree_sweep(seed):
    graph = testing.random_forest(seed)
    tables = testing.random_log_potentials(graph, (2,), infinite=0.2, evidence=0.5, seed=seed)
    tables = tables or {next(iter(graph.variables)): torch.zeros(next(iter(graph)).cardinality)}
    cliques, sweep = compile(graph, route="clique contraction"), compile(graph)
    assert cliques.junction is not None and sweep.junction is None
    close(log_partition(cliques, tables), log_partition(sweep, tables))
    found, expected = marginals(cliques, tables), marginals(sweep, tables)
    assert found.keys() == expected.keys()
    for key, table in found.items():
        close(table, expected[key])
    close(entropy(cliques, tables), entropy(sweep, tables))
    close(log_score(cliques, tables, mode(cliques, tables)), log_score(sweep, tables, mode(sweep, tables)))


def test_a_long_skip_chain_is_a_chain_of_pairs():
    """500 sites: x_i and x_{i+1} as one variable of 9 values, in float64 by hand."""
    sites, graph = 500, topologies.skip_chain(500, 3)
    tables = testing.random_log_potentials(graph, scale=2.0, infinite=0.1, seed=1)
    generator = torch.Generator().manual_seed(0)
    unary = torch.randn(sites, 3, generator=generator, dtype=torch.float64)
    one, two = tables["skip1"], tables["skip2"]
    message = one + unary[0, :, None] + unary[1]  # over (x_i, x_{i+1})
    for i in range(2, sites):
        joint = message[..., None] + one + two[:, None, :] + unary[i]
        message = joint.logsumexp(0)
    found = log_partition(compile(graph), tables | {graph.tokens: unary})
    assert found.item() == pytest.approx(message.logsumexp((0, 1)).item(), rel=1e-12)


def test_even_parity_as_a_factor_in_a_loop():
    """Hard constraints only: x0 + x1 + x2 even, and a loop of equalities that leaves two assignments of 2 ** 4."""
    graph = topologies.independent(4, 2)
    graph.add_factor(("x0", "x1", "x2"), name="parity")
    for a, b in (("x0", "x1"), ("x1", "x3"), ("x3", "x0")):
        graph.add_factor((a, b), tie="equal")
    parity = torch.tensor(
        [0.0 if sum(bits) % 2 == 0 else -math.inf for bits in itertools.product((0, 1), repeat=3)]
    )
    tables = {"parity": parity.reshape(2, 2, 2), "equal": torch.eye(2).log()}
    plan = compile(graph)
    assert log_partition(plan, tables).item() == pytest.approx(math.log(2))
    draws = sample(plan, tables, (200,), generator=torch.Generator().manual_seed(0))
    assert bool((draws["x2"] == 0).all()) and bool((draws["x0"] == draws["x3"]).all())
    assert 60 < int(draws["x0"].sum()) < 140
    assert entropy(plan, tables).item() == pytest.approx(math.log(2))


# -- numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [30.0, 100.0, 1000.0])
@pytest.mark.parametrize("seed", range(8))
def test_peaked_in_float32(seed, scale):
    graph = testing.random_loopy_graph(seed, treewidth=2 + seed % 2, max_joint=1024)
    plan = compile(graph)
    tables = testing.random_log_potentials(
        graph, (3,), dtype=torch.float32, scale=scale, infinite=0.1 * (seed % 2), evidence=0.5, seed=seed
    )
    truth = testing.brute_log_partition(graph, tables)
    found = log_partition(plan, tables)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4)
    expected = testing.brute_marginals(graph, tables)
    for key, table in marginals(plan, tables).items():
        torch.testing.assert_close(table.double(), expected[key].expand(table.shape), rtol=0, atol=1e-3)
    best, _ = testing.brute_mode(graph, tables)
    reached = testing.brute_log_score(graph, tables, mode(plan, tables))
    torch.testing.assert_close(reached, best, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        entropy(plan, tables).double(), testing.brute_entropy(graph, tables), rtol=0, atol=2e-3
    )


def count_log_space(monkeypatch) -> list[int]:
    calls: list[int] = []
    right = contraction._in_log_space
    monkeypatch.setattr(contraction, "_in_log_space", lambda *a: calls.append(1) or right(*a))
    return calls


def test_the_fast_route_is_taken_where_it_is_safe_and_only_there(monkeypatch):
    calls, plan = count_log_space(monkeypatch), compile(topologies.grid(3, 3, 3))
    tables = testing.random_log_potentials(topologies.grid(3, 3, 3), dtype=torch.float32, seed=0)
    marginals(plan, tables)
    assert not calls
    # Exact zeros, as of known tokens or hard constraints, are no reason to leave it.
    known = torch.full((3,), -math.inf).index_fill(0, torch.tensor(1), 0.0)
    hard = {"right": torch.eye(3).log().fill_diagonal_(0.5)}
    marginals(plan, tables | hard | {"x4": known})
    assert not calls
    marginals(plan, {key: 100 * table for key, table in tables.items()})
    assert calls


def test_underflow_would_show_without_the_check(monkeypatch):
    """The case that the check is for: in linear space alone the result is finite and wrong by nats."""
    graph = topologies.grid(2, 3, 3)
    tables = testing.random_log_potentials(graph, dtype=torch.float32, scale=60.0, seed=7)
    plan, truth = compile(graph), testing.brute_log_partition(graph, tables).item()
    assert log_partition(plan, tables).item() == pytest.approx(truth, rel=1e-5)
    monkeypatch.setattr(
        contraction, "_linear", lambda c, logs: contraction._einsum(c, [t.exp() for t in logs]).log()
    )
    assert abs(log_partition(plan, tables).item() - truth) > 1


@pytest.mark.parametrize("chunk", [1, 40])
def test_log_space_and_draws_in_slices(monkeypatch, chunk):
    graph = topologies.grid(2, 3, 3)
    tables = testing.random_log_potentials(graph, (7,), scale=200.0, evidence=1.0, seed=2)
    plan = compile(graph)
    monkeypatch.setattr(contraction, "CHUNK", chunk)
    monkeypatch.setattr(clique_queries, "CHUNK", chunk)
    close(log_partition(plan, tables), testing.brute_log_partition(graph, tables))
    close(entropy(plan, tables), testing.brute_entropy(graph, tables))
    best, _ = testing.brute_mode(graph, tables)
    close(testing.brute_log_score(graph, tables, mode(plan, tables)), best)
    soft = {key: table / 200 for key, table in tables.items()}
    draws = sample(plan, soft, (400,), generator=torch.Generator().manual_seed(0))
    assert testing.sample_p_value(graph, soft, draws) > 1e-4


def test_a_batch_of_evidence_over_shared_tables_in_float32():
    graph = topologies.skip_chain(5, 4)
    tables = testing.random_log_potentials(graph, dtype=torch.float32, seed=0)
    tables[graph.tokens] = torch.randn(64, 5, 4, generator=torch.Generator().manual_seed(1))
    truth = testing.brute_log_partition(graph, tables)
    torch.testing.assert_close(log_partition(compile(graph), tables).double(), truth, rtol=1e-6, atol=1e-6)


# -- errors ------------------------------------------------------------------------------------------


def test_infeasible_evidence_is_named():
    graph = topologies.grid(2, 2, 2)
    tables = {"right": torch.eye(2).log(), "down": torch.eye(2).log()}
    evidence = torch.zeros(3, 4, 2)
    evidence[1, 0, 0] = evidence[1, 3, 1] = -math.inf  # x0 = 1 and x3 = 0, but all four are equal
    tables[graph.tokens] = evidence
    plan = compile(graph)
    assert log_partition(plan, tables).tolist()[1] == -math.inf
    for query in (marginals, mode, sample, entropy):
        with pytest.raises(InfeasibleError) as error:
            query(plan, tables)
        text = str(error.value)
        assert "batch element (1,)" in text and "clique (" in text
        assert "with -inf in their evidence: x0, x3" in text or "with -inf in their evidence: x3, x0" in text
    evidence[1, 2] = -math.inf
    with pytest.raises(InfeasibleError, match="variable 'x2'"):
        marginals(plan, tables)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("query", [log_partition, marginals, mode, sample, entropy])
def test_nan_and_infinity_are_named(query, bad):
    """Wherever they stand, and even where other tables make the entry impossible."""
    graph = topologies.grid(2, 2, 2)
    tables = testing.random_log_potentials(graph, (2,), seed=0)
    tables["down"][1, 0, 1] = bad
    tables["x0"] = torch.tensor([-math.inf, 0.0], dtype=torch.float64)
    tables["x1"] = torch.tensor([-math.inf, 0.0], dtype=torch.float64)
    with pytest.raises(PotentialsError, match="'down' holds"):
        query(compile(graph), tables)


def test_keys_and_shapes_are_checked():
    graph = topologies.grid(2, 2, 2)
    plan, tables = compile(graph), testing.random_log_potentials(graph, seed=0)
    with pytest.raises(PotentialsError, match="unknown key 'left'"):
        log_partition(plan, tables | {"left": torch.zeros(2, 2)})
    with pytest.raises(PotentialsError, match="lacks factor"):
        log_partition(plan, {"right": tables["right"]})
    with pytest.raises(PotentialsError, match="expected shape"):
        log_partition(plan, tables | {"right": torch.zeros(3, 3)})


def test_a_factor_of_a_tie_may_have_a_table_of_its_own():
    graph = topologies.grid(2, 2, 2)
    tables = testing.random_log_potentials(graph, seed=0)
    tables["x0,x1"] = torch.randn(2, 2, dtype=torch.float64)
    plan = compile(graph)
    close(log_partition(plan, tables), testing.brute_log_partition(graph, tables))
    found, expected = marginals(plan, tables), testing.brute_marginals(graph, tables)
    close(found["x0,x1"], expected["x0,x1"])
    close(found["right"], expected["x2,x3"])  # the counts of the factors that do use the tie's table


def test_many_variables_of_one_value_in_a_clique():
    """Variables that can't vary cost nothing, however many meet in one clique."""
    graph = FactorGraph()
    for i in range(56):
        graph.add_variable(f"x{i}", 2 if i < 2 else 1)
    for name in ("f", "g"):
        graph.add_factor(tuple(graph.variables), name=name)
    shape = graph.shape("f")
    tables = {name: torch.full(shape, 0.5, dtype=torch.float64) for name in ("f", "g")}
    plan = compile(graph)
    assert log_partition(plan, tables).item() == pytest.approx(1 + math.log(4))
    assert marginals(plan, tables)["f"].flatten().tolist() == pytest.approx([0.25] * 4)
