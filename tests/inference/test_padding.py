"""Padded lengths: a batch with inactive variables is a loop over smaller graphs."""

import random

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.errors import GraphError, ShapeError
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.inference import (
    cross_entropy,
    entropy,
    expectation,
    k_best,
    kl,
    lengths,
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

INF = float("inf")


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def smaller(graph, active):
    """The graph of the active variables and the factors among them; ties keep their names."""
    result = FactorGraph()
    for v in graph:
        if v.name in active:
            result.add_variable(v.name, v.cardinality, v.latent)
    for f in graph.factors.values():
        if set(f.scope) <= active:
            result.add_factor(f.scope, tie=f.tie, name=f.name)
    return result


def restricted(graph, tables, shape, index):
    """Log-potentials of one batch element for a smaller graph."""
    result = {}
    ties = graph.ties
    for key, table in tables.items():
        names = [n for n in key if n in graph.variables] if isinstance(key, tuple) else [key]
        known = (*graph.variables, *graph.factors, *ties)
        if not names or (isinstance(key, str) and key not in known):
            continue
        if isinstance(key, tuple):
            row = table.expand(*shape, *table.shape[-2:])[index]
            result[tuple(names)] = torch.stack([row[key.index(n)] for n in names])
        else:
            order = 1 if key in graph.variables else graph.factors[ties.get(key, (key,))[0]].order
            result[key] = table.expand(*shape, *table.shape[table.dim() - order :])[index]
    return result


CASES = {
    "chain": topologies.chain(5, 3),
    "free chain": topologies.chain(4, 3, tie=None),
    "hidden_markov": topologies.hidden_markov(4, 3, 2),
    "caterpillar": topologies.caterpillar(3, 1, 2),
    "latent_tree": topologies.latent_tree(3, 2, 2),
}


def random_case(name, seed):
    """A graph, log-potentials (unbatched, batched, or mixed; -inf or not), and what is active."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    graph = CASES[name] if name in CASES else testing.random_forest(seed, max_order=4, tie=0.8, max_joint=300)
    shape = (2, 2) if seed % 4 == 1 else (4,)
    batch = rng.choice([(), shape])
    infinite = rng.choice([0.0, 0.25])
    tables = testing.random_log_potentials(
        graph, batch, infinite=infinite, evidence=0.4, seed=seed, mixed=True
    )
    size = next(iter(graph)).cardinality
    names = tuple(v.name for v in graph if v.cardinality == size)
    tables[names] = torch.randn(*rng.choice([(), shape]), len(names), size, generator=generator).double()
    active = torch.rand(*shape, len(graph), generator=generator) < 0.6
    active[(0,) * len(shape)] = True  # one element is whole,
    active[(1,) * len(shape)] = False  # and one empty
    return graph, tables, shape, active


def elements(graph, tables, shape, active):
    for flat in range(active[..., 0].numel()):
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))
        names = {name for name, on in zip(graph.variables, active[index].tolist(), strict=True) if on}
        few = smaller(graph, names)
        yield index, few, restricted(few, tables, shape, index)


NAMES = [*CASES, "forest", "forest", "forest"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("number", "name"), list(enumerate(NAMES)))
def test_every_query_is_a_loop_over_smaller_graphs(number, name, seed):
    graph, tables, shape, active = random_case(name, 10 * number + seed)
    plan = compile(graph)
    padded = pad(plan, tables, active)
    total, uncertainty = log_partition(plan, padded), entropy(plan, padded)
    raw = marginals(plan, padded)
    clean = unpad(plan, raw, tables, active)
    assert set(clean) == set(tables) | set(graph.variables)
    best = log_score(plan, padded, mode(plan, padded))
    scores, values = k_best(plan, padded, 4)
    assert total.shape == uncertainty.shape == shape and scores.shape == (*shape, 4)
    for index, few, own in elements(graph, tables, shape, active):
        if not few.variables:
            close(torch.stack([total[index], uncertainty[index], best[index]]), torch.zeros(3).double())
            continue
        close(total[index], testing.brute_log_partition(few, own))
        close(uncertainty[index], testing.brute_entropy(few, own))
        close(best[index], testing.brute_mode(few, own)[0])
        close(scores[index], testing.brute_k_best(few, own, 4))
        found = {v: values[v][index].clamp(min=0) for v in few.variables}
        possible = scores[index] > -INF
        close(testing.brute_log_score(few, own, found)[possible], scores[index][possible])
        expected = testing.brute_marginals(few, own)
        for key, table in clean.items():
            here = table[index]
            if isinstance(key, tuple):
                here = torch.stack(
                    [row for n, row in zip(key, here, strict=True) if n in few.variables] or [here[0]]
                )
                close(here, expected.get(tuple(n for n in key if n in few.variables), torch.zeros_like(here)))
            else:
                own_factors = [f for f in few.factors.values() if f.tie == key and f.name in own]
                want = expected.get(key, torch.zeros_like(here))
                close(here, want - sum(expected[f.name] for f in own_factors) if own_factors else want)
    for name_, value in {**mode(plan, padded), **{k: v.amax(-1) for k, v in values.items()}}.items():
        place = list(graph.variables).index(name_)
        assert bool((value[~active[..., place]] <= 0).all()), "inactive variables have value 0"


@pytest.mark.parametrize("name", ["chain", "hidden_markov", "forest"])
def test_sample(name):
    graph, tables, shape, active = random_case(name, 3)
    plan = compile(graph)
    draws = sample(plan, pad(plan, tables, active), (3000,), torch.Generator().manual_seed(0))
    for index, few, own in elements(graph, tables, shape, active):
        here = {key: value[(slice(None), *index)] for key, value in draws.items()}
        assert all(bool((here[n] == 0).all()) for n in graph.variables if n not in few.variables)
        if few.variables:
            assert testing.sample_p_value(few, own, here) > 1e-4


@pytest.mark.parametrize("name", ["chain", "hidden_markov", "caterpillar", "forest"])
def test_other_queries(name):
    graph, tables, shape, active = random_case(name, 4)
    plan = compile(graph)
    other = {key: torch.randn_like(t).masked_fill(t == -INF, -INF) for key, t in tables.items()}
    p, q = pad(plan, tables, active), pad(plan, other, active)
    found, cross = kl(plan, p, q), cross_entropy(plan, p, q)
    average = expectation(plan, p, pad(plan, tables, active))
    close(average, log_partition(plan, p) - entropy(plan, p))
    first = next(iter(graph.variables))
    chance, table = log_prob(plan, p, {first: torch.tensor(0)}), marginal(plan, p, [first])
    for index, few, own in elements(graph, tables, shape, active):
        if few.variables:
            theirs = restricted(few, other, shape, index)
            close(found[index], testing.brute_kl(few, own, theirs))
            close(cross[index], testing.brute_cross_entropy(few, own, theirs))
        if first in few.variables:
            close(chance[index], testing.brute_log_prob(few, own, {first: torch.tensor(0)}))
            close(table[index], testing.brute_marginal(few, own, [first]))


@pytest.mark.parametrize("name", ["chain", "hidden_markov", "caterpillar", "latent_tree"])
def test_gradients_are_those_of_the_smaller_graphs(name):
    graph, tables, shape, active = random_case(name, 7)
    plan = compile(graph)
    leaves = {key: t.clone().requires_grad_() for key, t in tables.items()}
    log_partition(plan, pad(plan, leaves, active)).sum().backward()
    again = {key: t.clone().requires_grad_() for key, t in tables.items()}
    total = sum(
        testing.brute_log_partition(few, own)
        for _, few, own in elements(graph, again, shape, active)
        if few.variables
    )
    total.backward()
    for key, leaf in leaves.items():
        close(leaf.grad, again[key].grad)


# -- lengths ---------------------------------------------------------------------------------------


def test_lengths_of_a_hidden_markov_model():
    plan = compile(topologies.hidden_markov(3, 5, 2))
    found = lengths(plan, torch.tensor([0, 2, 3]))
    names = [v.name for v in plan.variables]
    assert found.shape == (3, 6)
    for row, n in zip(found.tolist(), [0, 2, 3], strict=True):
        assert {name for name, on in zip(names, row, strict=True) if on} == {
            f"{letter}{i}" for letter in "xz" for i in range(n)
        }
    assert lengths(plan, torch.tensor(1)).tolist() == [n in ("x0", "z0") for n in names]


def test_latents_without_a_token_of_their_own_stay():
    plan = compile(topologies.star(3, 2, states=4))
    assert lengths(plan, torch.tensor(1)).tolist() == [v.name in ("x0", "z0") for v in plan.variables]


@pytest.mark.parametrize("sites", [1, 2, 6])
def test_a_batch_of_lengths_is_a_loop(sites):
    graph = topologies.hidden_markov(sites, 4, 3)
    plan, n = compile(graph), torch.arange(1, sites + 1)
    tables = testing.random_log_potentials(graph)
    evidence = torch.randn(sites, sites, 4, dtype=torch.float64)
    tokens = tuple(f"x{i}" for i in range(sites))
    padded = pad(plan, {**tables, tokens: evidence}, lengths(plan, n))
    total, spread, beliefs = log_partition(plan, padded), entropy(plan, padded), marginals(plan, padded)
    for row, length in enumerate(n.tolist()):
        few = compile(topologies.hidden_markov(length, 4, 3))
        own = {k: t for k, t in tables.items() if k in few.factor or k in few.ties}
        own[tokens[:length]] = evidence[row, :length]
        close(total[row], log_partition(few, own))
        close(spread[row], entropy(few, own))
        for name, value in marginals(few, own).items():
            if name in few.variable:
                close(beliefs[name][row], value)


def test_no_copy_of_a_tied_table_per_batch_element():
    graph = topologies.hidden_markov(9, 3, 4)
    plan, tables = compile(graph), testing.random_log_potentials(graph)
    padded = pad(plan, tables, lengths(plan, torch.tensor([3, 5, 9])))
    for key in ("transition", "emission", "initial"):
        assert padded[key] is tables[key]
    assert max(t.numel() for t in padded.values()) <= 3 * 9 * 4
    assert not any(key in padded for key in graph.factors if key != "initial")


def test_a_mapping_and_a_tensor_say_the_same():
    graph = topologies.chain(4, 3)
    plan, tables = compile(graph), testing.random_log_potentials(graph)
    mask = torch.tensor([[True, True, True, False], [True, False, True, False]])
    by_name = {"x3": torch.tensor(False), ("x1", "x2"): mask[:, 1:3]}
    close(log_partition(plan, pad(plan, tables, mask)), log_partition(plan, pad(plan, tables, by_name)))


@pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 1)])
def test_batch_shapes(batch):
    graph = topologies.chain(3, 2)
    plan, tables = compile(graph), testing.random_log_potentials(graph)
    full = torch.full(batch, 3)
    close(
        log_partition(plan, pad(plan, tables, lengths(plan, full))), log_partition(plan, tables).expand(batch)
    )
    close(
        log_partition(plan, pad(plan, tables, lengths(plan, full - 2))), torch.full(batch, 2.0).double().log()
    )


def test_infeasible_padding_of_what_was_infeasible_only_there():
    graph = topologies.chain(3, 2)
    plan, tables = compile(graph), testing.random_log_potentials(graph)
    tables["x2"] = torch.full((2,), -INF, dtype=torch.float64)
    found = log_partition(plan, pad(plan, tables, lengths(plan, torch.tensor([2, 3]))))
    assert found.isfinite().tolist() == [True, False]


def test_inputs_stay():
    graph, tables, _, active = random_case("hidden_markov", 2)
    before = {key: t.clone() for key, t in tables.items()}
    mask = active.clone()
    pad(compile(graph), tables, active)
    assert torch.equal(mask, active) and all(torch.equal(t, before[k]) for k, t in tables.items())


def test_bad_input():
    graph = topologies.chain(3, 2)
    plan, tables = compile(graph), testing.random_log_potentials(graph, (2,))
    with pytest.raises(ShapeError, match=r"active.*bool.*3.*4"):
        pad(plan, tables, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"active.*bool.*int64"):
        pad(plan, tables, torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(GraphError, match="'x7'"):
        pad(plan, tables, {"x7": torch.tensor(True)})
    with pytest.raises(ShapeError, match="broadcast"):
        pad(plan, tables, torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"n: expected values from 0 to 3, found 4"):
        lengths(plan, torch.tensor([4]))
    strange = FactorGraph()
    strange.add_variable("word", 3)
    with pytest.raises(GraphError, match="x0"):
        lengths(compile(strange), torch.tensor(1))


def test_padding_of_large_potentials_and_in_float32():
    graph = topologies.chain(6, 3)
    plan = compile(graph)
    for dtype, scale, tolerance in [(torch.float64, 1e4, 1e-10), (torch.float32, 10.0, 1e-4)]:
        edge = (scale * torch.randn(3, 3)).to(dtype)
        padded = pad(plan, {"edge": edge}, lengths(plan, torch.arange(1, 7)))
        for n in range(2, 7):
            few = compile(topologies.chain(n, 3))
            found, expected = log_partition(plan, padded)[n - 1], log_partition(few, {"edge": edge})
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)
