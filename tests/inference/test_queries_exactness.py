"""Hundreds of random forests: the queries over subsets, evidence and pairs of distributions equal enumeration."""

import math
import random

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.graphs import topologies
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
)

INF = math.inf
SHAPES = [(), (3,), (2, 2), (0,), (1,)]


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **({"rtol": 1e-9, "atol": 1e-9} | tolerance))


def case(seed, **options):
    """A forest with factors of order up to 4, its plan, and potentials: batched or not, with -inf or without."""
    rng = random.Random(seed)
    graph = testing.random_forest(seed, variables=6, max_order=rng.choice([2, 3, 4]), max_joint=300)
    shape = SHAPES[seed % len(SHAPES)]
    options = {"infinite": rng.choice([0.0, 0.3]), "evidence": 0.4, "mixed": rng.random() < 0.5} | options
    tables = testing.random_log_potentials(graph, shape, seed=seed, scale=rng.choice([1.0, 5.0]), **options)
    if seed % 3 == 0:  # evidence stacked under a tuple key, for variables that may have some of their own
        size = rng.choice([v.cardinality for v in graph])
        names = tuple(v.name for v in graph if v.cardinality == size)
        tables[names] = torch.randn(len(names), size, dtype=torch.float64)
    return graph, compile(graph), tables or uniform(graph), rng


def uniform(graph):
    """Something in float64 for a graph without factors: no tensor at all would mean float32."""
    first = next(iter(graph))
    return {first.name: torch.zeros(first.cardinality, dtype=torch.float64)}


def values_of(graph, names, shape, rng, lowest=0):
    cards = {v.name: v.cardinality for v in graph}
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    return {name: torch.randint(lowest, cards[name], shape, generator=generator) for name in names}


def batch_of(graph, tables):
    return testing.brute_log_partition(graph, tables).shape


@pytest.mark.parametrize("seed", range(60))
def test_marginal_of_any_subset(seed):
    graph, plan, tables, rng = case(seed)
    names = list(graph.variables)
    for size in {0, 1, 2, rng.randint(0, len(names)), len(names)}:
        chosen = rng.sample(names, min(size, len(names)))
        found = marginal(plan, tables, chosen)
        close(found, testing.brute_marginal(graph, tables, chosen))
    for factor in graph.factors.values():
        chosen = rng.sample(factor.scope, rng.randint(1, factor.order))
        close(marginal(plan, tables, chosen), testing.brute_marginal(graph, tables, chosen))


@pytest.mark.parametrize("seed", range(60))
def test_log_prob_of_a_partial_assignment(seed):
    graph, plan, tables, rng = case(seed)
    names = list(graph.variables)
    for sample in [(), (3,)]:
        chosen = rng.sample(names, rng.randint(0, len(names)))
        given = values_of(graph, chosen, (*sample, *batch_of(graph, tables)), rng)
        close(log_prob(plan, tables, given), testing.brute_log_prob(graph, tables, given))
    given = values_of(graph, names, (2, *batch_of(graph, tables)), rng)
    close(log_prob(plan, tables, given), log_score(plan, tables, given) - log_partition(plan, tables))


@pytest.mark.parametrize("seed", range(60))
def test_condition(seed):
    graph, plan, tables, rng = case(seed)
    copies = {key: table.clone() for key, table in tables.items()}
    names, batch = list(graph.variables), batch_of(graph, tables)
    observed = rng.sample(names, rng.randint(0, len(names)))
    hard = values_of(graph, observed, batch, rng, lowest=-1)
    soft = {
        name: torch.randn(*rng.choice([(), batch]), graph.variables[name].cardinality, dtype=torch.float64)
        for name in rng.sample(names, rng.randint(0, len(names)))
    }
    given = condition(plan, tables, hard, soft)
    close(
        testing.enumerate_log_joint(graph, given).expand(*batch, *(v.cardinality for v in graph)),
        testing.brute_condition(graph, tables, hard, soft),
    )
    assert set(given) >= set(tables)
    for key, table in tables.items():
        assert torch.equal(table, copies[key]), "an input was modified"
    close(log_partition(plan, given).expand(batch), testing.brute_log_partition(graph, given).expand(batch))


def assert_k_best(graph, plan, tables, k):
    scores, values = k_best(plan, tables, k)
    close(scores, testing.brute_k_best(graph, tables, k))
    found = torch.stack([values[name] for name in graph.variables], -1)
    assert found.dtype == torch.int64 and found.shape[:-1] == scores.shape
    dead = scores == -INF
    assert bool((found[dead] == -1).all()) and bool((found[~dead] >= 0).all())
    given = {name: value.clamp(min=0).movedim(-1, 0) for name, value in values.items()}
    again = testing.brute_log_score(graph, tables, given).movedim(0, -1)
    close(torch.where(dead, scores, again), scores)
    for row, possible in zip(found.reshape(-1, k, len(graph)), ~dead.reshape(-1, k), strict=True):
        kept = row[possible]
        assert len(kept.unique(dim=0)) == len(kept), "an assignment comes twice"


@pytest.mark.parametrize("k", [1, 2, 7, 400])
@pytest.mark.parametrize("seed", range(40))
def test_k_best(seed, k):
    graph, plan, tables, _ = case(seed)
    assert_k_best(graph, plan, tables, k)


@pytest.mark.parametrize("seed", range(60))
def test_divergences(seed):
    graph, plan, p, rng = case(seed, infinite=0.2)
    q = testing.random_log_potentials(graph, seed=seed, infinite=rng.choice([0.0, 0.2])) or uniform(graph)
    q = {key: table + torch.randn_like(table) for key, table in q.items()}  # the zeros of p, or none
    shape = batch_of(graph, p)
    for a, b in [(p, q), (q, p), (p, p)]:
        close(kl(plan, a, b).expand(shape), testing.brute_kl(graph, a, b).expand(shape))
        close(cross_entropy(plan, a, b).expand(shape), testing.brute_cross_entropy(graph, a, b).expand(shape))
    assert bool((kl(plan, p, p) == 0).all())
    close(cross_entropy(plan, p, p), entropy(plan, p))


@pytest.mark.parametrize("make", [topologies.independent, lambda n, c: topologies.skip_chain(n, c, [2])])
def test_divergences_from_nothing_said_are_in_the_other_ones_precision(make):
    """q = {}: independent variables, for which q is uniform; in float32 it would be off by 1e-8."""
    graph = make(4, 7)
    plan = compile(graph)
    scores = torch.randn(4, 7, dtype=torch.float64)
    flat = {name: torch.zeros(7, 7) for name, factor in graph.factors.items() if factor.order == 2}
    given = {graph.tokens: scores} | {name: table.double() for name, table in flat.items()}
    uniform = {name: table.double() for name, table in flat.items()}
    log_p = scores.log_softmax(-1)
    expected = (log_p.exp() * (log_p + math.log(7))).sum()
    for found in (kl(plan, given, uniform), kl(plan, given, flat)):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    expected = (-math.log(7) - log_p).mean(-1).sum()
    found = kl(plan, uniform, given)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("seed", range(60))
def test_expectation(seed):
    graph, plan, tables, rng = case(seed)
    batch = batch_of(graph, tables)
    statistics = {}
    for factor in graph.factors.values():  # under the factor's name, its tie's, both, or none
        for key in {factor.name, factor.tie}:
            if key is not None and rng.random() < 0.5:
                statistics[key] = torch.randn(*rng.choice([(), batch]), *graph.shape(factor.name)).double()
    for variable in graph:
        if rng.random() < 0.3 and variable.name not in graph.factors:
            statistics[variable.name] = torch.randn(variable.cardinality).double()
    close(
        expectation(plan, tables, statistics),
        testing.brute_expectation(graph, tables, statistics).expand(batch),
    )
    own = {f.name: tables[f.tie] for f in graph.factors.values() if f.tie is not None and rng.random() < 0.5}
    close(
        expectation(plan, {**tables, **own}, statistics),
        testing.brute_expectation(graph, tables, statistics).expand(batch),
    )
    close(expectation(plan, tables, tables), log_partition(plan, tables) - entropy(plan, tables))


def test_several_statistics_at_once():
    graph, plan, tables, _ = case(1, mixed=False)
    key = next(iter(tables))
    many = torch.randn(5, 1, *plan_shape(graph, key), dtype=torch.float64)
    found = expectation(plan, tables, {key: many})
    assert found.shape == (5, 3)
    for i in range(5):
        close(found[i], testing.brute_expectation(graph, tables, {key: many[i, 0]}))


def plan_shape(graph, key):
    factor = next((f for f in graph.factors.values() if key in (f.name, f.tie)), None)
    return (graph.variables[key].cardinality,) if factor is None else graph.shape(factor.name)


def test_p_and_q_may_have_other_keys():
    graph = topologies.hidden_markov(3, 3, 2)
    plan, p = compile(graph), testing.random_log_potentials(graph, (2,))
    q = {name: torch.randn(graph.shape(name), dtype=torch.float64) for name in graph.factors}
    q["x0", "x2"] = torch.randn(2, 3, dtype=torch.float64)
    for a, b in [(p, q), (q, p)]:
        close(kl(plan, a, b), testing.brute_kl(graph, a, b))
        close(cross_entropy(plan, a, b), testing.brute_cross_entropy(graph, a, b))


# -- derivatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.slow
@pytest.mark.ci
def test_derivatives(seed):
    graph, plan, tables, rng = case(seed * 5, infinite=0.0, mixed=False)  # unbatched
    keys, names = list(tables), list(graph.variables)
    chosen = rng.sample(names, min(2, len(names)))
    given = values_of(graph, chosen, (), rng)
    other = {key: table + 0.3 * torch.randn_like(table) for key, table in tables.items()}
    functions = {
        "marginal": lambda t: marginal(plan, t, chosen),
        "log_prob": lambda t: log_prob(plan, t, given),
        "condition": lambda t: log_partition(plan, condition(plan, t, given)),
        "k_best": lambda t: k_best(plan, t, 3)[0].masked_fill(k_best(plan, t, 3)[0] == -INF, 0.0),
        "kl": lambda t: kl(plan, t, other) + kl(plan, other, t),
        "cross_entropy": lambda t: cross_entropy(plan, t, other) + cross_entropy(plan, other, t),
        "expectation": lambda t: expectation(plan, t, other) + expectation(plan, other, t),
    }  # fmt: skip
    leaves = tuple(table.double().clone().requires_grad_() for table in tables.values())
    for name, function in functions.items():

        def of_leaves(*values, function=function):
            return function(dict(zip(keys, values, strict=True)))

        assert torch.autograd.gradcheck(of_leaves, leaves, fast_mode=True), name


def test_derivative_in_soft_evidence():
    graph, plan, tables, _ = case(1, infinite=0.0)
    name = next(iter(graph.variables))
    likelihood = torch.randn(3, graph.variables[name].cardinality, dtype=torch.float64, requires_grad=True)

    def function(soft):
        given = condition(plan, tables, soft={name: soft})
        return log_partition(plan, given), marginal(plan, given, list(graph.variables)[-2:])

    assert torch.autograd.gradcheck(function, (likelihood,), fast_mode=True)


def test_gradients_are_finite_where_something_is_impossible():
    graph, plan, tables, _ = case(1, infinite=0.4, mixed=False)
    leaves = {key: table.clone().requires_grad_() for key, table in tables.items()}
    soft = {key: torch.where(t.isinf(), -9.0, t.detach()) for key, t in leaves.items()}
    given = {next(iter(graph.variables)): torch.tensor(0)}
    results = [
        marginal(plan, leaves, list(graph.variables)[:2]).square().sum(),
        log_prob(plan, leaves, given).clamp(min=-99).sum(),
        kl(plan, leaves, soft).sum(),
        kl(plan, soft, leaves).sum(),  # +inf: its finite terms
        expectation(plan, leaves, leaves).sum(),
        k_best(plan, leaves, 2)[0].clamp(min=-99).sum(),
    ]
    for result in results:
        grads = torch.autograd.grad(result, list(leaves.values()), allow_unused=True)
        assert all(bool(g.isfinite().all()) for g in grads if g is not None)


def test_marginals_of_one_variable_agree_with_marginals():
    graph, plan, tables, _ = case(4)
    for name, table in marginals(plan, tables).items():
        if name in graph.variables:
            close(marginal(plan, tables, [name]), table)
