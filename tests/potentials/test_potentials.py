"""Potentials started from text: counts against hand counts, expectation maximisation against enumeration."""

import itertools
import math

import pytest
import torch

import codd_ppl.potentials
from codd_ppl import FactorGraph, compile, topologies
from codd_ppl.errors import ConfigError, GraphError, ShapeError, TokenError
from codd_ppl.inference import log_partition
from codd_ppl.potentials import (
    LatentPotentials,
    RandomStart,
    TablePotentials,
    baum_welch,
    log_unigram,
    pointwise_mutual_information,
)
from codd_ppl.potentials.expectation import Expectation
from codd_ppl.potentials.fit import Fit
from codd_ppl.potentials.running_counts import RunningCounts


def text(n: int = 200, sites: int = 6) -> torch.Tensor:
    """Blocks of a sticky Markov chain over three tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 3, (n,), generator=generator)]
    for _ in range(sites - 1):
        stay = torch.rand(n, generator=generator) < 0.8
        rows.append(torch.where(stay, rows[-1], torch.randint(0, 3, (n,), generator=generator)))
    return torch.stack(rows, 1)


def test_counts() -> None:
    pairs = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1]])
    unigram = log_unigram(pairs, 2, pseudo_count=0.0)
    assert torch.allclose(unigram.exp(), torch.tensor([3 / 8, 5 / 8], dtype=torch.float64))
    table = pointwise_mutual_information([pairs], 2, unigram, pseudo_count=0.0)
    assert table[1, 1] == pytest.approx(math.log((2 / 4) / (5 / 8) ** 2)) and table[1, 0] == -math.inf
    assert bool(pointwise_mutual_information([pairs], 2, unigram).isfinite().all())


def test_a_chain_of_counts_is_the_bigram_model() -> None:
    blocks = text(5000)
    potentials = TablePotentials(topologies.chain(6, 3))
    found = potentials.init_from_corpus(blocks)
    assert found["edge"] > 0.2
    joint = potentials()["edge"] + potentials.evidence()[:, None] + potentials.evidence()
    counts = torch.zeros(3, 3).index_put_(
        (blocks[:, :-1].flatten(), blocks[:, 1:].flatten()), torch.tensor(1.0), accumulate=True
    )
    assert torch.allclose(joint.exp(), counts / counts.sum(), atol=2e-2)


def counted(graph, tables, blocks, look_up=True):
    """Expected counts as whole tables, and the log-likelihood, by the expectation step."""
    held = {
        name: RunningCounts(table.exp(), torch.zeros(table.shape[-1]).to(table))
        for name, table in tables.items()
    }
    found = Expectation(graph, look_up)(held, blocks)
    whole = {name: torch.zeros_like(table) for name, table in tables.items()}
    for name, value in found.dense.items():
        whole[name] += value
    for name, (tokens, rows) in found.rows.items():
        whole[name].T.index_add_(0, tokens, rows)
    return whole, found.log_likelihood


def test_expectation_matches_enumeration() -> None:
    """One step from fixed tables: expected counts by listing all latent paths."""
    graph, row = topologies.hidden_markov(3, 2, 2), torch.tensor([0, 1, 1])
    torch.manual_seed(1)
    tables = {k: v.detach().double() for k, v in LatentPotentials(graph)().items()}
    found, likelihood = counted(graph, tables, row[None])
    expected = {k: torch.zeros_like(v) for k, v in tables.items()}
    total = 0.0
    for z in itertools.product(range(2), repeat=3):
        log_p = tables["initial"][z[0]] + sum(tables["transition"][z[i], z[i + 1]] for i in range(2))
        p = float((log_p + sum(tables["emission"][z[i], row[i]] for i in range(3))).exp())
        total += p
        expected["initial"][z[0]] += p
        for i in range(3):
            expected["emission"][z[i], row[i]] += p
        for i in range(2):
            expected["transition"][z[i], z[i + 1]] += p
    assert likelihood == pytest.approx(math.log(total))
    for key, value in expected.items():
        assert torch.allclose(found[key], value / total, atol=1e-10)


def forest() -> FactorGraph:
    """A latent with two tokens and a latent of another size, which has one: tables of their own."""
    graph = FactorGraph()
    for name in ("x0", "x1", "x2"):
        graph.add_variable(name, 5)
    graph.add_variable("z0", 3, latent=True)
    graph.add_variable("z1", 4, latent=True)
    graph.add_factor(("z0", "z1"))
    for scope in (("z1", "x0"), ("z0", "x1"), ("z0", "x2")):
        graph.add_factor(scope)
    return graph


GRAPHS = {
    "hmm": topologies.hidden_markov(7, 5, 4),
    "latent tree": topologies.latent_tree(5, 5, 3),
    "latent tree, tables of their own": topologies.latent_tree(6, 5, 3, tie=False),
    "mixture": topologies.star(4, 5, states=3),
    "tied mixture": topologies.star(4, 5, states=3, tie="emission"),
    "forest": forest(),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_looking_tokens_up_gives_the_same_counts(
    graph: FactorGraph, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(2)
    tables = {
        k: (3 * torch.randn_like(v)).log_softmax(-1).to(dtype) for k, v in LatentPotentials(graph)().items()
    }
    blocks = torch.randint(5, (9, len(graph.tokens)))
    assert Expectation(graph).model is not None
    fast, likelihood = counted(graph, tables, blocks)
    slow, expected = counted(graph, tables, blocks, look_up=False)
    assert likelihood == pytest.approx(expected, abs=10 * tolerance, rel=tolerance)
    for name, value in slow.items():
        assert fast[name].dtype == dtype
        torch.testing.assert_close(fast[name], value, atol=tolerance * len(blocks), rtol=tolerance)


def test_tokens_that_are_no_leaves_keep_the_evidence_over_the_vocabulary() -> None:
    blocks = text(400)
    graph = topologies.chain(6, 3)
    graph.add_factor(("x0",))
    assert Expectation(graph).model is None
    tables, _ = baum_welch(graph, blocks, epochs=2, smoothing=0.0, progress=False)
    pairs = torch.zeros(3, 3).index_put_(
        (blocks[:, :-1].flatten(), blocks[:, 1:].flatten()), torch.tensor(1.0), accumulate=True
    )
    torch.testing.assert_close(tables["edge"].exp(), pairs / pairs.sum(-1, keepdim=True), atol=0.03, rtol=0)


def test_averaged_counts_are_the_average() -> None:
    torch.manual_seed(3)
    first, prior = torch.rand(4, 6).double(), torch.rand(6).double()
    running, plain = RunningCounts(first, prior), first.clone()
    for k in range(60):
        tokens, rows, step = torch.randint(6, (5,)), torch.rand(5, 4).double(), (k + 2) ** -0.6
        running.decay(step)
        running.add_rows(tokens, rows, step)
        plain = (1 - step) * plain + step * torch.zeros(6, 4).double().index_add(0, tokens, rows).T
    expected = ((plain + prior) / (plain + prior).sum(-1, keepdim=True)).log()
    torch.testing.assert_close(running.table(), expected)
    torch.testing.assert_close(
        running.rows(torch.tensor([[1, 1], [5, 0]])), expected.T[torch.tensor([[1, 1], [5, 0]])]
    )
    torch.testing.assert_close(running.penalty(), (prior * expected).sum())
    nothing = RunningCounts(first * 0, torch.zeros(6).double())
    assert torch.allclose(nothing.table().exp(), torch.full((4, 6), 1 / 6).double())
    assert torch.allclose(nothing.rows(torch.tensor([2])).exp(), torch.full((1, 4), 1 / 6).double())
    with pytest.raises(ShapeError, match="prior"):
        RunningCounts(first, prior[:3])


@pytest.mark.parametrize(
    "graph",
    [topologies.hidden_markov(6, 3, 4), topologies.latent_tree(6, 3, 3), topologies.star(6, 3, states=4)],
)
@pytest.mark.slow
@pytest.mark.ci
def test_the_likelihood_rises(graph: FactorGraph) -> None:
    blocks = text(1000)
    tables, trace = baum_welch(graph, blocks, epochs=6, start=RandomStart(), progress=False)
    again, _ = baum_welch(graph, blocks, epochs=6, start=RandomStart(), progress=False)
    alone = float((log_unigram(blocks, 3).exp() * log_unigram(blocks, 3)).sum())
    assert trace.final > trace.log_likelihood[0] and trace.final > alone + 0.1
    for key, value in tables.items():
        assert torch.equal(value, again[key]) and bool(value.isfinite().all())
        assert torch.allclose(value.exp().sum(-1), torch.ones(()), atol=1e-5)
    potentials = LatentPotentials(graph)
    potentials.init_from_corpus(blocks, progress=False, epochs=6)
    assert torch.allclose(log_partition(compile(graph), potentials()), torch.zeros(()), atol=1e-4)


def test_ctrl_c_keeps_what_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], Fit.update

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(Fit, "update", interrupted)
    potentials = LatentPotentials(topologies.hidden_markov(6, 3, 4))
    before = {k: v.clone() for k, v in potentials().items()}
    with pytest.raises(KeyboardInterrupt):
        potentials.init_from_corpus(text(), progress=False)
    assert len(calls) == 4 and not torch.allclose(potentials()["emission"], before["emission"])


def test_errors() -> None:
    graph, blocks = topologies.hidden_markov(6, 3, 4), text()
    for bad, error in ((blocks[:, :5], ShapeError), (blocks[:0], ShapeError), (blocks + 1, TokenError)):
        with pytest.raises(error):
            baum_welch(graph, bad, progress=False)
    with pytest.raises(ConfigError, match="epochs"):
        baum_welch(graph, blocks, epochs=0, progress=False)
    backwards = FactorGraph()
    backwards.add_variable("x0", 3)
    backwards.add_variable("z0", 2, latent=True)
    backwards.add_variable("z1", 2, latent=True)
    backwards.add_factor(("z0", "x0"))
    backwards.add_factor(("z1", "x0"))
    with pytest.raises(GraphError, match="parent, child"):
        LatentPotentials(backwards)
    with pytest.raises(GraphError, match="counts"):
        TablePotentials(backwards).init_from_corpus(blocks[:, :1])
    with pytest.raises(ConfigError, match="hidden_markov"):
        TablePotentials(topologies.chain(2, 20_000))
    assert codd_ppl.potentials.__all__
