"""Emissions tied to a network's unembedding: the formula, the fit, whose memory it is, folders."""

import copy
import math

import pytest
import torch

from codd_ppl import CouplingLayer, compile, topologies
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.errors import ConfigError, GraphError, ShapeError
from codd_ppl.inference import log_partition
from codd_ppl.model_folder import load_model, save_model
from codd_ppl.potentials import LatentPotentials, TiedEmissionPotentials, baum_welch, fit_tied
from codd_ppl.testing import enumerate_log_joint, enumerate_sequences

SITES, VOCAB, STATES, WIDTH = 3, 5, 3, 4
GRAPHS = {
    "hidden_markov": topologies.hidden_markov(SITES, VOCAB, STATES),
    "star": topologies.star(SITES, VOCAB, states=STATES, tie="emission"),
    "latent_tree": topologies.latent_tree(SITES, VOCAB, STATES),
}


def vectors(vocab: int = VOCAB, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(vocab, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def text() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (40, SITES), generator=generator).sort(-1).values


@torch.no_grad()
@pytest.mark.parametrize("combine", ["projected", "product"])
@pytest.mark.parametrize("name", GRAPHS)
def test_it_is_the_law_of_its_formula(name, combine):
    graph = GRAPHS[name]
    potentials = TiedEmissionPotentials(graph, vectors(), rank=2).double()
    found = potentials()
    scores = vectors() @ potentials.projection @ potentials.states.T + potentials.bias[:, None]
    torch.testing.assert_close(found["emission"], scores.T.log_softmax(-1))
    torch.testing.assert_close(log_partition(compile(graph), found), torch.zeros((), dtype=torch.float64))
    coupling = CouplingLayer(graph, VOCAB, combine=combine, potentials=potentials, sweeps=60)
    logits = torch.randn(2, SITES, VOCAB, dtype=torch.float64)
    law = coupling(logits)
    if combine == "projected":
        torch.testing.assert_close(law.marginals, logits.softmax(-1), rtol=0, atol=1e-6)
    tables = {**found, graph.tokens: law.log_evidence}
    latent = [1 + i for i, v in enumerate(graph) if v.latent]
    expected = enumerate_log_joint(graph, tables).logsumexp(latent).flatten(1).log_softmax(-1)
    torch.testing.assert_close(law.log_prob(enumerate_sequences(VOCAB, SITES)[:, None]).T, expected)


@pytest.mark.parametrize("combine", ["projected", "product"])
def test_gradients_reach_all_but_the_network(combine):
    potentials = TiedEmissionPotentials(GRAPHS["hidden_markov"], vectors(), rank=2).double()
    coupling = CouplingLayer(potentials.graph, VOCAB, combine=combine, potentials=potentials)
    names = [n for n, _ in potentials.named_parameters()]
    assert {n.split(".")[0] for n in names} == {"tables", "projection", "states", "bias"}
    logits, x0 = torch.randn(2, SITES, VOCAB, dtype=torch.float64), torch.ones(2, SITES, dtype=torch.int64)

    class LogProb(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.coupling = coupling

        def forward(self):
            return self.coupling(logits).log_prob(x0)

    def function(*values):
        state = {f"coupling.potentials.{n}": v for n, v in zip(names, values, strict=True)}
        return torch.func.functional_call(LogProb(), state, ())

    leaves = [p.detach().clone().requires_grad_() for p in potentials.parameters()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_a_table_of_that_rank_is_fitted_exactly():
    generator = torch.Generator().manual_seed(2)
    u = vectors(40, 8)
    states = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    table = (states @ torch.randn(3, 8, generator=generator, dtype=torch.float64) @ u.T / 3).log_softmax(-1)
    weights = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1
    fit = fit_tied(table, weights, u, rank=3, iterations=300)
    assert fit.lost < 1e-4 < 0.1 < fit.start - fit.entropy
    logs = (fit.states @ (u @ fit.projection).T + fit.bias).log_softmax(-1)
    share = weights / weights.sum()
    loss = -(share[:, None] * table.exp() * logs).sum() / math.log(2)
    assert fit.loss == pytest.approx(float(loss), abs=1e-9)
    frequency = share @ table.exp()
    assert fit.start == pytest.approx(float(-(frequency * frequency.log()).sum()) / math.log(2), abs=1e-9)
    less = fit_tied(table, weights, u, rank=1, iterations=300)
    assert fit.lost < less.lost < less.start - less.entropy


def test_in_chunks_it_is_the_same_fit(monkeypatch):
    table, u = torch.randn(6, 20, dtype=torch.float64).log_softmax(-1), vectors(20, 4)
    whole = fit_tied(table, torch.ones(6), u, rank=2, iterations=5)
    monkeypatch.setattr("codd_ppl.potentials.tied_fit.CHUNK", 40)
    parts = fit_tied(table, torch.ones(6), u, rank=2, iterations=5)
    torch.testing.assert_close(whole.states, parts.states)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_start_from_text_is_near_the_free_tables(name):
    """Width and rank suffice for every table here: so the start is the free prior."""
    graph = GRAPHS[name]
    potentials = TiedEmissionPotentials(graph, vectors(), rank=WIDTH).double()
    settings = {"epochs": 3, "smoothing": 0.1, "dtype": torch.float64, "progress": False}
    report = potentials.init_from_corpus(text(), iterations=500, **settings)
    free, trace = baum_welch(graph, text(), **settings)
    assert report.trace.log_likelihood == trace.log_likelihood
    assert report.fit.lost < 1e-3
    for key, value in potentials().items():
        torch.testing.assert_close(value.exp(), free[key].exp(), rtol=0, atol=0.02)
    one = potentials.start_from(free, iterations=1)
    assert one.lost > report.fit.lost


def test_the_vectors_are_the_network_s_and_edits_are_seen():
    network = BidirectionalTransformer(VOCAB, hidden_size=16, layers=1, heads=2)
    potentials = TiedEmissionPotentials(GRAPHS["hidden_markov"], network.unembedding, rank=3)
    assert not any("unembedding" in name for name in potentials.state_dict())
    with torch.no_grad():
        first = potentials()["emission"]
        assert potentials()["emission"] is first
        network.head.weight.mul_(5)
        second = potentials()["emission"]
        assert float((first - second).abs().max()) > 1e-3
        potentials.states.add_(1)
        assert not torch.equal(potentials()["emission"], second)
        other = copy.deepcopy(potentials)
        other.bias[0] += 3
        assert not torch.equal(other()["emission"], potentials()["emission"])
    assert potentials()["emission"].requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(potentials()["emission"], potentials._made())


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_model_folder_takes_them_from_its_network(tmp_path, dtype):
    network = BidirectionalTransformer(VOCAB, hidden_size=16, layers=1, heads=2).eval()
    graph = GRAPHS["hidden_markov"]
    potentials = TiedEmissionPotentials(graph, network.unembedding, rank=3, seed=4)
    coupling = CouplingLayer(graph, VOCAB, potentials=potentials)
    path = save_model(tmp_path / "model", network, coupling, dtype=dtype)
    saved = load_model(path)
    found = saved.coupling.potentials
    assert isinstance(found, TiedEmissionPotentials) and found.rank == 3
    assert found.unembedding.data_ptr() == saved.denoiser.head.weight.data_ptr()
    tolerance = {"rtol": 0, "atol": 0 if dtype is None else 1e-2}
    torch.testing.assert_close(found()["emission"], potentials()["emission"], **tolerance)
    with torch.no_grad():
        network.head.weight.copy_(torch.zeros_like(network.head.weight))
    assert torch.equal(potentials.unembedding, network.unembedding)
    strange = CouplingLayer(graph, VOCAB, potentials=TiedEmissionPotentials(graph, vectors().float(), rank=3))
    with pytest.raises(ConfigError, match="other vectors"):
        save_model(tmp_path / "other", network, strange)


def test_fewer_parameters_than_the_table():
    graph = topologies.hidden_markov(2, 1000, 64)
    counts = [
        sum(p.numel() for p in potentials.parameters())
        for potentials in (TiedEmissionPotentials(graph, vectors(1000, 32), rank=8), LatentPotentials(graph))
    ]
    rest = 64 + 64 * 64
    assert counts == [(64 + 32) * 8 + 1000 + rest, 64 * 1000 + rest]


def test_bad_input_is_refused():
    graph = GRAPHS["hidden_markov"]
    for wrong in (vectors(VOCAB + 1), vectors()[0]):
        with pytest.raises(ShapeError, match="unembedding"):
            TiedEmissionPotentials(graph, wrong)
    for rank in (0, WIDTH + 1):
        with pytest.raises(ConfigError, match="rank"):
            TiedEmissionPotentials(graph, vectors(), rank)
        with pytest.raises(ConfigError, match="rank"):
            fit_tied(torch.zeros(2, VOCAB), torch.ones(2), vectors(), rank)
    for other in (topologies.chain(3, VOCAB), topologies.star(3, VOCAB, states=2)):
        with pytest.raises(GraphError, match="one emission table"):
            TiedEmissionPotentials(other, vectors(), 2)
    with pytest.raises(ShapeError, match="weight for each state"):
        fit_tied(torch.zeros(2, VOCAB), torch.ones(3), vectors(), 2)
    with pytest.raises(ConfigError, match="iterations"):
        fit_tied(torch.zeros(2, VOCAB), torch.ones(2), vectors(), 2, iterations=0)
