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
    TablePotentials,
    baum_welch,
    log_unigram,
    pointwise_mutual_information,
)


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


def test_expectation_matches_enumeration() -> None:
    """One step from fixed tables: expected counts by listing all latent paths."""
    module = __import__("sys").modules["codd_ppl.potentials.baum_welch"]
    graph, row = topologies.hidden_markov(3, 2, 2), torch.tensor([0, 1, 1])
    torch.manual_seed(1)
    tables = {k: v.detach().double() for k, v in LatentPotentials(graph)().items()}
    names = ("x0", "x1", "x2")
    one_hot = torch.where(torch.eye(2, dtype=torch.bool), 0.0, -torch.inf).double()
    found, likelihood = module._expect(compile(graph), dict(tables), names, one_hot[row][None])
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


@pytest.mark.parametrize(
    "graph",
    [topologies.hidden_markov(6, 3, 4), topologies.latent_tree(6, 3, 3), topologies.star(6, 3, states=4)],
)
def test_the_likelihood_rises(graph: FactorGraph) -> None:
    blocks = text(1000)
    tables, trace = baum_welch(graph, blocks, epochs=6, progress=False)
    again, _ = baum_welch(graph, blocks, epochs=6, progress=False)
    alone = float((log_unigram(blocks, 3).exp() * log_unigram(blocks, 3)).sum())
    assert trace.final > trace.log_likelihood[0] and trace.final > alone + 0.1
    for key, value in tables.items():
        assert torch.equal(value, again[key]) and bool(value.isfinite().all())
        assert torch.allclose(value.exp().sum(-1), torch.ones(()), atol=1e-5)
    potentials = LatentPotentials(graph)
    potentials.init_from_corpus(blocks, progress=False, epochs=6)
    assert torch.allclose(log_partition(compile(graph), potentials()), torch.zeros(()), atol=1e-4)


def test_ctrl_c_keeps_what_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__("sys").modules["codd_ppl.potentials.baum_welch"]
    calls, real = [], module._expect

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_expect", interrupted)
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
