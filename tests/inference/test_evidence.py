"""Unary evidence, stacked evidence, shared tables, batches that broadcast, and evidence that contradicts itself."""

import math

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.errors import InfeasibleError
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.inference import entropy, log_partition, log_score, marginals, mode, sample

INF = math.inf


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def clamp(card: int, value: int) -> torch.Tensor:
    return torch.full((card,), -INF, dtype=torch.float64).index_fill(0, torch.tensor(value), 0.0)


# -- evidence keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_stacked_evidence_is_the_same_as_one_table_each(batch):
    graph = topologies.hidden_markov(4, 5, 3)
    plan = compile(graph)
    tables = testing.random_log_potentials(graph, batch, seed=1)
    evidence = normal(*batch, 4, 5, seed=2)
    tokens = ("x0", "x1", "x2", "x3")
    single = {**tables, **{name: evidence[..., i, :] for i, name in enumerate(tokens)}}
    stacked = {**tables, tokens: evidence}
    close(log_partition(plan, stacked), log_partition(plan, single))
    close(log_partition(plan, stacked), testing.brute_log_partition(graph, stacked))
    beliefs = marginals(plan, stacked)
    assert tokens in beliefs
    close(beliefs[tokens], torch.stack([beliefs[name] for name in tokens], -2))
    close(beliefs[tokens], testing.brute_marginals(graph, stacked)[tokens])
    close(entropy(plan, stacked), testing.brute_entropy(graph, stacked))
    best, _ = testing.brute_mode(graph, stacked)
    close(log_score(plan, stacked, mode(plan, stacked)), best)


def test_stacked_evidence_on_some_variables_in_any_order_and_on_latents():
    graph = topologies.hidden_markov(4, 5, 3)
    plan = compile(graph)
    tables = testing.random_log_potentials(graph, seed=1)
    tables["x1"] = normal(5, seed=9)
    tables["x3", "x0"] = normal(2, 5, seed=3)
    tables["z2", "z0", "z1"] = normal(3, 3, seed=4)
    close(log_partition(plan, tables), testing.brute_log_partition(graph, tables))
    found, expected = marginals(plan, tables), testing.brute_marginals(graph, tables)
    for key in found:
        close(found[key], expected[key])
    draws = sample(plan, tables, (4000,), generator=torch.Generator().manual_seed(0))
    assert testing.sample_p_value(graph, tables, draws) > 1e-4


def test_gradient_of_stacked_evidence():
    graph = topologies.chain(4, 3)
    tables = {"edge": normal(3, 3), ("x2", "x0"): normal(2, 3, seed=1).requires_grad_()}
    log_partition(compile(graph), tables).backward()
    expected = testing.brute_marginals(graph, {key: table.detach() for key, table in tables.items()})
    close(tables["x2", "x0"].grad, expected["x2", "x0"])


def test_evidence_on_a_single_variable_without_factors():
    plan = compile(topologies.independent(1, 4))
    evidence = normal(2, 4)
    close(log_partition(plan, {"x0": evidence}), evidence.logsumexp(-1))
    close(marginals(plan, {"x0": evidence})["x0"], evidence.softmax(-1))
    assert torch.equal(mode(plan, {"x0": evidence})["x0"], evidence.argmax(-1))


def test_no_factor_and_no_evidence_is_uniform():
    graph = topologies.independent(3, 4)
    plan = compile(graph)
    assert log_partition(plan, {}).item() == pytest.approx(3 * math.log(4), abs=1e-6)
    assert entropy(plan, {}).item() == pytest.approx(3 * math.log(4), abs=1e-6)
    for table in marginals(plan, {}).values():
        torch.testing.assert_close(table, torch.full((4,), 0.25, dtype=table.dtype))
    assert set(mode(plan, {})) == {"x0", "x1", "x2"}
    draws = sample(plan, {}, (500,), generator=torch.Generator().manual_seed(0))
    assert testing.sample_p_value(graph, {}, draws) > 1e-4


def test_independent_tokens_are_a_product_of_categoricals():
    plan = compile(topologies.independent(3, 4))
    logits = normal(2, 3, 4)
    tables = {("x0", "x1", "x2"): logits}
    close(log_partition(plan, tables), logits.logsumexp(-1).sum(-1))
    close(entropy(plan, tables), torch.distributions.Categorical(logits=logits).entropy().sum(-1))
    assert torch.equal(torch.stack(list(mode(plan, tables).values()), -1), logits.argmax(-1))


@pytest.mark.parametrize("cards", [(1,), (1, 1, 1), (1, 3, 1), (3, 1, 3)])
def test_cardinality_one(cards):
    graph = FactorGraph()
    for i, card in enumerate(cards):
        graph.add_variable(f"x{i}", card)
        if i:
            graph.add_factor((f"x{i - 1}", f"x{i}"))
    plan, tables = compile(graph), testing.random_log_potentials(graph, evidence=1.0)
    close(log_partition(plan, tables), testing.brute_log_partition(graph, tables))
    close(entropy(plan, tables), testing.brute_entropy(graph, tables))
    draws = sample(plan, tables, (7,))
    assert all(draws[f"x{i}"].max() < card for i, card in enumerate(cards))
    for key, table in marginals(plan, tables).items():
        close(table, testing.brute_marginals(graph, tables)[key])


def test_unary_factor_with_a_name_and_evidence_on_the_same_variable_add_up():
    graph = topologies.independent(1, 3)
    graph.add_factor(("x0",), name="prior")
    tables = {"prior": normal(3), "x0": normal(3, seed=1)}
    close(log_partition(compile(graph), tables), (tables["prior"] + tables["x0"]).logsumexp(-1))
    found = marginals(compile(graph), tables)
    close(found["x0"], found["prior"])


def test_unary_factor_named_like_its_variable_is_the_evidence_counted_once():
    graph = topologies.independent(2, 3)
    graph.add_factor(("x0",))
    tables = {"x0": normal(3)}
    plan = compile(graph)
    close(log_partition(plan, tables), tables["x0"].logsumexp(-1) + math.log(3))
    close(log_score(plan, tables, {"x0": torch.tensor(1), "x1": torch.tensor(0)}), tables["x0"][1])


def test_unary_factors_named_like_their_variables_and_tied():
    """The names default to the variables' names; the shared table must not be lost."""
    graph = topologies.independent(2, 3)
    graph.add_factor(("x0",), tie="prior")
    graph.add_factor(("x1",), tie="prior")
    table = normal(3)
    plan = compile(graph)
    close(log_partition(plan, {"prior": table}), 2 * table.logsumexp(-1))
    close(marginals(plan, {"prior": table})["x0"], table.softmax(-1))
    close(marginals(plan, {"prior": table})["prior"], 2 * table.softmax(-1))
    close(
        log_score(plan, {"prior": table}, {"x0": torch.tensor(1), "x1": torch.tensor(2)}), table[1] + table[2]
    )


# -- ties ------------------------------------------------------------------------------------------


def test_a_tie_is_the_same_as_its_table_repeated():
    tied, free = topologies.chain(5, 3), topologies.chain(5, 3, tie=None)
    table = normal(2, 3, 3)
    repeated = {name: table for name in free.factors}
    close(log_partition(compile(tied), {"edge": table}), log_partition(compile(free), repeated))
    close(entropy(compile(tied), {"edge": table}), entropy(compile(free), repeated))
    counts = marginals(compile(tied), {"edge": table})["edge"]
    separate = marginals(compile(free), repeated)
    close(counts, sum(separate[name] for name in free.factors))


def test_a_factor_of_a_tie_may_have_a_table_of_its_own():
    graph = topologies.chain(4, 3)
    tables = {"edge": normal(3, 3), "x1,x2": normal(3, 3, seed=1)}
    close(log_partition(compile(graph), tables), testing.brute_log_partition(graph, tables))


def test_a_tie_named_like_one_of_its_factors():
    graph = topologies.independent(3, 2)
    graph.add_factor(("x0", "x1"), name="e", tie="e")
    graph.add_factor(("x1", "x2"), tie="e")
    tables = {"e": normal(2, 2)}
    close(log_partition(compile(graph), tables), testing.brute_log_partition(graph, tables))
    close(marginals(compile(graph), tables)["e"], testing.brute_marginals(graph, tables)["e"])
    leaf = tables["e"].clone().requires_grad_()
    log_partition(compile(graph), {"e": leaf}).backward()
    close(leaf.grad, testing.brute_marginals(graph, tables)["e"])
    tables["x1,x2"] = normal(2, 2, seed=1)  # a table of its own: not a user of "e" any more
    close(marginals(compile(graph), tables)["e"].sum(), torch.tensor(1.0, dtype=torch.float64))


def test_every_factor_of_a_tie_by_name():
    graph = topologies.chain(4, 3)
    tables = {name: normal(3, 3, seed=i) for i, name in enumerate(graph.factors)}
    close(log_partition(compile(graph), tables), testing.brute_log_partition(graph, tables))
    found, expected = marginals(compile(graph), tables), testing.brute_marginals(graph, tables)
    for name in graph.factors:
        close(found[name], expected[name])


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "two", "batch"),
    [((), (3,), (3,)), ((3,), (), (3,)), ((2, 1), (3,), (2, 3)), ((1,), (4,), (4,)), ((0,), (), (0,))],
)
def test_batches_broadcast(one, two, batch):
    graph = topologies.chain(3, 2, tie=None)
    tables = {"x0,x1": normal(*one, 2, 2), "x1,x2": normal(*two, 2, 2, seed=1)}
    plan = compile(graph)
    found = log_partition(plan, tables)
    assert found.shape == batch
    close(found, testing.brute_log_partition(graph, tables))
    expected = testing.brute_marginals(graph, tables)
    for key, table in marginals(plan, tables).items():
        close(table.expand(expected[key].shape), expected[key])
    for value in mode(plan, tables).values():
        assert value.shape == batch
    for value in sample(plan, tables, (5,)).values():
        assert value.shape == (5, *batch)
    assert entropy(plan, tables).shape == batch


def test_only_a_token_is_batched():
    """The usual case: one set of tables, evidence per sequence; a component without evidence stays right."""
    graph = topologies.hidden_markov(3, 4, 2)
    graph.add_variable("alone", 3)
    tables = testing.random_log_potentials(graph, seed=0)
    tables["x1"] = normal(6, 4)
    plan = compile(graph)
    close(log_partition(plan, tables), testing.brute_log_partition(graph, tables))
    draws = sample(plan, tables, (3000,), generator=torch.Generator().manual_seed(1))
    assert all(value.shape == (3000, 6) for value in draws.values())
    assert testing.sample_p_value(graph, tables, draws) > 1e-4


def test_elements_of_a_batch_are_independent():
    graph = testing.random_forest(11)
    plan, tables = compile(graph), testing.random_log_potentials(graph, (4,), infinite=0.2, seed=3)
    together = log_partition(plan, tables)
    for i in range(4):
        close(together[i], log_partition(plan, {key: table[i] for key, table in tables.items()}))


def test_views_and_expanded_tables():
    graph = topologies.chain(3, 4, tie=None)
    base = normal(4, 4)
    views = {"x0,x1": base.mT.expand(5, 4, 4), "x1,x2": normal(4, 5, 4).movedim(1, 0)}
    solid = {key: table.contiguous().clone() for key, table in views.items()}
    plan = compile(graph)
    close(log_partition(plan, views), log_partition(plan, solid))
    for key, table in marginals(plan, views).items():
        close(table, marginals(plan, solid)[key])


# -- -inf and contradictions -----------------------------------------------------------------------


def test_clamped_tokens_give_conditional_probabilities():
    graph = topologies.chain(3, 3, tie=None)
    tables = testing.random_log_potentials(graph, seed=2)
    plan = compile(graph)
    joint = testing.enumerate_log_joint(graph, tables).exp()
    for value in range(3):
        clamped = {**tables, "x1": clamp(3, value)}
        close(log_partition(plan, clamped).exp(), joint[:, value].sum())
        close(marginals(plan, clamped)["x0"], joint[:, value].sum(-1) / joint[:, value].sum())
        close(marginals(plan, clamped)["x1"], clamp(3, value).exp())
        assert mode(plan, clamped)["x1"].item() == value
        assert (sample(plan, clamped, (20,))["x1"] == value).all()


def test_a_deterministic_chain_leaves_one_value():
    graph = topologies.chain(6, 4)
    shift = torch.full((4, 4), -INF, dtype=torch.float64)
    shift[torch.arange(4), (torch.arange(4) + 1) % 4] = 0.5
    tables = {"edge": shift, "x0": clamp(4, 3)}
    plan = compile(graph)
    expected = [3, 0, 1, 2, 3, 0]
    assert [value.item() for value in mode(plan, tables).values()] == expected
    assert [value.item() for value in sample(plan, tables).values()] == expected
    assert log_partition(plan, tables).item() == pytest.approx(2.5)
    assert entropy(plan, tables).item() == pytest.approx(0.0, abs=1e-12)


def contradictions():
    equal = torch.full((3, 3), -INF, dtype=torch.float64).fill_diagonal_(0.0)
    dead = torch.full((3, 3), -INF, dtype=torch.float64)
    chain, alone = topologies.chain(3, 3), topologies.independent(3, 3)
    ternary = topologies.independent(3, 2)
    ternary.add_factor(("x0", "x1", "x2"))
    nothing = torch.full((2, 2, 2), -INF, dtype=torch.float64)
    hidden = topologies.hidden_markov(3, 3, 3)
    return {
        "evidence": (alone, {"x1": torch.full((3,), -INF, dtype=torch.float64)}, {"x1"}),
        "two ends of a chain": (
            chain,
            {"edge": equal, "x0": clamp(3, 0), "x2": clamp(3, 2)},
            {"x0", "x1", "x2"},
        ),
        "dead table": (chain, {"edge": dead}, {"x0", "x1", "x2"}),
        "ternary": (ternary, {"x0,x1,x2": nothing}, {"x0", "x1", "x2"}),
        "through latents": (
            hidden,
            {
                "initial": torch.zeros(3, dtype=torch.float64),
                "emission": equal,
                "transition": equal,
                "x0": clamp(3, 1),
                "x1": clamp(3, 0),
            },
            {"x0", "x1", "x2", "z0", "z1", "z2"},
        ),
    }


@pytest.mark.parametrize("name", list(contradictions()))
def test_infeasible_evidence(name):
    graph, tables, culprits = contradictions()[name]
    plan = compile(graph)
    assert log_partition(plan, tables).item() == -INF
    for query in (mode, sample, marginals, entropy):
        with pytest.raises(InfeasibleError) as error:
            query(plan, tables)
        assert any(culprit in str(error.value) for culprit in culprits), str(error.value)
    zeros = {variable: torch.tensor(0) for variable in graph.variables}
    assert log_score(plan, tables, zeros).item() == -INF


def test_the_contradiction_is_located_in_a_long_chain():
    """Hundreds of clamped tokens, two of which contradict each other: only those around the place help."""
    graph = topologies.chain(300, 3)
    equal = torch.full((3, 3), -INF, dtype=torch.float64).fill_diagonal_(0.0)
    tables = {"edge": equal, **{f"x{i}": clamp(3, int(i == 170)).expand(2, 3) for i in range(0, 300, 10)}}
    tables["x170"] = torch.stack([clamp(3, 0), clamp(3, 1)])
    with pytest.raises(
        InfeasibleError, match=r"batch element \(1,\) has.* at variable 'x170'.*: x170, x180,"
    ):
        entropy(compile(graph), tables)
    tables["x170"] = clamp(3, 1)
    with pytest.raises(InfeasibleError, match=r"batch element \(0,\) and 1 more has"):
        mode(compile(graph), tables)


def test_an_impossible_table_is_named():
    graph = topologies.chain(9, 2, tie=None)
    tables = {name: torch.zeros(2, 2) for name in graph.factors}
    tables["x3,x4"] = torch.full((2, 2), -INF)
    with pytest.raises(InfeasibleError, match=r"factor 'x3,x4'; .* x3, x4, x5.*in their evidence: none"):
        sample(compile(graph), tables)


def test_an_empty_batch_is_never_infeasible():
    tables = {"edge": torch.full((2, 2), -INF), "x0": torch.zeros(0, 2)}
    plan = compile(topologies.chain(2, 2))
    assert mode(plan, tables)["x1"].shape == (0,)
    assert sample(plan, tables, (3,))["x1"].shape == (3, 0)
    assert marginals(plan, tables)["x1"].shape == (0, 2)
    assert entropy(plan, tables).shape == (0,)


def test_one_infeasible_element_of_a_batch():
    graph = topologies.chain(3, 3)
    equal = torch.full((3, 3), -INF, dtype=torch.float64).fill_diagonal_(0.0)
    tables = {"edge": equal, "x0": clamp(3, 0), "x2": torch.stack([clamp(3, 0), clamp(3, 1), normal(3)])}
    plan = compile(graph)
    found = log_partition(plan, tables)
    close(found, testing.brute_log_partition(graph, tables))
    assert found[1] == -INF
    assert torch.isfinite(found[[0, 2]]).all()
    for query in (mode, sample, marginals, entropy):
        with pytest.raises(InfeasibleError):
            query(plan, tables)


def test_an_infeasible_component_makes_all_of_it_infeasible():
    graph = topologies.independent(2, 3)
    tables = {"x0": normal(3), "x1": torch.full((3,), -INF, dtype=torch.float64)}
    assert log_partition(compile(graph), tables).item() == -INF
    with pytest.raises(InfeasibleError, match="x1"):
        mode(compile(graph), tables)


def test_impossible_score_of_a_possible_model():
    graph = topologies.chain(2, 2)
    tables = {"edge": torch.tensor([[0.0, -INF], [-INF, 1.0]], dtype=torch.float64)}
    values = {"x0": torch.tensor([0, 0, 1]), "x1": torch.tensor([0, 1, 1])}
    assert log_score(compile(graph), tables, values).tolist() == [0.0, -INF, 1.0]
