"""Potentials that read hidden states: where they start, what they say, and that they learn what static ones can't."""

import math

import pytest
import torch

from codd_ppl import CouplingLayer, topologies
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.model_folder import load_model, save_model
from codd_ppl.potentials import ContextualLatentPotentials, LatentPotentials

SITES, VOCAB, STATES, HIDDEN = 4, 3, 2, 6
GRAPHS = {
    "hidden_markov": topologies.hidden_markov(SITES, VOCAB, STATES),
    "star": topologies.star(SITES, VOCAB, states=STATES),
    "latent_tree": topologies.latent_tree(SITES, VOCAB, STATES),
}


def hidden(*batch: int) -> torch.Tensor:
    return torch.randn(*batch, SITES, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def stirred(graph, gates: bool) -> ContextualLatentPotentials:
    """With outputs that are no longer zero, and tables that couple much."""
    potentials = ContextualLatentPotentials(graph, HIDDEN, width=8, gates=gates).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in potentials.named_parameters():
            if name.startswith("static"):
                value.mul_(5)
            else:
                value.normal_(std=0.5, generator=generator)
    return potentials


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_start_is_the_static_coupling(name, gates):
    graph = GRAPHS[name]
    logits = hidden(5)[..., :VOCAB]
    found = [
        CouplingLayer(graph, VOCAB, HIDDEN, potentials=p.double())(logits, hidden=hidden(5)).marginals
        for p in (LatentPotentials(graph), ContextualLatentPotentials(graph, HIDDEN, gates=gates))
    ]
    torch.testing.assert_close(*found, rtol=0, atol=5e-3 if gates else 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("combine", ["projected", "product"])
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_it_is_a_law_of_the_tokens_for_each_batch_element(name, gates, combine):
    """Probabilities sum to 1, differ with the context, and projected ones have the network's marginals."""
    graph, logits = GRAPHS[name], hidden(2)[..., :VOCAB]
    coupling = CouplingLayer(graph, VOCAB, HIDDEN, combine, stirred(graph, gates), sweeps=40)
    known = torch.tensor([[False] * SITES, [False, True, False, False]])
    tokens = torch.zeros(2, SITES, dtype=torch.int64)
    law = coupling(logits, hidden=hidden(2), tokens=tokens, known=known)
    logs = law.log_prob(law.enumerate_support())
    torch.testing.assert_close(logs.exp().sum(0), torch.ones(2, dtype=torch.float64))
    if combine == "projected":
        gap = (law.marginals - logits.softmax(-1)).abs() * ~known[..., None]
        assert float(gap.max()) < 1e-7
    other = coupling(logits, hidden=hidden(2).flip(0), tokens=tokens, known=known)
    gap = other.log_prob(law.enumerate_support()).exp() - logs.exp()
    assert float(gap.abs().max()) > 1e-6
    drawn = law.sample((2000,), torch.Generator().manual_seed(0))
    frequency = torch.nn.functional.one_hot(drawn, VOCAB).double().mean(0)
    assert float((frequency - law.marginals).abs().max()) < 0.05


def test_the_gate_s_formula():
    graph = GRAPHS["hidden_markov"]
    potentials = stirred(graph, gates=True)
    found = potentials(hidden(3))
    (key,) = [k for k in found if isinstance(k, tuple) and "," in k[0]]
    assert "transition" not in found and key == ("z0,z1", "z1,z2", "z2,z3")
    states = potentials.norm(hidden(3))
    table, reset = potentials.static()["transition"].exp(), potentials.resets[str(STATES)].softmax(-1)
    for i in range(3):
        gate = potentials.gate_head(torch.cat((states[:, i], states[:, i + 1]), -1)).sigmoid()[..., None]
        torch.testing.assert_close(found[key][:, i].exp(), gate * table + (1 - gate) * reset)
    torch.testing.assert_close(found[key].exp().sum(-1), torch.ones(3, 3, STATES, dtype=torch.float64))


def test_latents_read_the_tokens_at_or_below_them():
    place = ContextualLatentPotentials(GRAPHS["hidden_markov"], HIDDEN).place
    torch.testing.assert_close(place, torch.eye(SITES))
    place = ContextualLatentPotentials(GRAPHS["star"], HIDDEN).place
    torch.testing.assert_close(place, torch.full((1, SITES), 0.25))
    tree = ContextualLatentPotentials(GRAPHS["latent_tree"], HIDDEN)
    rows = dict(zip(next(iter(tree._latents.values())), tree.place, strict=True))
    torch.testing.assert_close(rows["z0"], torch.full((SITES,), 0.25))
    torch.testing.assert_close(rows["z1"], torch.tensor([0.5, 0.5, 0.0, 0.0]))
    assert sorted(row.count_nonzero().item() for row in tree.place) == [1, 1, 1, 1, 2, 2, 4]


@pytest.mark.parametrize("gates", [False, True])
def test_everything_is_trained_through_the_sweep(gates):
    graph = GRAPHS["hidden_markov"]
    coupling = CouplingLayer(graph, VOCAB, HIDDEN, potentials=stirred(graph, gates))
    x0 = torch.randint(VOCAB, (4, SITES), generator=torch.Generator().manual_seed(2))
    coupling(hidden(4)[..., :VOCAB], hidden=hidden(4)).log_prob(x0).sum().backward()
    idle = [n for n, p in coupling.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert idle == []


def test_it_learns_a_dependence_that_only_the_context_knows():
    """Two fair bits, equal or different as the hidden state says: 1 bit a pair, where a static coupling needs 2."""
    graph = topologies.hidden_markov(2, 2, 4)
    same = torch.tensor([0, 1]).repeat(32)
    first = torch.arange(64) // 2 % 2
    x0 = torch.stack((first, torch.where(same == 1, first, 1 - first)), -1)
    context = (2.0 * same - 1)[:, None, None] * torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    bits = {}
    for potentials in (LatentPotentials(graph, 1), ContextualLatentPotentials(graph, 2, width=8, seed=1)):
        coupling = CouplingLayer(graph, 2, 2, potentials=potentials)
        optimizer = torch.optim.Adam(coupling.parameters(), lr=0.05)
        for _ in range(200):
            loss = -coupling(torch.zeros(64, 2, 2), hidden=context).log_prob(x0).mean() / math.log(2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bits[type(potentials)] = float(loss.detach())
    assert bits[LatentPotentials] > 1.95
    assert bits[ContextualLatentPotentials] < 1.1


def test_a_start_from_text_changes_the_static_part_alone():
    graph = GRAPHS["hidden_markov"]
    potentials = ContextualLatentPotentials(graph, HIDDEN, gates=True)
    before = {n: p.clone() for n, p in potentials.named_parameters()}
    blocks = torch.randint(VOCAB, (50, SITES), generator=torch.Generator().manual_seed(3)).sort(-1).values
    potentials.init_from_corpus(blocks, progress=False)
    changed = {n for n, p in potentials.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.startswith(("static", "resets"))}
    mean = potentials.static()["transition"].exp().mean(0)
    torch.testing.assert_close(potentials.resets[str(STATES)].softmax(-1), mean)


def test_a_model_folder_keeps_it(tmp_path):
    graph = GRAPHS["hidden_markov"]
    coupling = CouplingLayer(
        graph, VOCAB, 16, potentials=ContextualLatentPotentials(graph, 16, 8, gates=True)
    )
    network = BidirectionalTransformer(VOCAB, hidden_size=16, layers=1, heads=2)
    save_model(tmp_path / "model", network, coupling)
    found = load_model(tmp_path / "model").coupling
    assert isinstance(found.potentials, ContextualLatentPotentials) and found.hidden_size == 16
    for name, value in coupling.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_bad_input_is_refused():
    graph = GRAPHS["hidden_markov"]
    with pytest.raises(ConfigError, match="hidden_size"):
        ContextualLatentPotentials(graph, 0)
    with pytest.raises(ConfigError, match="latents"):
        ContextualLatentPotentials(topologies.chain(3, 2), 4)
    potentials = ContextualLatentPotentials(graph, HIDDEN)
    for wrong in (None, torch.zeros(2, SITES, HIDDEN + 1), torch.zeros(2, SITES - 1, HIDDEN)):
        with pytest.raises(ShapeError, match="hidden states"):
            potentials(wrong)
