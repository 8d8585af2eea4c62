"""Queries over subsets, evidence and pairs: errors that say the remedy, no_grad, routes, slices, and large numbers."""

import math

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.errors import (
    ConfigError,
    GraphError,
    InfeasibleError,
    IntractableError,
    PotentialsError,
    ShapeError,
)
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
    mode,
    ranking,
    subsets,
)

INF = math.inf
GRAPH = topologies.hidden_markov(4, 5, 3)
PLAN = compile(GRAPH)


def tables(batch=(), **changes):
    return testing.random_log_potentials(GRAPH, batch) | changes


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_names_of_a_marginal():
    with pytest.raises(GraphError, match=r"marginal.*'y'.*'x0'"):
        marginal(PLAN, tables(), ["x0", "y"])
    with pytest.raises(GraphError, match=r"'x1' is named twice"):
        marginal(PLAN, tables(), ["x1", "x0", "x1"])
    with pytest.raises(GraphError, match=r"found the string 'x0'"):
        marginal(PLAN, tables(), "x0")


def test_a_marginal_too_large_to_hold():
    graph = topologies.chain(40, 5)
    with pytest.raises(IntractableError, match=r"5 x 5 x .*log_prob.*sample"):
        marginal(compile(graph), testing.random_log_potentials(graph), list(graph.variables)[:12])


def test_what_is_impossible_has_no_probabilities():
    bad = tables((2,), x1=torch.tensor([[0.0] * 5, [-INF] * 5], dtype=torch.float64))
    for query in [
        lambda: marginal(PLAN, bad, ["x0", "x1"]),
        lambda: marginal(PLAN, bad, ["x0", "x3"]),
        lambda: marginal(PLAN, bad, []),
        lambda: log_prob(PLAN, bad, {"x0": torch.tensor(0)}),
        lambda: kl(PLAN, bad, tables()),
        lambda: kl(PLAN, tables(), bad),
        lambda: cross_entropy(PLAN, tables(), bad),
        lambda: expectation(PLAN, bad, {"x0": torch.zeros(5)}),
        lambda: expectation(PLAN, bad, {}),
    ]:
        with pytest.raises(InfeasibleError, match=r"element \(1,\).*x1"):
            query()
    scores, values = k_best(PLAN, bad, 3)
    assert scores.isfinite().tolist() == [[True] * 3, [False] * 3]
    assert all(bool((v[1] == -1).all()) and bool((v[0] >= 0).all()) for v in values.values())


def test_impossible_values_have_log_probability_minus_infinity():
    own = tables(x1=torch.tensor([0.0, -INF, 0, 0, 0], dtype=torch.float64))
    assert log_prob(PLAN, own, {"x1": torch.tensor([0, 1])}).isfinite().tolist() == [True, False]
    assert log_partition(PLAN, condition(PLAN, own, {"x1": torch.tensor(1)})).item() == -INF


@pytest.mark.parametrize("query", [condition, log_prob])
def test_hard_evidence(query):
    with pytest.raises(GraphError, match="'y'"):
        query(PLAN, tables(), {"y": torch.tensor(0)})
    with pytest.raises(ShapeError, match=r"'x1'.*to 4, found 0 to 5"):
        query(PLAN, tables(), {"x1": torch.tensor([0, 5])})
    with pytest.raises(ShapeError, match=r"'x1'.*integers, found torch.float32"):
        query(PLAN, tables(), {"x1": torch.tensor(0.0)})
    with pytest.raises(ShapeError, match=r"'x1'.*integers, found int"):
        query(PLAN, tables(), {"x1": 0})
    with pytest.raises(ShapeError, match=r"broadcast.*\(2,\)"):
        query(PLAN, tables((2,)), {"x1": torch.tensor([0, 1, 2])})


def test_minus_one_is_evidence_for_condition_only():
    none = torch.tensor([-1, -1])
    close(
        log_partition(PLAN, condition(PLAN, tables(), {"x1": none})), log_partition(PLAN, tables()).expand(2)
    )
    with pytest.raises(ShapeError, match=r"'x1'.*from 0 to 4, found -1"):
        log_prob(PLAN, tables(), {"x1": none})
    with pytest.raises(ShapeError, match=r"-1: not observed.*found -2"):
        condition(PLAN, tables(), {"x1": none - 1})


def test_soft_evidence():
    with pytest.raises(ShapeError, match=r"soft\['x1'\].*5.*\(4,\)"):
        condition(PLAN, tables(), soft={"x1": torch.zeros(4)})
    with pytest.raises(ShapeError, match=r"soft\['x1'\].*int64"):
        condition(PLAN, tables(), soft={"x1": torch.zeros(5, dtype=torch.int64)})
    with pytest.raises(PotentialsError, match=r"soft\['x1'\] holds NaN or \+inf"):
        condition(PLAN, tables(), soft={"x1": torch.full((5,), math.nan)})
    with pytest.raises(GraphError, match="'y'"):
        condition(PLAN, tables(), soft={"y": torch.zeros(5)})
    with pytest.raises(ShapeError, match=r"one cardinality.*3, 5"):
        condition(PLAN, tables(), soft={("x0", "z0"): torch.zeros(2, 5)})


def test_stacked_evidence_is_the_same_as_one_each():
    hard, soft = torch.randint(-1, 5, (6, 4)), torch.randn(6, 4, 5, dtype=torch.float64)
    names = ("x2", "x0", "x3", "x1")
    single = condition(
        PLAN,
        tables(),
        {name: hard[:, i] for i, name in enumerate(names)},
        {name: soft[:, i] for i, name in enumerate(names)},
    )
    stacked = condition(PLAN, tables(), {names: hard}, {names: soft})
    close(log_partition(PLAN, stacked), log_partition(PLAN, single))
    with pytest.raises(ShapeError, match=r"\(\*batch, 4\), found \(6, 3\)"):
        condition(PLAN, tables(), {names: hard[:, :3]})


def test_evidence_for_a_tied_unary_factor_called_like_its_variable():
    graph = FactorGraph()
    for name in ("a", "b"):
        graph.add_variable(name, 3)
        graph.add_factor((name,), name=name, tie="prior")
    plan, own = compile(graph), {"prior": torch.randn(3, dtype=torch.float64)}
    given = condition(plan, own, {"a": torch.tensor(1)}, {"b": torch.tensor([0.0, 1, 2])})
    expected = own["prior"][1] + (own["prior"] + torch.arange(3.0)).logsumexp(0)
    close(log_partition(plan, given), expected)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "3"])
def test_k(k):
    with pytest.raises(ConfigError, match=rf"k >= 1, found {k!r}"):
        k_best(PLAN, tables(), k)


def test_bad_tables_are_named():
    for value in (math.nan, INF):
        bad = tables(x1=torch.full((5,), value, dtype=torch.float64))
        for query in [
            lambda t: marginal(PLAN, t, ["x0"]),
            lambda t: log_prob(PLAN, t, {"x0": torch.tensor(0)}),
            lambda t: k_best(PLAN, t, 2),
            lambda t: kl(PLAN, t, tables()),
            lambda t: kl(PLAN, tables(), t),
            lambda t: expectation(PLAN, t, {"x0": torch.zeros(5)}),
        ]:
            with pytest.raises(PotentialsError, match="x1"):
                query(bad)


def test_statistics():
    with pytest.raises(PotentialsError, match=r"statistics has the unknown key 'y'"):
        expectation(PLAN, tables(), {"y": torch.zeros(5)})
    with pytest.raises(PotentialsError, match=r"statistics\['emission'\].*3, 5.*found \(5, 3\)"):
        expectation(PLAN, tables(), {"emission": torch.zeros(5, 3)})
    with pytest.raises(PotentialsError, match=r"statistics\['x0'\] holds NaN"):
        expectation(PLAN, tables(), {"x0": torch.full((5,), math.nan)})
    close(expectation(PLAN, tables((2,)), {}), torch.zeros(2, dtype=torch.float64))


def test_batches_of_p_and_q_must_broadcast():
    with pytest.raises(PotentialsError, match=r"p and q.*\(2,\) and \(3,\)"):
        kl(PLAN, tables((2,)), tables((3,)))
    assert kl(PLAN, tables((2, 1)), tables((3,))).shape == (2, 3)


# -- modes of autograd, routes and slices ------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    with context():
        own = tables((2,), x1=torch.randn(2, 5, dtype=torch.float64))
        for names in (["x0", "x3"], ["z0", "x0"], ["z2"]):
            found = marginal(PLAN, own, names)
            assert not found.requires_grad
            close(found, testing.brute_marginal(GRAPH, own, names))
        given = {"x0": torch.tensor(1)}
        close(log_prob(PLAN, own, given), testing.brute_log_prob(GRAPH, own, given))
        close(kl(PLAN, own, tables()), testing.brute_kl(GRAPH, own, tables()))


def test_a_result_has_a_graph_only_if_its_input_has_one():
    leaves = {key: table.requires_grad_() for key, table in tables().items()}
    assert marginal(PLAN, leaves, ["x0", "x3"]).requires_grad
    assert not marginal(PLAN, tables(), ["x0", "x3"]).requires_grad


def test_on_the_chain_scan():
    graph = topologies.chain(4, 3)
    plan, own = compile(graph, "chain scan"), testing.random_log_potentials(graph, (2,), evidence=1.0)
    for names in (["x3"], ["x2", "x0"], ["x1", "x2"]):
        close(marginal(plan, own, names), testing.brute_marginal(graph, own, names))
    given = {"x2": torch.tensor([0, 1])}
    close(log_prob(plan, own, given), testing.brute_log_prob(graph, own, given))
    close(kl(plan, own, {"edge": own["edge"]}), testing.brute_kl(graph, own, {"edge": own["edge"]}))
    close(k_best(plan, own, 4)[0], testing.brute_k_best(graph, own, 4))


def test_in_slices(monkeypatch):
    own, names = tables((2,), x1=torch.randn(2, 5, dtype=torch.float64)), ["x0", "z1", "x3"]
    given = {"x0": torch.randint(5, (7, 2)), "z3": torch.randint(3, (2,))}
    whole = marginal(PLAN, own, names), log_prob(PLAN, own, given), marginal(PLAN, own, ["x1", "z1"])
    calls = []
    monkeypatch.setattr(subsets, "CHUNK", 200)
    monkeypatch.setattr(subsets, "log_partition", lambda *a: calls.append(a) or log_partition(*a))
    close(marginal(PLAN, own, names), whole[0])
    assert len(calls) > 5
    close(log_prob(PLAN, own, given), whole[1])
    close(marginal(PLAN, own, ["x1", "z1"]), whole[2])


@pytest.mark.parametrize("seed", range(12))
def test_k_best_in_slices(monkeypatch, seed):

    monkeypatch.setattr(ranking, "CHUNK", 30)
    graph = testing.random_forest(seed, max_order=4, max_joint=300)
    own = testing.random_log_potentials(graph, [(), (3,)][seed % 2], infinite=0.2, evidence=1.0, seed=seed)
    close(k_best(compile(graph), own, 6)[0], testing.brute_k_best(graph, own, 6))


def test_elsewhere_than_on_forests_the_divergence_comes_from_expectations():
    p, q = tables((2,), x1=torch.randn(5).double()), tables((2,))
    q = {key: t + torch.randn_like(t) for key, t in q.items()}
    q["emission"] = q["emission"].masked_fill(torch.rand(3, 5) < 0.1, -INF)
    plan = compile(GRAPH, route="clique contraction")
    for a, b in [(p, q), (q, p)]:
        close(cross_entropy(plan, a, b), testing.brute_cross_entropy(GRAPH, a, b))


# -- numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6])
def test_large_potentials(scale):
    graph = topologies.hidden_markov(3, 3, 2)
    plan = compile(graph)
    p = testing.random_log_potentials(graph, (3,), scale=scale)
    q = {key: t + torch.randn_like(t) for key, t in p.items()}
    names = ["x0", "x2"]
    close(marginal(plan, p, names), testing.brute_marginal(graph, p, names), 1e-15 * scale + 1e-9)
    for found, expected in [
        (kl(plan, p, q), testing.brute_kl(graph, p, q)),
        (cross_entropy(plan, p, q), testing.brute_cross_entropy(graph, p, q)),
    ]:
        close(found, expected, 1e-14 * scale + 1e-9)
        assert bool((found >= 0).all())


def test_a_small_divergence_of_a_long_chain_in_float32():
    graph = topologies.chain(200, 4, tie=None)
    plan = compile(graph)
    p = {key: 30 * torch.randn(4, 4) for key in graph.factors}
    q = {key: t + 0.1 * torch.randn(4, 4) for key, t in p.items()}
    exact = kl(plan, {k: t.double() for k, t in p.items()}, {k: t.double() for k, t in q.items()})
    assert 1e-3 < exact < 1
    close(kl(plan, p, q).double(), exact, 2e-3 * float(exact))
    assert kl(plan, p, p) == 0


def test_long_chains_and_wide_stars():
    graph = topologies.chain(400, 4)
    plan, own = compile(graph), {"edge": torch.randn(4, 4)}
    own["x7"] = torch.randn(2, 4)
    scores, values = k_best(plan, own, 3)
    first = {name: v[..., 0] for name, v in values.items()}
    close(scores[:, 0], log_score(plan, own, mode(plan, own)), 1e-4)
    close(log_score(plan, own, first), scores[:, 0], 1e-6)
    assert bool((scores[:, :-1] >= scores[:, 1:]).all())
    star = topologies.star(300, 3)
    tight = {f: torch.randn(3, 3, dtype=torch.float64) for f in star.factors}
    scores, _ = k_best(compile(star), tight, 2)
    # The second best of a star: the best hub value with its cheapest change, or another hub value.
    each = torch.stack(list(tight.values())).sort(-1).values
    best = each[..., -1].sum(0)
    change = best - (each[..., -1] - each[..., -2]).amin(0)
    close(scores, torch.cat([best, change]).topk(2).values)


def test_ties_in_score_are_different_assignments():
    graph = topologies.chain(4, 2)
    scores, values = k_best(compile(graph), {"edge": torch.zeros(2, 2, dtype=torch.float64)}, 20)
    assert scores.tolist() == [0.0] * 16 + [-INF] * 4
    found = torch.stack(list(values.values()), -1)
    assert len(found[:16].unique(dim=0)) == 16 and bool((found[16:] == -1).all())


def test_entropy_and_divergence_add_up():
    p, q = tables((2,)), {key: t + 1.0 * torch.randn_like(t) for key, t in tables((2,)).items()}
    close(cross_entropy(PLAN, p, q), entropy(PLAN, p) + kl(PLAN, p, q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("graph", [topologies.chain(4, 2, tie=None), topologies.grid(2, 2, 2, tie=False)])
def test_what_p_hardly_allows_and_q_forbids(graph, dtype):
    """A probability far below the smallest number is no 0: the divergence is infinite, its gradient finite."""
    plan = compile(graph)
    p = {name: torch.zeros(2, 2, dtype=dtype) for name in graph.factors}
    q = {name: torch.zeros(2, 2, dtype=dtype) for name in graph.factors}
    q["x1"] = torch.tensor([0.0, -INF], dtype=dtype)
    for rare in (-3e3, -INF):
        p["x1"] = torch.tensor([[0.0, rare], [0.0, -INF]], dtype=dtype)
        leaves = {key: table.clone().requires_grad_() for key, table in p.items()}
        for query in (kl, cross_entropy):
            found = query(plan, leaves, q)
            assert found.isinf().tolist() == [rare > -INF, False]
            found.sum().backward()
        assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves.values())
