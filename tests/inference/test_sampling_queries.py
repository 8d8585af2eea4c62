"""Exact joint samples: shapes, generators, frequencies, agreement of pairs."""

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.graphs import topologies
from codd_ppl.inference import sample, sampling


@pytest.fixture
def hidden():
    graph = topologies.hidden_markov(3, 3, 2)
    return graph, compile(graph), testing.random_log_potentials(graph, (2,), scale=1.5, evidence=0.5, seed=1)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (0,), torch.Size((5,))])
def test_shapes(hidden, shape):
    graph, plan, tables = hidden
    draws = sample(plan, tables, shape)
    assert list(draws) == list(graph.variables) or set(draws) == set(graph.variables)
    for name, value in draws.items():
        assert value.shape == (*shape, 2)
        assert value.dtype == torch.int64
        if value.numel():
            assert value.min() >= 0 and value.max() < graph.variables[name].cardinality


def test_default_is_one_draw(hidden):
    _, plan, tables = hidden
    assert all(value.shape == (2,) for value in sample(plan, tables).values())


def test_generator_decides_and_the_global_state_stays(hidden):
    _, plan, tables = hidden
    state = torch.get_rng_state()
    one, two, other = (
        sample(plan, tables, (50,), generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_generator_moves_on(hidden):
    _, plan, tables = hidden
    generator = torch.Generator().manual_seed(0)
    one, two = (sample(plan, tables, (50,), generator=generator) for _ in range(2))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_without_a_generator_the_global_seed_decides(hidden):
    _, plan, tables = hidden
    torch.manual_seed(3)
    one = sample(plan, tables, (50,))
    torch.manual_seed(3)
    two = sample(plan, tables, (50,))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(20_000,), (200, 100)])
def test_joint_frequencies(hidden, shape, dtype):
    graph, plan, tables = hidden
    tables = {key: table.to(dtype) for key, table in tables.items()}
    draws = sample(plan, tables, shape, generator=torch.Generator().manual_seed(5))
    flat = {name: value.reshape(-1, 2) for name, value in draws.items()}
    assert testing.sample_p_value(graph, tables, flat) > 1e-4


@pytest.mark.parametrize(
    "graph",
    [
        topologies.chain(4, 3),
        topologies.star(4, 3, states=2),
        topologies.latent_tree(4, 2, 2),
        topologies.caterpillar(2, 2, 2),
        topologies.tree([None, 0, 0, None, 3], 3),
        topologies.independent(3, 4),
    ],
    ids=["chain", "star", "latent_tree", "caterpillar", "forest", "independent"],
)
def test_topologies_with_hard_zeros(graph):
    tables = testing.random_log_potentials(graph, infinite=0.3, evidence=0.7, seed=2)
    draws = sample(compile(graph), tables, (20_000,), generator=torch.Generator().manual_seed(6))
    assert testing.sample_p_value(graph, tables, draws) > 1e-4


@pytest.mark.parametrize("chunk", [1, 700])
def test_draws_made_in_slices(hidden, monkeypatch, chunk):
    """One draw at a time, and slices whose last one is shorter."""
    graph, plan, tables = hidden
    monkeypatch.setattr(sampling, "CHUNK", chunk)
    draws = sample(plan, tables, (1001, 3) if chunk > 1 else (500,), torch.Generator().manual_seed(4))
    flat = {name: value.reshape(-1, 2) for name, value in draws.items()}
    assert testing.sample_p_value(graph, tables, flat) > 1e-4


def test_roots_are_drawn_for_each_element_of_a_batch():
    """A component without evidence, beside one whose evidence is batched."""
    graph = topologies.independent(2, 3)
    tables = {"x1": torch.randn(4, 3, generator=torch.Generator().manual_seed(0))}
    draws = sample(compile(graph), tables, (5000, 2), generator=torch.Generator().manual_seed(2))
    assert draws["x0"].shape == draws["x1"].shape == (5000, 2, 4)
    flat = {name: value.reshape(-1, 4) for name, value in draws.items()}
    assert testing.sample_p_value(graph, tables, flat) > 1e-4


def test_draws_within_a_call_are_independent(hidden):
    """Consecutive draws of one call: their pairs follow the product of the joint with itself."""
    graph = topologies.chain(2, 2)
    tables = testing.random_log_potentials(graph, seed=3)
    draws = sample(compile(graph), tables, (20_000,), generator=torch.Generator().manual_seed(1))
    joint = (draws["x0"] * 2 + draws["x1"]).reshape(-1, 2)
    counts = torch.bincount(joint[:, 0] * 4 + joint[:, 1], minlength=16)
    p = testing.enumerate_log_joint(graph, tables).flatten().softmax(-1)
    assert testing.chi_square_p_value(counts, torch.outer(p, p).flatten()) > 1e-4


def test_elements_of_a_batch_are_drawn_independently():
    graph = topologies.chain(2, 2)
    table = testing.random_log_potentials(graph, seed=3)["edge"].expand(2, 2, 2)
    draws = sample(compile(graph), {"edge": table}, (20_000,), generator=torch.Generator().manual_seed(1))
    joint = draws["x0"] * 2 + draws["x1"]
    counts = torch.bincount(joint[:, 0] * 4 + joint[:, 1], minlength=16)
    p = testing.enumerate_log_joint(graph, {"edge": table[0]}).flatten().softmax(-1)
    assert testing.chi_square_p_value(counts, torch.outer(p, p).flatten()) > 1e-4


def test_very_unlikely_values_are_drawn_as_often_as_they_should():
    """A tail of probability 1e-3, spread over many values: float32 must not lose it or inflate it."""
    graph = topologies.independent(1, 1001)  # one likely value, a thousand unlikely ones
    logits = torch.full((1001,), -6.907755)
    logits[0] = 6.907755
    p = logits.double().softmax(-1)[0].item()
    draws = sample(compile(graph), {"x0": logits}, (20_000,), generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([(draws["x0"] == 0).sum(), (draws["x0"] != 0).sum()])
    assert testing.chi_square_p_value(counts, [p, 1 - p]) > 1e-4
