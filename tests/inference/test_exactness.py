"""Hundreds of random forests: every query equals enumeration to 1e-9."""

import networkx as nx
import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.graphs import FactorGraph
from codd_ppl.inference import entropy, log_partition, log_score, marginals, mode, sample

SHAPES = [(), (3,), (2, 3), (0,), (1,)]
SEEDS = range(300)


def case(seed: int):
    """A random forest, its plan and potentials; every fifth one with mixed batches, every second with -inf."""
    graph = testing.random_forest(seed, max_order=4 if seed % 7 == 0 else 3, max_joint=1024)
    tables = testing.random_log_potentials(
        graph,
        SHAPES[seed % 4],
        infinite=0.25 if seed % 2 else 0.0,
        scale=5.0 if seed % 3 == 0 else 1.0,
        evidence=0.5,
        mixed=seed % 5 == 0,
        seed=seed,
    )
    if not tables:  # nothing to read a dtype from: give one variable a table
        name, variable = next(iter(graph.variables.items()))
        tables[name] = torch.zeros(variable.cardinality, dtype=torch.float64)
    return graph, compile(graph), tables


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_without_any_table_results_are_in_float32():
    graph = FactorGraph()
    for i, card in enumerate((3, 4)):
        graph.add_variable(f"x{i}", card)
    plan = compile(graph)
    assert log_partition(plan, {}).dtype == torch.float32
    assert log_partition(plan, {}).item() == pytest.approx(
        testing.brute_log_partition(graph, {}).item(), rel=1e-6
    )
    assert entropy(plan, {}).item() == pytest.approx(testing.brute_entropy(graph, {}).item(), rel=1e-6)
    assert marginals(plan, {})["x1"].tolist() == [0.25] * 4


@pytest.mark.parametrize("seed", SEEDS)
def test_every_query(seed):
    graph, plan, tables = case(seed)
    before = {key: table.clone() for key, table in tables.items()}

    truth = testing.brute_log_partition(graph, tables)
    close(log_partition(plan, tables), truth)

    found, expected = marginals(plan, tables), testing.brute_marginals(graph, tables)
    assert set(found) >= set(tables) | set(graph.variables)
    for key, table in found.items():
        wanted = expected[key]
        close(table, wanted.expand(table.shape) if table.shape != wanted.shape else wanted)
    alone = marginals(plan, tables, factors=False)
    assert set(graph.variables) <= set(alone) <= set(found) - (set(graph.factors) - set(graph.variables))
    assert all(torch.equal(alone[name], found[name]) for name in graph.variables)

    best, _ = testing.brute_mode(graph, tables)
    winner = mode(plan, tables)
    assert set(winner) == set(graph.variables)
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


@pytest.mark.parametrize("seed", range(60))
def test_sample_frequencies(seed):
    graph, plan, tables = case(seed)
    draws = sample(plan, tables, (3000,), generator=torch.Generator().manual_seed(seed))
    if testing.brute_log_partition(graph, tables).numel():
        assert testing.sample_p_value(graph, tables, draws) > 1e-4


@pytest.mark.parametrize("seed", range(100))
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


# -- larger trees, against leaf elimination in log space -------------------------------------------


def eliminate(graph: FactorGraph, tables: dict) -> torch.Tensor:
    """Log-partition of a pairwise forest by removing one leaf at a time (plain autograd, any size)."""
    links, messages = nx.Graph(), {}
    links.add_nodes_from(graph.variables)
    for name, variable in graph.variables.items():
        messages[name] = tables.get(name, torch.zeros(variable.cardinality, dtype=torch.float64))
    for factor in graph.factors.values():
        links.add_edge(*factor.scope, factor=factor)
    total = torch.zeros((), dtype=torch.float64)
    leaves = [name for name in links if links.degree(name) <= 1]
    while leaves:
        leaf = leaves.pop()
        if leaf not in links:
            continue
        if links.degree(leaf) == 0:
            total = total + messages[leaf].logsumexp(-1)
        else:
            (parent,) = links[leaf]
            factor = links.edges[leaf, parent]["factor"]
            table = tables[factor.name if factor.name in tables else factor.tie]
            table = table if factor.scope[0] == parent else table.mT
            messages[parent] = messages[parent] + (table + messages[leaf]).logsumexp(-1)
            if links.degree(parent) == 2:
                leaves.append(parent)
        links.remove_node(leaf)
    for name in links:
        raise AssertionError(f"{name} was never eliminated")
    return total


@pytest.mark.parametrize("kind", ["random", "path", "balanced", "star", "caterpillar", "forest"])
def test_larger_trees(kind):
    source = {
        "random": lambda: nx.random_labeled_tree(200, seed=1),
        "path": lambda: nx.path_graph(200),
        "balanced": lambda: nx.balanced_tree(3, 4),
        "star": lambda: nx.star_graph(150),
        "caterpillar": lambda: nx.Graph([(i, i + 1) for i in range(50)] + [(i, 100 + i) for i in range(50)]),
        "forest": lambda: nx.disjoint_union_all([nx.random_labeled_tree(n, seed=n) for n in (1, 2, 30, 60)]),
    }[kind]()
    rng = torch.Generator().manual_seed(3)
    for node in source:
        source.nodes[node]["cardinality"] = int(torch.randint(1, 6, (), generator=rng))
    graph = FactorGraph.from_networkx(source)
    tables = testing.random_log_potentials(graph, scale=3.0, infinite=0.1, evidence=0.5, seed=7)
    leaves = {key: table.clone().requires_grad_() for key, table in tables.items()}
    plan = compile(graph)
    value, truth = log_partition(plan, leaves), eliminate(graph, leaves)
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-9)
    keys = list(leaves)
    found = torch.autograd.grad(value, [leaves[key] for key in keys])
    safe = {key: table.clone().clamp_min(-1e4).requires_grad_() for key, table in tables.items()}
    expected = torch.autograd.grad(eliminate(graph, safe), [safe[key] for key in keys])
    for key, a, b in zip(keys, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")
    beliefs = marginals(plan, tables)
    for key, b in zip(keys, expected, strict=True):
        torch.testing.assert_close(beliefs[key], b, rtol=1e-8, atol=1e-8)
    winner = mode(plan, tables)
    draws = sample(plan, tables, (50,), generator=torch.Generator().manual_seed(0))
    assert (log_score(plan, tables, draws) <= log_score(plan, tables, winner) + 1e-9).all()
    assert torch.isfinite(log_score(plan, tables, draws)).all()


def test_large_cardinalities():
    graph = FactorGraph()
    for name, card in (("x0", 301), ("z0", 70), ("x1", 5), ("x2", 257)):
        graph.add_variable(name, card)
    graph.add_factor(("x0", "z0"))
    graph.add_factor(("z0", "x1"))
    graph.add_factor(("x2", "z0"))
    tables = testing.random_log_potentials(graph, (2,), scale=3.0, infinite=0.3, evidence=1.0, seed=0)
    plan = compile(graph)
    hub = tables["z0"]
    hub = hub + (tables["x0,z0"] + tables["x0"][..., None]).logsumexp(-2)
    hub = hub + (tables["z0,x1"] + tables["x1"][..., None, :]).logsumexp(-1)
    hub = hub + (tables["x2,z0"] + tables["x2"][..., None]).logsumexp(-2)
    torch.testing.assert_close(log_partition(plan, tables), hub.logsumexp(-1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(marginals(plan, tables)["z0"], hub.softmax(-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("root_first", [True, False])
def test_the_answer_does_not_depend_on_order_or_orientation(root_first):
    """The same star declared from the hub and from the leaves, scopes turned round."""
    names = ["x0", "x1", "x2", "x3"] if root_first else ["x3", "x2", "x1", "x0"]
    graph, tables = FactorGraph(), {}
    rng = torch.Generator().manual_seed(0)
    weights = {i: torch.randn(3, 3, generator=rng, dtype=torch.float64) for i in (1, 2, 3)}
    for name in names:
        graph.add_variable(name, 3)
    for i in (1, 2, 3) if root_first else (3, 2, 1):
        scope = ("x0", f"x{i}") if root_first else (f"x{i}", "x0")
        graph.add_factor(scope, name=f"f{i}")
        tables[f"f{i}"] = weights[i] if root_first else weights[i].mT
    expected = sum(weights[i].logsumexp(-1) for i in (1, 2, 3))
    close(log_partition(compile(graph), tables), expected.logsumexp(-1))
    close(marginals(compile(graph), tables)["x0"], expected.softmax(-1))
