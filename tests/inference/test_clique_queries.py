"""Every query beyond the basic six on graphs with loops, with stacked tables of factors, against enumeration."""

import math
import random
import warnings

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import LoopyBeliefPropagation, compile
from codd_ppl.errors import IntractableError
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.inference import (
    condition,
    cross_entropy,
    entropy,
    expectation,
    k_best,
    kl,
    log_partition,
    log_prob,
    log_score,
    marginal,
    marginals,
    pad,
    unpad,
)

INF = math.inf
SHAPES = [(), (3,), (2, 2), (0,), (1,)]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def random_tables(graph, shape, rng, infinite=0.0):
    """Log-potentials, some of them stacked under tuples of factors or of variables; all values 0 stay possible."""
    generator = torch.Generator().manual_seed(rng.randrange(10**6))

    def table(*event, order):
        log = torch.randn(*rng.choice([(), shape]), *event, generator=generator, dtype=torch.float64)
        dead = torch.rand(log.shape, generator=generator) < infinite
        dead[(..., *[0] * order)] = False
        return log.masked_fill(dead, -INF)

    tables = {}
    groups: dict = {}
    for name, factor in graph.factors.items():
        if factor.tie is None or rng.random() < 0.4:
            groups.setdefault(graph.shape(name), []).append(name)
    for event, names in groups.items():
        rng.shuffle(names)
        stacked = tuple(names[: rng.randint(0, len(names))])
        if stacked:
            tables[stacked] = table(len(stacked), *event, order=len(event))
        tables |= {name: table(*event, order=len(event)) for name in names[len(stacked) :]}
    for tie, names in graph.ties.items():
        tables[tie] = table(*graph.shape(names[0]), order=len(graph.shape(names[0])))
    size = next(iter(graph)).cardinality
    alike = tuple(v.name for v in graph if v.cardinality == size)
    return tables | {alike: table(len(alike), size, order=1)}


def case(seed, infinite=None):
    """A loopy graph, its plan, log-potentials, their batch shape, and random numbers."""
    rng = random.Random(seed)
    graph = testing.random_loopy_graph(seed, treewidth=2 + seed % 2, variables=6, max_joint=300)
    infinite = rng.choice([0.0, 0.3]) if infinite is None else infinite
    tables = random_tables(graph, SHAPES[seed % 5], rng, infinite)
    plan = compile(graph)
    assert plan.route == "clique contraction" and any(isinstance(key, tuple) for key in tables)
    return graph, plan, tables, testing.brute_log_partition(graph, tables).shape, rng


def values_of(graph, names, shape, rng, lowest=0):
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    cards = {v.name: v.cardinality for v in graph}
    return {name: torch.randint(lowest, cards[name], shape, generator=generator) for name in names}


@pytest.mark.parametrize("seed", range(20))
def test_marginal_and_log_prob(seed):
    graph, plan, tables, batch, rng = case(seed)
    names = list(graph.variables)
    for size in {0, 1, 2, len(names)}:
        chosen = rng.sample(names, size)
        close(marginal(plan, tables, chosen), testing.brute_marginal(graph, tables, chosen))
        given = values_of(graph, chosen, (2, *batch), rng)
        close(log_prob(plan, tables, given), testing.brute_log_prob(graph, tables, given))
    scope = rng.choice(list(graph.factors.values())).scope
    close(marginal(plan, tables, scope[::-1]), testing.brute_marginal(graph, tables, scope[::-1]))


@pytest.mark.parametrize("seed", range(20))
def test_condition(seed):
    graph, plan, tables, batch, rng = case(seed)
    names = list(graph.variables)
    hard = values_of(graph, rng.sample(names, 2), batch, rng, lowest=-1)
    soft = {
        name: torch.randn(graph.variables[name].cardinality).double()
        for name in {names[0], rng.choice(names)}
    }
    given = condition(plan, tables, hard, soft)
    truth = testing.brute_condition(graph, tables, hard, soft)
    close(log_partition(plan, given), truth.flatten(len(batch)).logsumexp(-1).expand(batch))
    assert set(given) >= set(tables)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.slow
@pytest.mark.ci
def test_divergences_and_expectations(seed):
    graph, plan, p, batch, rng = case(seed, infinite=0.2)
    q = {key: table + torch.randn_like(table) for key, table in p.items()}  # impossible where p is
    full = random_tables(graph, rng.choice([(), batch]), rng)
    for a, b in [(p, q), (p, full), (full, p), (full, full)]:
        close(kl(plan, a, b).expand(batch), testing.brute_kl(graph, a, b).expand(batch))
        close(cross_entropy(plan, a, b).expand(batch), testing.brute_cross_entropy(graph, a, b).expand(batch))
    close(cross_entropy(plan, p, p), entropy(plan, p))
    close(expectation(plan, p, full), testing.brute_expectation(graph, p, full).expand(batch))
    close(expectation(plan, p, p), log_partition(plan, p) - entropy(plan, p))


def assert_k_best(graph, plan, tables, k):
    scores, values = k_best(plan, tables, k)
    close(scores, testing.brute_k_best(graph, tables, k))
    found = torch.stack([values[name] for name in graph.variables], -1)
    assert found.dtype == torch.int64 and found.shape[:-1] == scores.shape
    dead = scores == -INF
    assert bool((found[dead] == -1).all()) and bool((found[~dead] >= 0).all())
    given = {name: value.clamp(min=0).movedim(-1, 0) for name, value in values.items()}
    close(torch.where(dead, scores, log_score(plan, tables, given).movedim(0, -1)), scores)
    for row, possible in zip(found.reshape(-1, k, len(graph)), ~dead.reshape(-1, k), strict=True):
        assert len(row[possible].unique(dim=0)) == int(possible.sum()), "an assignment comes twice"


@pytest.mark.parametrize("k", [1, 2, 9])
@pytest.mark.parametrize("seed", range(12))
def test_k_best(seed, k):
    graph, plan, tables, _, _ = case(seed)
    assert_k_best(graph, plan, tables, k)


@pytest.mark.parametrize("seed", range(6))
def test_k_best_of_ties_and_of_more_than_are_possible(seed):
    graph, plan, tables, _, _ = case(seed, infinite=0.5)
    rounded = {key: table.round() for key, table in tables.items()}
    assert_k_best(graph, plan, rounded, 30)
    ring = compile(topologies.grid(2, 2, 2))
    equal = {"right": torch.eye(2).double().log(), "down": torch.zeros(2, 2).double()}
    scores, values = k_best(ring, equal, 6)  # x0 = x1 and x2 = x3
    assert scores.tolist() == [0.0] * 4 + [-INF] * 2 and values["x0"].tolist()[4:] == [-1, -1]
    dead = equal | {"x0": torch.full((3, 2), -INF).double()}
    scores, values = k_best(ring, dead, 2)
    assert bool((scores == -INF).all()) and all(bool((v == -1).all()) for v in values.values())


def smaller(graph, tables, on, batch, index):
    """The graph of the active variables of one batch element, and its log-potentials."""
    few, own = FactorGraph(), {}
    for v in graph:
        if v.name in on:
            few.add_variable(v.name, v.cardinality, v.latent)
    for f in graph.factors.values():
        if set(f.scope) <= on:
            few.add_factor(f.scope, tie=f.tie, name=f.name)
    for key, table in tables.items():
        rows = isinstance(key, tuple)
        first = key[0] if rows else graph.ties.get(key, (key,))[0]
        order = (1 if first in graph.variables else graph.factors[first].order) + rows
        here = table.expand(*batch, *table.shape[table.dim() - order :])[index]
        kept = [n for n in key if n in few.variables or n in few.factors] if rows else []
        if kept:
            own[tuple(kept)] = here[[key.index(n) for n in kept]]
        elif not rows and (key in few.factors or key in few.ties):
            own[key] = here
    return few, own


@pytest.mark.parametrize("seed", range(20))
def test_padding_is_a_smaller_graph(seed):
    graph, plan, tables, batch, _ = case(seed)
    batch = batch or (2,)
    active = torch.rand(*batch, len(graph), generator=torch.Generator().manual_seed(seed)) < 0.7
    padded = pad(plan, tables, active)
    total, clean = log_partition(plan, padded), unpad(plan, marginals(plan, padded), tables, active)
    assert total.shape == batch and set(clean) == set(tables) | set(graph.variables)
    for flat in range(total.numel()):
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), batch))
        on = {n for n, yes in zip(graph.variables, active[index].tolist(), strict=True) if yes}
        few, own = smaller(graph, tables, on, batch, index)
        if not on:
            assert total[index] == 0
            continue
        close(total[index], testing.brute_log_partition(few, own))
        leaves = {key: table.clone().requires_grad_() for key, table in own.items()}
        score = testing.brute_log_partition(few, leaves)
        gradients = (
            torch.autograd.grad(score, list(leaves.values()), materialize_grads=True) if leaves else ()
        )
        truth: dict = testing.brute_marginals(few, own) | dict(zip(leaves, gradients, strict=True))
        for key, table in clean.items():
            inside = tuple(n for n in key if n in few.variables or n in few.factors)
            if isinstance(key, str):
                close(table[index], truth.get(key, torch.zeros_like(table[index])))
                continue
            for i, name in enumerate(key):
                row = (
                    truth[inside][inside.index(name)] if name in inside else torch.zeros_like(table[index][i])
                )
                close(table[index][i], row)


QUERIES = {
    "marginal": lambda plan, tables: marginal(plan, tables, ["x0", "x3"]),
    "log_prob": lambda plan, tables: log_prob(plan, tables, {"x0": torch.tensor(0)}),
    "kl": lambda plan, tables: kl(plan, tables, tables),
    "cross_entropy": lambda plan, tables: cross_entropy(plan, tables, tables),
    "k_best": lambda plan, tables: k_best(plan, tables, 2),
}


@pytest.mark.parametrize("query", QUERIES)
def test_an_approximation_has_none_of_them(query):
    graph = topologies.grid(2, 2, 2)
    plan = compile(graph, approximate=LoopyBeliefPropagation())
    with pytest.raises(
        IntractableError, match=rf"{query}.* is not defined .*LoopyBeliefPropagation.*compile"
    ):
        QUERIES[query](plan, testing.random_log_potentials(graph))


def stacked_grid():
    """A grid without ties, its tables under one key, and evidence for four sequences."""
    graph = topologies.grid(2, 3, 2, tie=False)
    names, generator = tuple(graph.factors), torch.Generator().manual_seed(0)
    tables = torch.randn(len(names), 2, 2, generator=generator, dtype=torch.float64)
    evidence = torch.randn(4, 6, 2, generator=generator, dtype=torch.float64)
    return compile(graph), graph, names, tables, evidence


FUNCTIONS = {
    "log_prob": lambda plan, t: log_prob(plan, t, {"x0": torch.tensor(1), "x4": torch.tensor(0)}),
    "marginal": lambda plan, t: marginal(plan, t, ["x5", "x0"])[..., 0, 1],
    "kl": lambda plan, t: kl(plan, t, {key: 0.5 * table for key, table in t.items()}),
    "expectation": lambda plan, t: expectation(plan, t, {"x1": torch.arange(2.0, dtype=torch.float64)}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms(name):
    """torch.func's vmap is the batch, its grad is autograd's, and a caller may be compiled."""
    plan, graph, names, tables, evidence = stacked_grid()

    def function(table, rows):
        return FUNCTIONS[name](plan, {names: table, graph.tokens: rows})

    expected = function(tables, evidence)
    close(torch.func.vmap(function, in_dims=(None, 0))(tables, evidence), expected)
    leaf = tables.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf, evidence).sum(), leaf)
    close(torch.func.grad(lambda t: function(t, evidence).sum())(tables), gradient)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = torch.compile(lambda t: function(2 * t, evidence).sum(), backend="eager")
        (found,) = torch.autograd.grad(compiled(leaf), leaf)
    close(found, torch.autograd.grad(function(2 * leaf, evidence).sum(), leaf)[0])


@pytest.mark.parametrize("graph", [topologies.grid(2, 2, 3), topologies.chain(4, 3)], ids=["grid", "chain"])
def test_vmap_over_values_and_of_rankings(graph):
    plan, tables = compile(graph), testing.random_log_potentials(graph, seed=0)
    values = torch.tensor([0, 2, 1, 0, 2])
    each = [log_prob(plan, tables, {"x1": value}) for value in values]
    close(torch.func.vmap(lambda value: log_prob(plan, tables, {"x1": value}))(values), torch.stack(each))
    evidence = torch.randn(5, 3, dtype=torch.float64)
    scores = torch.func.vmap(lambda row: k_best(plan, {**tables, "x0": row}, 4)[0])(evidence)
    close(scores, k_best(plan, {**tables, "x0": evidence}, 4)[0])
