"""Mixtures of latent priors: the sum of their components by enumeration, zeros that stay, starts and weights."""

import math

import pytest
import torch

from codd_ppl import CouplingLayer, topologies
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.errors import ConfigError, GraphError, PotentialsError, ShapeError
from codd_ppl.graphs import FactorGraph
from codd_ppl.inference import log_partition
from codd_ppl.model_folder import load_model, save_model
from codd_ppl.potentials import LatentPotentials, MixturePotentials, MixtureStart, RandomStart, baum_welch
from codd_ppl.potentials.running_counts import RunningCounts
from codd_ppl.testing import enumerate_sequences

SITES, VOCAB, STATES, PARTS, HIDDEN = 4, 3, 2, 3, 6
GRAPHS = {
    "hidden_markov": lambda states: topologies.hidden_markov(SITES, VOCAB, states),
    "latent_tree": lambda states: topologies.latent_tree(SITES, VOCAB, states),
    "star": lambda states: topologies.star(SITES, VOCAB, states=states),
}


def hidden(*batch: int) -> torch.Tensor:
    return torch.randn(*batch, SITES, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mixture(name: str, context: bool = True, stir: bool = True) -> MixturePotentials:
    settings = {"hidden_size": HIDDEN, "width": 8, "mask_ratio": True} if context else {}
    potentials = MixturePotentials(GRAPHS[name](PARTS * STATES), PARTS, **settings).double()
    generator = torch.Generator().manual_seed(1)
    if stir:
        with torch.no_grad():
            for parameter in potentials.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return potentials


def components(potentials: MixturePotentials) -> list[LatentPotentials]:
    result = []
    for k in range(PARTS):
        part = LatentPotentials(potentials.part).double()
        with torch.no_grad():
            for name, key in potentials._keys.items():
                part.tables[part._keys[name]].copy_(potentials.tables[key][k])
        result.append(part)
    return result


def law_of(prior: LatentPotentials) -> torch.Tensor:
    """log p of every sequence."""
    coupling = CouplingLayer(prior.graph, VOCAB, combine="product", potentials=prior)
    zeros = torch.zeros(SITES, VOCAB, dtype=torch.float64)
    return coupling(zeros).log_prob(enumerate_sequences(VOCAB, SITES))


@torch.no_grad()
@pytest.mark.parametrize("name", GRAPHS)
def test_it_is_the_sum_of_its_components(name):
    """Also given known tokens and multiplied with logits, whose weights pi depend on the context."""
    potentials, logits = mixture(name), hidden(2)[..., :VOCAB]
    known = torch.tensor([[False] * SITES, [False, True, False, False]])
    tokens = torch.ones(2, SITES, dtype=torch.int64)
    weights = potentials.log_weights(hidden(2), torch.tensor([1.0, 0.75]))
    each = torch.stack([law_of(part) for part in components(potentials)])
    prior = (weights.T[:, None] + each[..., None]).logsumexp(0)  # (sequences, batch)
    torch.testing.assert_close(prior.logsumexp(0), torch.zeros(2, dtype=torch.float64))
    support = enumerate_sequences(VOCAB, SITES)[:, None].expand(-1, 2, -1)
    scores = logits.log_softmax(-1).expand(len(support), -1, -1, -1).gather(-1, support[..., None])[..., 0]
    joint = prior + torch.where(known, 0.0, scores).sum(-1)
    joint = torch.where((known & (support != tokens)).any(-1), -torch.inf, joint).log_softmax(0)
    coupling = CouplingLayer(potentials.graph, VOCAB, HIDDEN, "product", potentials)
    torch.testing.assert_close(coupling(logits, hidden(2), tokens, known).log_prob(support), joint)


@torch.no_grad()
@pytest.mark.parametrize("name", GRAPHS)
def test_projected_it_has_the_network_s_marginals(name):
    potentials, logits = mixture(name), hidden(2)[..., :VOCAB]
    coupling = CouplingLayer(potentials.graph, VOCAB, HIDDEN, potentials=potentials, sweeps=60)
    law = coupling(logits, hidden(2))
    torch.testing.assert_close(law.marginals, logits.softmax(-1), rtol=0, atol=1e-6)
    support = law.enumerate_support()
    torch.testing.assert_close(law.log_prob(support).exp().sum(0), torch.ones(2, dtype=torch.float64))
    drawn = law.sample((3000,), torch.Generator().manual_seed(0))
    pairs = torch.nn.functional.one_hot(drawn[..., 0] * VOCAB + drawn[..., -1], VOCAB**2).double().mean(0)
    ends = torch.nn.functional.one_hot(support[..., 0] * VOCAB + support[..., -1], VOCAB**2).double()
    expected = (law.log_prob(support).exp()[..., None] * ends).sum(0)
    assert float((pairs - expected).abs().max()) < 0.04


@torch.no_grad()
@pytest.mark.parametrize("combine", ["projected", "product"])
def test_the_weights_start_constant(combine):
    potentials = mixture("hidden_markov", stir=False)
    plain = MixturePotentials(potentials.graph, PARTS).double()
    plain.load_state_dict({k: v for k, v in potentials.state_dict().items() if k in plain.state_dict()})
    logits = hidden(3)[..., :VOCAB]
    laws = [
        CouplingLayer(p.graph, VOCAB, combine=combine, potentials=p)(logits, hidden(3)).marginals
        for p in (potentials, plain)
    ]
    torch.testing.assert_close(*laws, rtol=0, atol=1e-12)


@pytest.mark.parametrize("combine", ["projected", "product"])
@pytest.mark.parametrize("name", GRAPHS)
def test_gradients(name, combine):
    potentials, logits = mixture(name), hidden(2)[..., :VOCAB]
    coupling = CouplingLayer(potentials.graph, VOCAB, HIDDEN, combine, potentials)
    parameters, x0 = dict(potentials.named_parameters()), torch.ones(2, SITES, dtype=torch.int64)
    before = {k: v.detach().clone() for k, v in parameters.items()}

    def function(*values):
        tables = torch.func.functional_call(
            potentials, dict(zip(parameters, values, strict=True)), (hidden(2), torch.ones(2))
        )

        class Fixed(torch.nn.Module):
            evidence = potentials.evidence
            init_from_corpus = potentials.init_from_corpus

            def forward(self, hidden=None):
                return tables

        return CouplingLayer(potentials.graph, VOCAB, HIDDEN, combine, Fixed())(logits).log_prob(x0)

    leaves = [v.clone().requires_grad_() for v in before.values()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    coupling(logits, hidden(2)).log_prob(x0).sum().backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in parameters.values())


def text(count: int = 60) -> torch.Tensor:
    """0 1 0 1 and 1 0 1 0, 1 2 1 2 and 2 1 2 1, as often."""
    number = torch.arange(count)[:, None]
    return (number + torch.arange(SITES)) % 2 + number // 2 % 2


@pytest.mark.parametrize("batch_size", [None, 16])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_start_from_text_is_baum_welch_with_zeros_that_stay(name, batch_size):
    potentials = mixture(name, context=False)
    settings = {"epochs": 4, "batch_size": batch_size, "seed": 3, "dtype": torch.float64}
    trace = potentials.init_from_corpus(text(), progress=False, **settings)
    start = MixtureStart(PARTS)
    fitted, again = baum_welch(
        potentials.graph, text(), progress=False, start=start, keep_zeros=True, **settings
    )
    assert trace.log_likelihood == again.log_likelihood
    if batch_size is None:
        assert all(b >= a - 1e-9 for a, b in zip(trace.objective, trace.objective[1:], strict=False))
    for key, value in potentials().items():
        torch.testing.assert_close(value, fitted[key])
        if potentials._kinds[key] == "latent":
            impossible = torch.ones(PARTS, PARTS, dtype=torch.bool).fill_diagonal_(False)
            blocks = value.detach().reshape(PARTS, STATES, PARTS, STATES).movedim(2, 1)
            assert bool((blocks[impossible] == -torch.inf).all())
            assert bool((blocks[~impossible] > -torch.inf).all())
            torch.testing.assert_close(value.exp().sum(-1), torch.ones(len(value), dtype=torch.float64))


def test_components_find_the_kinds_of_blocks():
    graph = topologies.hidden_markov(SITES, VOCAB, 4)
    potentials = MixturePotentials(graph, 2)
    trace = potentials.init_from_corpus(text(200), progress=False, epochs=40, batch_size=None)
    assert potentials.weights.exp().tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    # Four kinds of blocks: their entropy is log 4, and nothing is left to gain.
    assert -trace.log_likelihood[-1] * SITES / math.log(4) == pytest.approx(1.0, abs=0.02)


def test_without_keeping_them_zeros_are_smoothed():
    graph, start = topologies.hidden_markov(SITES, VOCAB, PARTS * STATES), MixtureStart(PARTS, RandomStart())
    for keep in (False, True):
        tables, _ = baum_welch(graph, text(), progress=False, epochs=1, start=start, keep_zeros=keep)
        assert bool((tables["transition"] == -torch.inf).any()) == keep


@pytest.mark.parametrize("prior", [0.0, 0.3])
def test_counts_within_a_support(prior):
    support = torch.tensor([[True, True, False], [False, True, True], [True, False, False]])
    counts = RunningCounts(
        torch.tensor([[1.0, 3, 0], [0, 0, 0], [2, 0, 0]]), torch.full((3,), prior), support
    )
    expected = torch.tensor([[1 + prior, 3 + prior, 0], [0, 0.5, 0.5], [1, 0, 0]])
    expected[0] /= expected[0].sum()
    torch.testing.assert_close(counts.table().exp(), expected)
    torch.testing.assert_close(counts.rows(torch.tensor([2, 0])), counts.table().T[[2, 0]])
    penalty = (prior * counts.table()[support]).sum(dtype=torch.float64)
    torch.testing.assert_close(counts.penalty(), penalty)
    assert bool((counts.empty().table()[~support] == -torch.inf).all())


def test_priors_that_exist_already_and_their_weights():
    potentials = mixture("hidden_markov", context=False)
    priors = components(mixture("hidden_markov"))
    potentials.start_from(priors, torch.tensor([0.5, 0.3, 0.2]))
    found = CouplingLayer(potentials.graph, VOCAB, combine="product", potentials=potentials)
    logs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    expected = (torch.stack([law_of(p) for p in priors]) + logs[:, None]).logsumexp(0)
    law = found(torch.zeros(SITES, VOCAB, dtype=torch.float64))
    torch.testing.assert_close(law.log_prob(enumerate_sequences(VOCAB, SITES)), expected)
    for wrong in (priors[:2], [*priors[:2], LatentPotentials(topologies.hidden_markov(SITES, VOCAB, 5))]):
        with pytest.raises(PotentialsError, match="priors with tables"):
            potentials.start_from(wrong)
    with pytest.raises(PotentialsError, match="above 0"):
        potentials.start_from(priors, torch.tensor([1.0, 0.0, 1.0]))


def test_weights_learn_which_component_the_context_means():
    """One component says 0 0, the other 1 1; the hidden states know which: 0 bits where constant weights need 1."""
    graph = topologies.star(2, 2, states=2, tie="emission")
    potentials = MixturePotentials(graph, 2, hidden_size=2, width=8)
    x0 = torch.tensor([[0, 0], [1, 1]]).repeat(16, 1)
    context = torch.where(x0 == 0, 1.0, -1.0)[..., None] * torch.tensor([1.0, -1.0])
    coupling = CouplingLayer(graph, 2, 2, combine="product", potentials=potentials)
    optimizer = torch.optim.Adam(potentials.parameters(), lr=0.05)
    for _ in range(150):
        loss = -coupling(torch.zeros(32, 2, 2), context).log_prob(x0).mean() / math.log(2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1


@pytest.mark.parametrize("context", [False, True])
def test_a_model_folder_keeps_it(tmp_path, context):
    graph = topologies.hidden_markov(SITES, VOCAB, PARTS * STATES)
    settings = {"hidden_size": 16, "width": 8, "mask_ratio": True} if context else {}
    potentials = MixturePotentials(graph, PARTS, seed=5, **settings)
    coupling = CouplingLayer(graph, VOCAB, 16 if context else None, potentials=potentials)
    network = BidirectionalTransformer(VOCAB, hidden_size=16, layers=1, heads=2)
    save_model(tmp_path / "model", network, coupling)
    found = load_model(tmp_path / "model").coupling
    assert isinstance(found.potentials, MixturePotentials) and found.potentials.components == PARTS
    assert found.potentials.needs_ratio == context
    logits, states = torch.zeros(2, SITES, VOCAB), torch.randn(2, SITES, 16)
    x0 = torch.ones(2, SITES, dtype=torch.int64)
    laws = [c(logits, states).log_prob(x0) for c in (coupling, found)]
    assert torch.equal(*laws)


def test_large_tables_are_kept_and_edits_seen(monkeypatch):
    monkeypatch.setattr("codd_ppl.inference.kept.LARGE", 1)
    potentials = mixture("hidden_markov", context=False)
    with torch.no_grad():
        first, again = potentials(), potentials()
        assert first["emission"] is again["emission"] and first["transition"] is again["transition"]
        potentials.tables[potentials._keys["emission"]].mul_(2)
        assert not torch.equal(potentials()["emission"], first["emission"])
    total = log_partition(CouplingLayer(potentials.graph, VOCAB).plan, potentials())
    torch.testing.assert_close(total.detach(), torch.zeros((), dtype=torch.float64))


def test_bad_input_is_refused():
    with pytest.raises(GraphError, match="multiple of the components"):
        MixturePotentials(topologies.hidden_markov(SITES, VOCAB, 5), 2)
    with pytest.raises(GraphError, match="multiple of the components"):
        MixturePotentials(topologies.hidden_markov(SITES, VOCAB, 4), 0)
    for graph in (topologies.chain(3, 2), two_chains()):
        with pytest.raises(GraphError, match="one directed tree of latents"):
            MixturePotentials(graph, 1)
    shared = topologies.star(2, 4, states=4)
    shared.add_variable("z1", 4, latent=True)
    shared.add_factor(("z0", "z1"), tie="same")
    shared.add_variable("x2", 4)
    shared.add_factor(("z1", "x2"), tie="same")
    with pytest.raises(GraphError, match="two ties"):
        MixturePotentials(shared, 2)
    graph = topologies.hidden_markov(SITES, VOCAB, 4)
    for settings in ({"hidden_size": 0}, {"hidden_size": 3, "width": 0}, {"mask_ratio": True}):
        with pytest.raises(ConfigError, match="hidden_size"):
            MixturePotentials(graph, 2, **settings)
    for wrong in (None, torch.zeros(2, SITES, HIDDEN + 1)):
        with pytest.raises(ShapeError, match="hidden states"):
            mixture("hidden_markov")(wrong, torch.ones(2))
    with pytest.raises(ShapeError, match="ratio"):
        mixture("hidden_markov")(hidden(2))


def two_chains() -> FactorGraph:
    graph = topologies.independent(2, 2)
    for i in range(2):
        graph.add_variable(f"z{i}", 2, latent=True)
        graph.add_factor((f"z{i}",), name=f"initial{i}")
        graph.add_factor((f"z{i}", f"x{i}"))
    return graph
