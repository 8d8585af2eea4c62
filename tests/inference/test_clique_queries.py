"""Graphs with loops: queries over subsets, evidence and pairs, ranking, padding, and tables under tuple keys."""

import math
import random
import warnings

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import LoopyBeliefPropagation, compile
from codd_ppl.errors import InfeasibleError, IntractableError, PotentialsError
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.inference import (
    clique_ranking,
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
    mode,
    pad,
    sample,
    unpad,
)

INF = math.inf
SHAPES = [(), (3,), (2, 2), (0,), (1,)]


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def stacked(graph, tables, rng):
    """The same tables, some of the factors' own ones under tuples, in an order of their own, beside those of ties."""
    tables, groups = dict(tables), {}
    for name, factor in graph.factors.items():
        if rng.random() < 0.7:
            groups.setdefault(graph.shape(name), []).append((name, tables.get(name, tables.get(factor.tie))))
    for shape, group in groups.items():
        rng.shuffle(group)
        rows = torch.broadcast_tensors(*(table for _, table in group))
        tables[tuple(name for name, _ in group)] = torch.stack(rows, -1 - len(shape))
        for name, _ in group:
            if rng.random() < 0.7:  # else a table of its own goes before the tuple's
                tables.pop(name, None)
    return tables


def case(seed, **options):
    """A graph with loops, its plan, log-potentials (-inf or not, batched or not, under tuples or not)."""
    rng = random.Random(seed)
    graph = testing.random_loopy_graph(seed, treewidth=2 + seed % 2, variables=5, max_joint=200)
    options = {"infinite": rng.choice([0.0, 0.3]), "evidence": 0.4, "mixed": rng.random() < 0.4} | options
    shape = options.pop("shape", SHAPES[seed % len(SHAPES)])
    tables = testing.random_log_potentials(graph, shape, seed=seed, scale=rng.choice([1.0, 5.0]), **options)
    if seed % 3:
        tables = stacked(graph, tables, rng)
    if seed % 3 == 1:
        size = rng.choice([v.cardinality for v in graph])
        names = tuple(v.name for v in graph if v.cardinality == size)
        tables[names] = torch.randn(len(names), size, dtype=torch.float64)
    plan = compile(graph)
    assert plan.route == "clique contraction"
    return graph, plan, tables, rng


def batch_of(graph, tables):
    """The batch shape, tables that no factor takes included."""
    shapes = []
    for key, table in tables.items():
        first = key[0] if isinstance(key, tuple) else key
        factor = next((f for f in graph.factors.values() if first in (f.name, f.tie)), None)
        order = 1 if factor is None else factor.order
        shapes.append(table.shape[: table.dim() - order - isinstance(key, tuple)])
    return torch.broadcast_shapes(*shapes)


def values_of(graph, names, shape, rng, lowest=0):
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    return {
        n: torch.randint(lowest, graph.variables[n].cardinality, shape, generator=generator) for n in names
    }


def some(graph, rng):
    return rng.sample(list(graph.variables), rng.randint(0, len(graph)))


# -- enumeration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_marginals_and_gradients_under_tuples(seed):
    graph, plan, tables, _ = case(seed)
    leaves = {key: table.clone().requires_grad_() for key, table in tables.items()}
    again = {key: table.clone().requires_grad_() for key, table in tables.items()}
    batch = batch_of(graph, tables)
    total, truth = log_partition(plan, leaves), testing.brute_log_partition(graph, again).expand(batch)
    close(total, truth)
    total.sum().backward()
    truth.sum().backward()
    for key, leaf in leaves.items():
        expected = again[key].grad
        close(leaf.grad, torch.zeros_like(leaf) if expected is None else expected)
    found = marginals(plan, tables)
    assert set(found) == set(tables) | set(graph.variables)
    one_by_one = {
        key: t.expand(*batch, *event_of(graph, key)).clone().requires_grad_() for key, t in tables.items()
    }
    testing.brute_log_partition(graph, one_by_one).sum().backward()
    for key, table in one_by_one.items():
        close(found[key], torch.zeros_like(table) if table.grad is None else table.grad)


def event_of(graph, key):
    if not isinstance(key, tuple):
        factor = next((f for f in graph.factors.values() if key in (f.name, f.tie)), None)
        return (graph.variables[key].cardinality,) if factor is None else graph.shape(factor.name)
    return (len(key), *event_of(graph, key[0]))


@pytest.mark.parametrize("seed", range(30))
def test_subsets(seed):
    graph, plan, tables, rng = case(seed)
    batch = batch_of(graph, tables)
    for _ in range(3):
        chosen = some(graph, rng)
        expected = testing.brute_marginal(graph, tables, chosen)
        event = expected.shape[expected.dim() - len(chosen) :]
        close(marginal(plan, tables, chosen), expected.expand((*batch, *event)))
        given = values_of(graph, chosen, rng.choice([(3, *batch), batch]), rng)
        expected = testing.brute_log_prob(graph, tables, given)
        close(log_prob(plan, tables, given), expected.expand(torch.broadcast_shapes(expected.shape, batch)))
    for factor in graph.factors.values():
        chosen = rng.sample(factor.scope, rng.randint(1, factor.order))
        expected = testing.brute_marginal(graph, tables, chosen)
        close(marginal(plan, tables, chosen), expected.expand((*batch, *expected.shape[-len(chosen) :])))
    given = values_of(graph, graph.variables, (2, *batch), rng)
    close(log_prob(plan, tables, given), log_score(plan, tables, given) - log_partition(plan, tables))


@pytest.mark.parametrize("seed", range(30))
def test_condition(seed):
    graph, plan, tables, rng = case(seed)
    batch = batch_of(graph, tables)
    hard = values_of(graph, some(graph, rng), batch, rng, lowest=-1)
    soft = {
        name: torch.randn(*rng.choice([(), batch]), graph.variables[name].cardinality, dtype=torch.float64)
        for name in some(graph, rng)
    }
    given = condition(plan, tables, hard, soft)
    whole = (*batch, *(v.cardinality for v in graph))
    expected = testing.brute_condition(graph, tables, hard, soft).expand(whole)
    close(testing.enumerate_log_joint(graph, given).expand(whole), expected)
    close(log_partition(plan, given), expected.flatten(len(batch)).logsumexp(-1))


@pytest.mark.parametrize("seed", range(30))
def test_divergences(seed):
    graph, plan, p, rng = case(seed, infinite=0.2)
    q = testing.random_log_potentials(graph, seed=seed, infinite=rng.choice([0.0, 0.2]))
    q = {key: table + torch.randn_like(table) for key, table in q.items()}  # the zeros of p, or none
    q = stacked(graph, q, rng) if seed % 2 else q
    batch = batch_of(graph, p)
    for a, b in [(p, q), (q, p), (p, p)]:
        close(kl(plan, a, b).expand(batch), testing.brute_kl(graph, a, b).expand(batch))
        close(cross_entropy(plan, a, b).expand(batch), testing.brute_cross_entropy(graph, a, b).expand(batch))
    close(cross_entropy(plan, p, p), entropy(plan, p))


@pytest.mark.parametrize("seed", range(30))
def test_expectation(seed):
    graph, plan, tables, rng = case(seed)
    batch = batch_of(graph, tables)
    statistics = stacked(graph, testing.random_log_potentials(graph, evidence=0.4, seed=seed + 1), rng)
    parts = [statistics, {key: table for key, table in statistics.items() if rng.random() < 0.5}]
    for part in parts:
        expected = testing.brute_expectation(graph, tables, part)
        close(expectation(plan, tables, part), expected.expand(batch))
    close(expectation(plan, tables, tables), log_partition(plan, tables) - entropy(plan, tables))


# -- ranking -------------------------------------------------------------------------------------------


def assert_k_best(graph, plan, tables, k):
    batch = batch_of(graph, tables)
    scores, values = k_best(plan, tables, k)
    close(scores, testing.brute_k_best(graph, tables, k).expand(*batch, k))
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


@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("seed", range(20))
def test_k_best(seed, k):
    graph, plan, tables, _ = case(seed)
    assert_k_best(graph, plan, tables, k)


@pytest.mark.parametrize("seed", range(10))
def test_k_beyond_what_is_possible(seed):
    """Few assignments are possible, and of them another number in each batch element."""
    graph, plan, tables, _ = case(seed, infinite=0.5, shape=(4,), mixed=False)
    assert_k_best(graph, plan, tables, 40)


def test_every_assignment_of_a_grid_in_slices(monkeypatch):
    graph = topologies.grid(2, 2, 2)
    tables = testing.random_log_potentials(graph, (3,), seed=0)
    assert_k_best(graph, compile(graph), tables, 20)
    monkeypatch.setattr(clique_ranking, "CHUNK", 50)
    assert_k_best(graph, compile(graph), tables, 20)


def test_ties_in_score_are_different_assignments():
    graph = topologies.grid(2, 2, 2)
    tables = {key: torch.zeros_like(t) for key, t in testing.random_log_potentials(graph).items()}
    assert_k_best(graph, compile(graph), tables, 20)


def test_an_impossible_element_has_no_best():
    graph = topologies.grid(2, 2, 2)
    tables = testing.random_log_potentials(graph, (2,), seed=0)
    tables["x1"] = torch.tensor([[0.0, 0.0], [-INF, -INF]], dtype=torch.float64)
    scores, values = k_best(compile(graph), tables, 3)
    assert scores.isfinite().tolist() == [[True] * 3, [False] * 3]
    assert all(value[1].tolist() == [-1] * 3 for value in values.values())


# -- padding -------------------------------------------------------------------------------------------


def taken_from(graph, tables):
    """Factor -> the key that its table comes from, and its place there."""
    places = {name: (key, i) for key in tables if isinstance(key, tuple) for i, name in enumerate(key)}
    return {
        name: (name, None) if name in tables else places.get(name, (factor.tie, None))
        for name, factor in graph.factors.items()
    }


def without(graph, tables, batch, index, active):
    """One batch element's log-potentials, a table for each factor: those that touch inactive variables are 0."""
    here = {key: t.expand(*batch, *event_of(graph, key))[index] for key, t in tables.items()}
    result, unary = {}, {v.name: torch.zeros(v.cardinality, dtype=torch.float64) for v in graph}
    for name, (key, place) in taken_from(graph, tables).items():
        table = here[key] if place is None else here[key][place]
        result[name] = table if active.issuperset(graph.factors[name].scope) else torch.zeros_like(table)
    for key, table in here.items():
        rows = zip(key, table, strict=True) if isinstance(key, tuple) else [(key, table)]
        for name, row in rows:
            if name in active:
                unary[name] = unary[name] + row
    for name in unary:
        if name not in active:
            unary[name][1:] = -INF
    return result | {(name,): row[None] for name, row in unary.items()}


@pytest.mark.parametrize("seed", range(20))
def test_padding(seed):
    graph, plan, tables, _ = case(seed, shape=(3,))
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(3, len(graph), generator=generator) < 0.6
    on[0], on[1] = True, False
    padded = pad(plan, tables, on)
    total, uncertainty, best = log_partition(plan, padded), entropy(plan, padded), k_best(plan, padded, 3)[0]
    raw = marginals(plan, padded)
    clean = unpad(plan, raw, tables, on)
    assert set(clean) == set(tables) | set(graph.variables)
    for i, row in enumerate(on.tolist()):
        active = {name for name, alive in zip(graph.variables, row, strict=True) if alive}
        own = without(graph, tables, (3,), (i,), active)
        close(total[i], testing.brute_log_partition(graph, own))
        close(uncertainty[i], testing.brute_entropy(graph, own))
        close(best[i], testing.brute_k_best(graph, own, 3))
        expected, sources = testing.brute_marginals(graph, own), taken_from(graph, tables)
        for key, table in clean.items():
            names = key if isinstance(key, tuple) else (key,)
            want = torch.zeros(len(names), *table.shape[1 + isinstance(key, tuple) :], dtype=torch.float64)
            for place, name in enumerate(names):
                if name in active:
                    want[place] = expected[name]
                for factor, source in sources.items():
                    alive = active.issuperset(graph.factors[factor].scope)
                    if alive and source == (key, place if isinstance(key, tuple) else None):
                        want[place] += expected[factor]
            close(table[i], want if isinstance(key, tuple) else want[0])


# -- transforms, numbers, errors -----------------------------------------------------------------------

GRAPH = topologies.grid(2, 3, 2)
PLAN = compile(GRAPH)
EVIDENCE = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TABLES = testing.random_log_potentials(GRAPH, seed=1)


def with_evidence(evidence, plan_tables=TABLES):
    return {**plan_tables, GRAPH.tokens: evidence}


@pytest.mark.parametrize(
    "query",
    [
        log_partition,
        entropy,
        lambda plan, tables: marginals(plan, tables)["x2"],
        lambda plan, tables: mode(plan, tables)["x3"],
        lambda plan, tables: log_score(plan, tables, mode(plan, tables)),
    ],
)
def test_vmap_is_the_batch(query):
    expected = query(PLAN, with_evidence(EVIDENCE))
    found = torch.func.vmap(lambda row: query(PLAN, with_evidence(row)))(EVIDENCE)
    close(found, expected)


def test_func_grad_is_the_marginals():
    truth = testing.brute_marginals(GRAPH, with_evidence(EVIDENCE))[GRAPH.tokens]
    found = torch.func.grad(lambda e: log_partition(PLAN, with_evidence(e)).sum())(EVIDENCE)
    close(found, truth)
    close(torch.func.vmap(torch.func.grad(lambda e: log_partition(PLAN, with_evidence(e))))(EVIDENCE), truth)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch itself
def test_func_jvp_and_hessian():
    def total(evidence):
        return log_partition(PLAN, with_evidence(evidence))

    row, along = EVIDENCE[0], torch.ones_like(EVIDENCE[0])
    _, slope = torch.func.jvp(total, (row,), (along,))
    close(slope, torch.tensor(6.0, dtype=torch.float64))
    found = torch.func.hessian(total)(row)
    expected = torch.autograd.functional.hessian(total, row)
    close(found, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_caller(backend):
    def loss(evidence):
        return log_partition(PLAN, with_evidence(2 * evidence)).tanh().sum() + evidence.sum()

    leaf = EVIDENCE.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        (found,) = torch.autograd.grad(torch.compile(loss, backend=backend)(leaf), leaf)
    close(found, torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.mark.parametrize("mixed", [False, True])
def test_an_empty_batch(mixed):
    tables = testing.random_log_potentials(GRAPH, (0,), evidence=0.5, seed=0) if not mixed else {
        **TABLES, GRAPH.tokens: EVIDENCE[:0]
    }  # fmt: skip
    q, zeros = testing.random_log_potentials(GRAPH, seed=2), {"x0": torch.zeros(0, dtype=torch.int64)}
    scores, values = k_best(PLAN, tables, 2)
    assert scores.shape == (0, 2) and all(value.shape == (0, 2) for value in values.values())
    for found in (
        log_partition(PLAN, tables),
        log_prob(PLAN, tables, zeros),
        kl(PLAN, tables, q),
        kl(PLAN, q, tables),
        cross_entropy(PLAN, tables, q),
        expectation(PLAN, tables, q),
        log_partition(PLAN, condition(PLAN, tables, zeros)),
        log_partition(PLAN, pad(PLAN, tables, torch.ones(0, 6, dtype=torch.bool))),
        mode(PLAN, tables)["x0"],
    ):
        assert found.shape == (0,)
    assert marginal(PLAN, tables, ["x0", "x5"]).shape == (0, 2, 2)
    assert sample(PLAN, tables, (3,))["x1"].shape == (3, 0)


def test_what_is_impossible_has_no_probabilities():
    bad = with_evidence(EVIDENCE)
    bad["x1"] = torch.zeros(4, 2, dtype=torch.float64)
    bad["x1"][2] = -INF
    for query in [
        lambda: marginal(PLAN, bad, ["x0", "x5"]),
        lambda: log_prob(PLAN, bad, {"x0": torch.tensor(0)}),
        lambda: kl(PLAN, bad, TABLES),
        lambda: cross_entropy(PLAN, TABLES, bad),
        lambda: expectation(PLAN, bad, {"x0": torch.zeros(2)}),
    ]:
        with pytest.raises(InfeasibleError, match=r"element \(2,\)"):
            query()


@pytest.mark.parametrize("value", [math.nan, INF])
def test_malformed_numbers(value):
    bad = {**TABLES, "x1": torch.tensor([0.0, value], dtype=torch.float64)}
    for query in (log_partition, marginals, mode, sample, entropy, lambda p, t: k_best(p, t, 2)):
        with pytest.raises(PotentialsError, match="'x1' holds"):
            query(PLAN, bad)


@pytest.mark.parametrize(
    "query",
    [
        lambda plan, t: k_best(plan, t, 2),
        lambda plan, t: kl(plan, t, t),
        lambda plan, t: cross_entropy(plan, t, t),
        lambda plan, t: marginal(plan, t, ["x0", "x5"]),
        lambda plan, t: log_prob(plan, t, {"x0": torch.tensor(0)}),
    ],
    ids=["k_best", "kl", "cross_entropy", "marginal", "log_prob"],
)
def test_beliefs_answer_no_such_query(query, request):
    name = request.node.callspec.id
    plan = compile(GRAPH, approximate=LoopyBeliefPropagation())
    with pytest.raises(
        IntractableError, match=f"{name} is not defined for a plan compiled with approximate="
    ):
        query(plan, TABLES)


@pytest.mark.parametrize("seed", range(10))
def test_beliefs_under_tuples_are_those_of_each_factor(seed):
    graph, _, tables, _ = case(seed, infinite=0.0, shape=(2,), mixed=False)
    plan = compile(graph, approximate=LoopyBeliefPropagation(iterations=3000, damping=0.7, tolerance=1e-6))
    sources = taken_from(graph, tables)
    own = {name: tables[k] if i is None else tables[k].select(-1 - graph.factors[name].order, i)
           for name, (k, i) in sources.items()}  # fmt: skip
    own |= {
        key: t for key, t in tables.items() if (key[0] if isinstance(key, tuple) else key) in graph.variables
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where it fails to converge, both do so alike
        found, expected = marginals(plan, tables), marginals(plan, own)
    for key in tables:
        for place, name in enumerate(key) if isinstance(key, tuple) else ():
            row = found[key][:, place]
            if name in graph.variables:
                close(row, expected[name])
            else:
                close(row, expected[name] if sources[name] == (key, place) else torch.zeros_like(row))


def test_two_factors_under_one_tuple_of_a_triangle():
    """By hand: x0 = x1 costs 1 nat, whatever x2."""
    graph = FactorGraph()
    for i in range(3):
        graph.add_variable(f"x{i}", 2)
    for name, scope in {"a": ("x0", "x1"), "b": ("x1", "x2"), "c": ("x2", "x0")}.items():
        graph.add_factor(scope, name=name)
    same = -torch.eye(2, dtype=torch.float64)
    tables = {("c", "a"): torch.stack([torch.zeros_like(same), same]), "b": torch.zeros_like(same)}
    plan = compile(graph)
    close(log_partition(plan, tables), torch.tensor(4 + 4 * math.exp(-1), dtype=torch.float64).log())
    equal = math.exp(-1) / (1 + math.exp(-1))
    close(marginals(plan, tables)["c", "a"][1].trace(), torch.tensor(equal, dtype=torch.float64))
    close(marginal(plan, tables, ["x1", "x0"]).trace(), torch.tensor(equal, dtype=torch.float64))
