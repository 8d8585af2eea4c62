"""Expectation maximisation: a rising objective, planted models found again, likelihoods against hmmlearn and numpy."""

import math

import numpy as np
import pytest
import torch
from hmmlearn import hmm

from codd_ppl import FactorGraph, compile, topologies
from codd_ppl.errors import ConfigError, PotentialsError, ShapeError, TokenError
from codd_ppl.inference import log_partition, sample
from codd_ppl.potentials import Clones, Clusters, Given, LatentPotentials, RandomStart, baum_welch
from codd_ppl.potentials.expectation import Expectation
from codd_ppl.potentials.fit import Fit
from codd_ppl.potentials.running_counts import RunningCounts


def planted(graph: FactorGraph, n: int, seed: int, spread: float = 2.0) -> tuple[torch.Tensor, dict]:
    """Blocks drawn from random tables, and the tables."""
    generator = torch.Generator().manual_seed(seed)
    tables = {
        name: (spread * torch.randn(value.shape, generator=generator)).double().log_softmax(-1)
        for name, value in LatentPotentials(graph)().items()
    }
    some = {name: value.expand(n, *value.shape) for name, value in list(tables.items())[:1]}
    drawn = sample(compile(graph), tables | some, generator=generator)
    return torch.stack([drawn[x] for x in graph.tokens], 1), tables


def score(graph: FactorGraph, tables: dict, blocks: torch.Tensor) -> float:
    """Mean log-likelihood, nats per block."""
    counts = {k: RunningCounts(v.exp(), torch.zeros(v.shape[-1]).to(v)) for k, v in tables.items()}
    return float(Expectation(graph).log_likelihood(counts, blocks).double().mean())


GRAPHS = {
    "hmm": topologies.hidden_markov(7, 5, 4),
    "tree": topologies.latent_tree(6, 4, 3),
    "tree, tables of their own": topologies.latent_tree(5, 4, 3, tie=False),
    "mixture": topologies.star(5, 4, states=3),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_the_objective_never_falls(graph: FactorGraph, seed: int, smoothing: float) -> None:
    blocks, _ = planted(graph, 60, seed)
    tables, trace = baum_welch(
        graph, blocks, epochs=25, batch_size=None, smoothing=smoothing, seed=seed, start=RandomStart(),
        dtype=torch.float64, progress=False,
    )  # fmt: skip
    assert len(trace.objective) == 25 and all(v.dtype == torch.float64 for v in tables.values())
    rises = np.diff(trace.objective)
    assert rises.min() >= -1e-10 and trace.objective[-1] > trace.objective[0] + 1e-3
    if smoothing == 0.0:
        sites = blocks.shape[1]
        assert trace.objective == pytest.approx([sites * v for v in trace.log_likelihood], abs=1e-12)
        assert score(graph, tables, blocks) >= trace.objective[-1] - 1e-10
    for value in tables.values():
        torch.testing.assert_close(value.exp().sum(-1), torch.ones(value.shape[:-1]).double())


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = topologies.hidden_markov(7, 5, 4)
    blocks, _ = planted(graph, 50, 0)
    for size in (None, 40):
        settings = {"epochs": 3, "batch_size": size, "dtype": torch.float64, "progress": False}
        whole, trace = baum_welch(graph, blocks, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(Expectation, "chunk", 7)
            parts, again = baum_welch(graph, blocks, **settings)
        assert again.log_likelihood == pytest.approx(trace.log_likelihood, abs=1e-12)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, atol=1e-10, rtol=1e-10)


def test_the_end_by_tolerance() -> None:
    graph = topologies.star(5, 4, states=2)
    blocks, _ = planted(graph, 200, 0)
    _, trace = baum_welch(
        graph, blocks, epochs=500, batch_size=None, tolerance=1e-5, dtype=torch.float64, progress=False
    )
    assert trace.converged and 2 < len(trace.objective) < 500
    assert trace.objective[-1] - trace.objective[-2] < 1e-5 * 5 <= trace.objective[1] - trace.objective[0]
    assert trace.tokens == [blocks.numel() * (k + 1) for k in range(len(trace.tokens))]
    assert trace.seconds == sorted(trace.seconds) and not trace.held_out


@pytest.mark.parametrize(
    "graph", [topologies.latent_tree(8, 6, 3), topologies.star(8, 6, states=3)], ids=["tree", "mixture"]
)
def test_a_planted_model_is_reached(graph: FactorGraph) -> None:
    """Held-out likelihood within one per cent of the model that the text was drawn from."""
    blocks, tables = planted(graph, 2500, 5, spread=3.0)
    train, valid = blocks[:2000], blocks[2000:]
    found, trace = baum_welch(
        graph, train, epochs=50, batch_size=None, restarts=4, smoothing=0.002, start=RandomStart(1.0, 1.0),
        dtype=torch.float64, valid_blocks=valid, progress=False,
    )  # fmt: skip
    truth = score(graph, tables, valid)
    alone = torch.stack([torch.bincount(column, minlength=6).double() for column in train.T])
    alone = (alone / alone.sum(-1, keepdim=True)).log()
    independent = float(alone.gather(1, valid.T).sum(0).mean())
    assert independent < 1.03 * truth, "a text that teaches nothing"
    assert score(graph, found, valid) > 1.01 * truth
    tokens, last = trace.held_out[-1]
    assert len(trace.held_out) == 50 and tokens == 50 * train.numel()
    assert 8 * last == pytest.approx(score(graph, found, valid), abs=1e-9)


def test_restarts_are_the_best_of_single_runs() -> None:
    graph = topologies.star(6, 5, states=4)
    blocks, _ = planted(graph, 300, 1)
    settings = {"batch_size": None, "start": RandomStart(), "dtype": torch.float64, "progress": False}
    several, trace = baum_welch(graph, blocks, epochs=20, restarts=4, seed=3, **settings)
    again, _ = baum_welch(graph, blocks, epochs=20, restarts=4, seed=3, **settings)
    short = [baum_welch(graph, blocks, epochs=2, seed=3 + k, **settings)[0] for k in range(4)]
    best = max(range(4), key=lambda k: score(graph, short[k], blocks))
    single, alone = baum_welch(graph, blocks, epochs=20, seed=3 + best, **settings)
    assert trace.log_likelihood == alone.log_likelihood
    for name, value in several.items():
        assert torch.equal(value, again[name]) and torch.equal(value, single[name])


def numpy_forward(start: np.ndarray, move: np.ndarray, emit: np.ndarray, row: np.ndarray) -> float:
    """log p(x) by the scaled forward recursion, in plain numpy."""
    belief, total = start * emit[:, row[0]], 0.0
    for value in row[1:]:
        total += math.log(belief.sum())
        belief = (belief / belief.sum()) @ move * emit[:, value]
    return total + math.log(belief.sum())


@pytest.mark.parametrize(("sites", "values", "states"), [(1, 3, 2), (2, 4, 5), (17, 27, 8), (200, 50, 16)])
def test_likelihoods_equal_hmmlearn(sites: int, values: int, states: int) -> None:
    graph = topologies.hidden_markov(sites, values, states)
    torch.manual_seed(sites)
    start, emit = torch.randn(states).double().log_softmax(-1), torch.randn(states, values).double()
    move = (2 * torch.randn(states, states)).double().log_softmax(-1)
    tables = {"initial": start, "emission": emit.log_softmax(-1)} | (
        {"transition": move} if sites > 1 else {}
    )
    model = hmm.CategoricalHMM(n_components=states, n_features=values)
    model.startprob_, model.transmat_ = start.exp().numpy(), move.exp().numpy()
    model.emissionprob_ = tables["emission"].exp().numpy()
    blocks = torch.randint(values, (5, sites))
    counts = {k: RunningCounts(v.exp(), torch.zeros(v.shape[-1]).to(v)) for k, v in tables.items()}
    found = Expectation(graph).log_likelihood(counts, blocks)
    one_hot = torch.eye(values, dtype=torch.float64).log()[blocks]
    queried = log_partition(compile(graph), {**tables, graph.tokens: one_hot})
    for i, row in enumerate(blocks.numpy()):
        expected = model.score(row[:, None])
        by_hand = numpy_forward(model.startprob_, model.transmat_, model.emissionprob_, row)
        assert by_hand == pytest.approx(expected, abs=1e-8)
        assert float(found[i]) == pytest.approx(expected, abs=1e-8)
        assert float(queried[i]) == pytest.approx(expected, abs=1e-8)


def test_one_update_equals_hmmlearn() -> None:
    graph = topologies.hidden_markov(9, 4, 3)
    blocks, _ = planted(graph, 30, 2)

    first = LatentPotentials(graph, seed=4)()
    settings = {"batch_size": None, "smoothing": 0.0, "start": Given(first), "dtype": torch.float64}
    found, _ = baum_welch(graph, blocks, epochs=5, progress=False, **settings)
    tables = {k: v.detach().exp().double().numpy() for k, v in first.items()}
    model = hmm.CategoricalHMM(n_components=3, n_features=4, n_iter=5, tol=-np.inf, init_params="")
    model.startprob_, model.transmat_, model.emissionprob_ = (
        tables[name] / tables[name].sum(-1, keepdims=True) for name in ("initial", "transition", "emission")
    )
    model.fit(blocks.reshape(-1, 1).numpy(), lengths=[9] * len(blocks))
    for name, expected in (
        ("initial", model.startprob_),
        ("transition", model.transmat_),
        ("emission", model.emissionprob_),
    ):
        assert np.allclose(found[name].exp().numpy(), expected, atol=1e-6), name


@pytest.mark.parametrize("start", [RandomStart(), Clones(), Clusters(), Clusters(order=2, offsets=(0, 1))])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_starts_are_tables_of_conditional_probabilities(graph: FactorGraph, start: object) -> None:
    blocks, _ = planted(graph, 40, 0)
    first = start.tables(graph, blocks, torch.Generator().manual_seed(1))
    again = start.tables(graph, blocks, torch.Generator().manual_seed(1))
    shapes = {name: value.shape for name, value in LatentPotentials(graph)().items()}
    assert {name: value.shape for name, value in first.items()} == shapes
    for name, value in first.items():
        assert bool(value.isfinite().all()) and torch.equal(value, again[name])
        torch.testing.assert_close(value.exp().sum(-1), torch.ones(value.shape[:-1]))


def test_settings() -> None:
    graph = topologies.hidden_markov(6, 3, 4)
    blocks, _ = planted(graph, 20, 0)
    for wrong in (
        {"restarts": 0},
        {"tolerance": -1.0},
        {"tolerance": 1e-3},
        {"dtype": torch.float16},
        {"batch_size": 0},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            baum_welch(graph, blocks, progress=False, **wrong)
    with pytest.raises(ShapeError):
        baum_welch(graph, blocks, valid_blocks=blocks[:, :3], progress=False)
    with pytest.raises(TokenError):
        baum_welch(graph, blocks, valid_blocks=blocks + 3, progress=False)


def test_ctrl_c_in_a_restart_keeps_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = topologies.star(6, 5, states=4)
    blocks, _ = planted(graph, 300, 1)
    settings = {"batch_size": None, "start": RandomStart(), "progress": False, "seed": 3}
    first, _ = baum_welch(graph, blocks, epochs=2, **settings)
    calls, real = [], Fit.update

    def interrupted(fit: Fit) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(fit)

    monkeypatch.setattr(Fit, "update", interrupted)
    tables, trace = baum_welch(graph, blocks, epochs=20, restarts=3, **settings)
    assert trace.interrupted and len(trace.log_likelihood) == 2
    assert all(torch.equal(tables[name], value) for name, value in first.items())


def test_a_fit_goes_on_from_given_tables() -> None:
    graph = topologies.hidden_markov(7, 5, 4)
    blocks, _ = planted(graph, 60, 3)
    settings = {"batch_size": None, "smoothing": 0.0, "dtype": torch.float64, "progress": False}
    whole, trace = baum_welch(graph, blocks, epochs=7, **settings)
    part, first = baum_welch(graph, blocks, epochs=3, **settings)
    rest, second = baum_welch(graph, blocks, epochs=4, start=Given(part), **settings)
    assert first.log_likelihood + second.log_likelihood == pytest.approx(trace.log_likelihood, abs=1e-9)
    for name, value in whole.items():
        torch.testing.assert_close(rest[name].exp(), value.exp(), atol=1e-9, rtol=0)
    with pytest.raises(PotentialsError, match="emission"):
        baum_welch(graph, blocks, start=Given({"initial": part["initial"]}), progress=False)


def test_a_subword_vocabulary_fits_into_memory() -> None:
    """Evidence over the vocabulary alone would be 64 x 16 x 30,000 numbers a minibatch, a hundred times over."""
    blocks = torch.randint(30_000, (64, 16)) // 7
    tables, trace = baum_welch(topologies.hidden_markov(16, 30_000, 32), blocks, epochs=2, progress=False)
    assert tables["emission"].shape == (32, 30_000) and math.isfinite(trace.final)
