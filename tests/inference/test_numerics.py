"""float32 where scaled probability space fails: peaked potentials, contradictions, very long chains."""

import math

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.graphs import topologies
from codd_ppl.inference import entropy, log_partition, log_score, marginals, mode, sample


def forward(edges, unary, semiring=torch.logsumexp):
    """Chain recursion in float64: edges (sites - 1, C, C), unary (sites, C) -> all forward messages."""
    edges, unary = edges.double(), unary.double()
    messages = [unary[0]]
    for edge, row in zip(edges, unary[1:], strict=True):
        messages.append(semiring(messages[-1][:, None] + edge, 0) + row)
    return torch.stack(messages)


def chain_truth(edges, unary):
    """float64 log-partition, node marginals and best score of a chain."""
    ahead = forward(edges, unary)
    behind = forward(edges.flip(0).mT, unary.flip(0)).flip(0) - unary.double()
    log_z = ahead[-1].logsumexp(-1)
    best = forward(edges, unary, torch.amax)[-1].max()
    return log_z, (ahead + behind - log_z).exp(), best


def peaked_chain(sites, states, scale, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    edges = (torch.randn(sites - 1, states, states, generator=generator) * scale).to(dtype)
    unary = (torch.randn(sites, states, generator=generator) * scale).to(dtype)
    graph = topologies.chain(sites, states, tie=None)
    names = tuple(f"x{i}" for i in range(sites))
    tables = {name: edge for name, edge in zip(graph.factors, edges, strict=True)}
    return graph, {**tables, names: unary}, edges, unary


@pytest.mark.parametrize("scale", [1.0, 10.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("sites", [2, 3, 128])
def test_peaked_chains_in_float32(sites, scale):
    graph, tables, edges, unary = peaked_chain(sites, 8, scale)
    plan = compile(graph)
    log_z, beliefs, best = chain_truth(edges, unary)
    found = log_partition(plan, tables)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(log_z.item(), rel=1e-5)
    nodes = marginals(plan, tables)
    for i in range(sites):
        torch.testing.assert_close(nodes[f"x{i}"].double(), beliefs[i], rtol=0, atol=max(1e-4, 1e-5 * scale))
        assert nodes[f"x{i}"].sum().item() == pytest.approx(1.0, abs=1e-5)
    assert log_score(plan, tables, mode(plan, tables)).item() == pytest.approx(best.item(), rel=1e-5)
    assert torch.isfinite(entropy(plan, tables))
    draws = log_score(plan, tables, sample(plan, tables, (20,), generator=torch.Generator().manual_seed(0)))
    assert torch.isfinite(draws).all()
    assert (draws <= best.item() * (1 + 1e-5 * math.copysign(1, best.item()))).all()


@pytest.mark.parametrize("scale", [30.0, 100.0])
def test_peaked_gradients_in_float32(scale):
    graph, tables, edges, unary = peaked_chain(64, 8, scale, seed=2)
    names = next(key for key in tables if isinstance(key, tuple))
    leaf = tables[names].clone().requires_grad_()
    log_partition(compile(graph), {**tables, names: leaf}).backward()
    torch.testing.assert_close(leaf.grad.double(), chain_truth(edges, unary)[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_peaked_gradients_of_tables_sum_to_one_in_float32(scale):
    graph, tables, *_ = peaked_chain(64, 8, scale, seed=3)
    leaves = {key: table.clone().requires_grad_() for key, table in tables.items()}
    log_partition(compile(graph), leaves).backward()
    for name in graph.factors:
        assert leaves[name].grad.sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("scale", [30.0, 100.0])
def test_peaked_tied_hidden_markov_model_in_float32(scale):
    """One shared peaked transition and emission: where normalising by the largest entry is not enough."""
    generator = torch.Generator().manual_seed(1)
    sites, states, vocab = 64, 6, 5
    tables = {
        "initial": torch.randn(states, generator=generator) * scale,
        "emission": torch.randn(states, vocab, generator=generator) * scale,
        "transition": torch.randn(states, states, generator=generator) * scale,
    }
    tokens = tuple(f"x{i}" for i in range(sites))
    tables[tokens] = torch.randn(sites, vocab, generator=generator) * scale
    unary = (tables["emission"].double() + tables[tokens].double()[:, None, :]).logsumexp(-1)
    unary[0] += tables["initial"].double()
    edges = tables["transition"].expand(sites - 1, states, states)
    log_z, beliefs, _ = chain_truth(edges, unary)
    plan = compile(topologies.hidden_markov(sites, vocab, states))
    assert log_partition(plan, tables).item() == pytest.approx(log_z.item(), rel=1e-5)
    nodes = marginals(plan, tables)
    for i in range(sites):
        torch.testing.assert_close(nodes[f"z{i}"].double(), beliefs[i], rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [30.0, 100.0])
@pytest.mark.parametrize("seed", range(6))
def test_peaked_random_forests_in_float32(seed, scale):
    graph = testing.random_forest(seed, connectivity=1.0)
    tables = testing.random_log_potentials(
        graph, (3,), dtype=torch.float32, scale=scale, evidence=0.5, seed=seed
    )
    plan, truth = compile(graph), testing.brute_log_partition(graph, tables)
    torch.testing.assert_close(log_partition(plan, tables).double(), truth, rtol=1e-5, atol=1e-4)
    expected = testing.brute_marginals(graph, tables)
    for key, table in marginals(plan, tables).items():
        torch.testing.assert_close(table.double(), expected[key], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [-400.0, -1e4, -math.inf])
def test_three_node_contradiction(dtype, apart):
    """State 0 costs exp(-200) at one end, state 1 exp(-150) at the other: the answer is exp(-150)."""
    edge = torch.tensor([[0.0, apart], [apart, 0.0]], dtype=dtype)
    tables = {
        "edge": edge,
        "x0": torch.tensor([0.0, -150.0], dtype=dtype),
        "x2": torch.tensor([-200.0, 0.0], dtype=dtype),
    }
    plan = compile(topologies.chain(3, 2))
    assert log_partition(plan, tables).item() == pytest.approx(-150.0, rel=1e-6)
    assert [value.item() for value in mode(plan, tables).values()] == [1, 1, 1]
    assert [value.item() for value in sample(plan, tables).values()] == [1, 1, 1]
    for name in ("x0", "x1", "x2"):
        torch.testing.assert_close(marginals(plan, tables)[name], torch.tensor([0.0, 1.0], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contradiction_in_a_tree_and_in_a_ternary_factor(dtype):
    """Three leaves each rule out the favourite of the hub by more than float32 exp can hold."""
    graph = topologies.star(4, 3, tie="edge")
    edge = torch.full((3, 3), -300.0, dtype=dtype).fill_diagonal_(0.0)
    tables = {"edge": edge}
    for i, favourite in ((1, 0), (2, 1), (3, 2)):
        tables[f"x{i}"] = torch.full((3,), -120.0 - i, dtype=dtype).index_fill(
            0, torch.tensor(favourite), 0.0
        )
    plan = compile(graph)
    truth = testing.brute_log_partition(graph, tables)
    torch.testing.assert_close(log_partition(plan, tables).double(), truth, rtol=1e-6, atol=1e-5)
    expected = testing.brute_marginals(graph, tables)
    for key, table in marginals(plan, tables).items():
        torch.testing.assert_close(table.double(), expected[key], rtol=0, atol=1e-5)

    triple = topologies.independent(3, 2)
    triple.add_factor(("x0", "x1", "x2"), name="f")
    table = torch.full((2, 2, 2), -500.0, dtype=dtype)
    table[0, 0, 0] = table[1, 1, 1] = 0.0
    tables = {"f": table}
    tables["x0"] = torch.tensor([0.0, -170.0], dtype=dtype)
    tables["x1"] = torch.tensor([-100.0, 0.0], dtype=dtype)
    tables["x2"] = torch.tensor([-110.0, 0.0], dtype=dtype)
    assert log_partition(compile(triple), tables).item() == pytest.approx(-170.0, rel=1e-6)


@pytest.mark.parametrize("shift", [-1e6, -1e5, 1e5, 1e6])
def test_a_uniform_shift_changes_nothing_but_the_partition(shift):
    """Where a semiring's zero of -1e5 is silently wrong."""
    graph = topologies.hidden_markov(4, 3, 3)
    plain = testing.random_log_potentials(graph, seed=0)
    moved = {key: table + shift for key, table in plain.items()}
    plan = compile(graph)
    factors = len(graph.factors)
    torch.testing.assert_close(log_partition(plan, moved), log_partition(plan, plain) + factors * shift)
    torch.testing.assert_close(entropy(plan, moved), entropy(plan, plain), rtol=1e-7, atol=1e-7)
    assert {k: v.item() for k, v in mode(plan, moved).items()} == {
        k: v.item() for k, v in mode(plan, plain).items()
    }


# -- 10,000 sites ----------------------------------------------------------------------------------

LONG = 10_000


@pytest.fixture(scope="module")
def long_chain():
    generator = torch.Generator().manual_seed(0)
    tokens = tuple(f"x{i}" for i in range(LONG))
    edge, unary = torch.randn(8, 8, generator=generator), torch.randn(LONG, 8, generator=generator)
    return compile(topologies.chain(LONG, 8)), {"edge": edge, tokens: unary}, edge, unary, tokens


@pytest.mark.slow
@pytest.mark.ci
def test_ten_thousand_sites_in_float32(long_chain):
    plan, tables, edge, unary, tokens = long_chain
    log_z, beliefs, best = chain_truth(edge.expand(LONG - 1, 8, 8), unary)
    assert log_partition(plan, tables).item() == pytest.approx(log_z.item(), rel=1e-6)
    assert log_score(plan, tables, mode(plan, tables)).item() == pytest.approx(best.item(), rel=1e-6)
    torch.testing.assert_close(marginals(plan, tables)[tokens].double(), beliefs, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.ci
def test_gradient_of_ten_thousand_sites(long_chain):
    plan, tables, edge, *_ = long_chain
    leaf = edge.clone().requires_grad_()
    log_partition(plan, {**tables, "edge": leaf}).backward()
    assert leaf.grad.sum().item() == pytest.approx(LONG - 1, rel=1e-5)


def test_long_scores_and_modes():
    """Log-probabilities of a large vocabulary are about -10 each: a running float32 total of them loses digits."""
    generator, sites = torch.Generator().manual_seed(0), 3000
    tokens = tuple(f"x{i}" for i in range(sites))
    tables = {"edge": torch.randn(8, 8, generator=generator) - 20}
    tables[tokens] = torch.randn(sites, 8, generator=generator) - 20
    double = {key: table.double() for key, table in tables.items()}
    plan = compile(topologies.chain(sites, 8))
    best, found = mode(plan, double), mode(plan, tables)
    truth = log_score(plan, double, best).item()
    assert log_score(plan, double, found).item() == pytest.approx(truth, abs=1e-3)
    assert log_score(plan, tables, best).item() == pytest.approx(truth, rel=1e-6)


def test_results_have_the_dtype_of_the_tables():
    graph = topologies.hidden_markov(3, 3, 2)
    for dtype in (torch.float32, torch.float64):
        tables = testing.random_log_potentials(graph, dtype=dtype)
        assert log_partition(compile(graph), tables).dtype == dtype
        assert entropy(compile(graph), tables).dtype == dtype
        assert {table.dtype for table in marginals(compile(graph), tables).values()} == {dtype}
