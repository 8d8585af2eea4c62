"""Potentials that read hidden states: where they start, what they say, and that they learn what static ones can't."""

import math

import pytest
import torch

from codd_ppl import CouplingLayer, topologies
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.model_folder import load_model, save_model
from codd_ppl.potentials import ContextualLatentPotentials, LatentPotentials
from codd_ppl.testing import enumerate_log_joint, enumerate_sequences

SITES, VOCAB, STATES, HIDDEN = 4, 3, 2, 6
GRAPHS = {
    "hidden_markov": topologies.hidden_markov(SITES, VOCAB, STATES),
    "star": topologies.star(SITES, VOCAB, states=STATES),
    "latent_tree": topologies.latent_tree(SITES, VOCAB, STATES),
}


def hidden(*batch: int) -> torch.Tensor:
    return torch.randn(*batch, SITES, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


KINDS = {
    "evidence": {},
    "gates": {"gates": True},
    "emissions": {"emission_rank": 2},
    "mask ratio": {"mask_ratio": True},
    "reduced": {"gates": True, "reduced": 2},
    "all": {"gates": True, "emission_rank": 2, "mask_ratio": True},
}


def stirred(graph, kind: str) -> ContextualLatentPotentials:
    """With outputs that are no longer zero, and tables that couple much."""
    potentials = ContextualLatentPotentials(graph, HIDDEN, width=8, **KINDS[kind]).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in potentials.named_parameters():
            if name.startswith("static"):
                value.mul_(5)
            else:
                value.normal_(std=0.5, generator=generator)
    return potentials


@pytest.mark.parametrize("combine", ["projected", "product"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRAPHS)
def test_the_start_is_the_static_coupling(name, kind, combine):
    graph = GRAPHS[name]
    logits, known = hidden(5)[..., :VOCAB], hidden(5)[..., 0] > 0
    tokens = torch.zeros(5, SITES, dtype=torch.int64)
    found = [
        CouplingLayer(graph, VOCAB, HIDDEN, combine, p.double())(logits, hidden(5), tokens, known).marginals
        for p in (LatentPotentials(graph), ContextualLatentPotentials(graph, HIDDEN, **KINDS[kind]))
    ]
    torch.testing.assert_close(*found, rtol=0, atol=5e-3 if "gates" in KINDS[kind] else 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("combine", ["projected", "product"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRAPHS)
def test_it_is_a_law_of_the_tokens_for_each_batch_element(name, kind, combine):
    """Probabilities sum to 1, differ with the context, and projected ones have the network's marginals."""
    graph, logits = GRAPHS[name], hidden(2)[..., :VOCAB]
    coupling = CouplingLayer(graph, VOCAB, HIDDEN, combine, stirred(graph, kind), sweeps=40)
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
    potentials = stirred(graph, "gates")
    found = potentials(hidden(3))
    (key,) = [k for k in found if isinstance(k, tuple) and "," in k[0]]
    assert "transition" not in found and key == ("z0,z1", "z1,z2", "z2,z3")
    states = potentials.norm(hidden(3))
    table, reset = potentials.static()["transition"].exp(), potentials.resets[str(STATES)].softmax(-1)
    for i in range(3):
        gate = potentials.gate_head(torch.cat((states[:, i], states[:, i + 1]), -1)).sigmoid()[..., None]
        torch.testing.assert_close(found[key][:, i].exp(), gate * table + (1 - gate) * reset)
    torch.testing.assert_close(found[key].exp().sum(-1), torch.ones(3, 3, STATES, dtype=torch.float64))


@pytest.mark.parametrize("name", GRAPHS)
def test_the_law_is_that_of_the_formula_by_enumeration(name):
    """Tables are given to the enumeration one factor at a time, from the formula in the docstring."""
    graph = GRAPHS[name]
    potentials, logits = stirred(graph, "all"), hidden(2)[..., :VOCAB]
    ratio = torch.full((2,), 0.75, dtype=torch.float64)
    found, states = potentials(hidden(2), ratio), potentials.norm(hidden(2))
    tables = {k: v for k, v in found.items() if not (isinstance(k, tuple) and "x" in k[0])}
    static = potentials.static()
    for factor in graph.factors.values():
        if factor.scope[-1] in graph.tokens:
            place, key = graph.tokens.index(factor.scope[1]), factor.tie or factor.name
            correction = potentials.emissions
            number = f"table{list(dict.fromkeys(correction._users)).index(key)}"
            strength = correction.head(states, ratio)[:, place]
            change = torch.einsum(
                "bk,zk,kx->bzx", strength, correction.states[number], correction.values[number]
            )
            tables[factor.name] = static[key] + change
    tables[graph.tokens] = logits.log_softmax(-1)
    joint = enumerate_log_joint(graph, tables)
    latent = [1 + i for i, v in enumerate(graph) if v.latent]
    expected = joint.logsumexp(latent).flatten(1).log_softmax(-1)
    known = torch.zeros(2, SITES, dtype=torch.bool)
    known[:, 1] = True
    law = CouplingLayer(graph, VOCAB, HIDDEN, "product", potentials)(
        logits, hidden(2), torch.zeros(2, SITES, dtype=torch.int64), known
    )
    support = enumerate_sequences(VOCAB, SITES)
    given = torch.where(support[:, 1] == 0, expected, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(law.log_prob(support[:, None].expand(-1, 2, -1)).T, given)


def test_the_mask_ratio_is_read_and_starts_without_effect():
    graph = GRAPHS["hidden_markov"]
    plain = stirred(graph, "emissions")
    more = ContextualLatentPotentials(graph, HIDDEN, width=8, emission_rank=2, mask_ratio=True).double()
    lost = more.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert lost == ["evidence_heads.2.ratio", "emissions.head.ratio"]
    ratio = torch.tensor([0.25, 1.0])
    for key, value in plain(hidden(2)).items():
        assert torch.equal(more(hidden(2), ratio)[key], value)
    again = stirred(graph, "mask ratio")
    same = hidden(1).expand(2, -1, -1)
    first, second = again(same, ratio)["z0", "z1", "z2", "z3"]
    assert float((first - second).detach().abs().max()) > 1e-3
    with pytest.raises(ShapeError, match="ratio"):
        again(same)
    with pytest.raises(ShapeError, match="ratio"):
        again(same, ratio[:1])


def test_the_coupling_passes_the_share_of_masked_sites():
    potentials = stirred(GRAPHS["hidden_markov"], "mask ratio")
    coupling = CouplingLayer(GRAPHS["hidden_markov"], VOCAB, HIDDEN, potentials=potentials)
    known = torch.tensor([[True, False, False, False], [True, True, True, False]])
    found = coupling.log_potentials(hidden(2), known)
    for key, value in potentials(hidden(2), torch.tensor([0.75, 0.25])).items():
        assert torch.equal(found[key], value)


@pytest.mark.parametrize("combine", ["projected", "product"])
def test_gradients(combine):
    graph = GRAPHS["hidden_markov"]
    potentials = stirred(graph, "all")
    coupling = CouplingLayer(graph, VOCAB, HIDDEN, combine, potentials)
    names = [n for n, _ in coupling.named_parameters()]
    known = torch.tensor([[False] * SITES, [False, True, False, False]])
    x0 = torch.ones(2, SITES, dtype=torch.int64)

    def function(h, *values):
        state = dict(zip(names, values, strict=True))
        call = (hidden(2)[..., :VOCAB],), {"hidden": h, "tokens": x0, "known": known}
        return torch.func.functional_call(
            _LogProb(coupling, x0), {f"coupling.{k}": v for k, v in state.items()}, *call
        )

    leaves = [p.detach().clone().requires_grad_() for p in coupling.parameters()]
    assert torch.autograd.gradcheck(function, (hidden(2).requires_grad_(), *leaves), fast_mode=True)


class _LogProb(torch.nn.Module):
    def __init__(self, coupling, x0):
        super().__init__()
        self.coupling, self.x0 = coupling, x0

    def forward(self, *inputs, **named):
        return self.coupling(*inputs, **named).log_prob(self.x0)


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


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_trained_through_the_sweep(kind):
    graph = GRAPHS["hidden_markov"]
    coupling = CouplingLayer(graph, VOCAB, HIDDEN, potentials=stirred(graph, kind))
    x0 = torch.randint(VOCAB, (4, SITES), generator=torch.Generator().manual_seed(2))
    coupling(hidden(4)[..., :VOCAB], hidden=hidden(4)).log_prob(x0).sum().backward()
    idle = [n for n, p in coupling.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert idle == []


@pytest.mark.slow
@pytest.mark.ci
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


def test_it_learns_emissions_and_a_dependence_on_the_mask_ratio():
    """One state, so that only its emissions can change; they may only as the share of masked sites says."""
    graph = topologies.star(2, 2, states=1, tie="emission")
    potentials = ContextualLatentPotentials(graph, 1, width=8, emission_rank=1, mask_ratio=True)
    coupling = CouplingLayer(graph, 2, 1, combine="product", potentials=potentials)
    known = torch.tensor([[False, False], [True, False]]).repeat(8, 1)
    x0 = torch.zeros(16, 2, dtype=torch.int64)
    x0[0::2] = torch.tensor([1, 1])
    optimizer = torch.optim.Adam(coupling.parameters(), lr=0.05)
    for _ in range(100):
        law = coupling(torch.zeros(16, 2, 2), hidden=torch.zeros(16, 2, 1), tokens=x0, known=known)
        loss = -law.log_prob(x0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1  # 1.04 = 1.5 log 2 at the start, and about that without the ratio


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
        graph, VOCAB, 16, potentials=ContextualLatentPotentials(graph, 16, 8, **KINDS["all"])
    )
    network = BidirectionalTransformer(VOCAB, hidden_size=16, layers=1, heads=2)
    save_model(tmp_path / "model", network, coupling)
    found = load_model(tmp_path / "model").coupling
    assert isinstance(found.potentials, ContextualLatentPotentials) and found.hidden_size == 16
    assert found.potentials.needs_ratio
    for name, value in coupling.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def latents_over_nothing():
    graph = topologies.chain(2, 3)
    graph.add_variable("z0", 2, latent=True)
    return graph


def test_bad_input_is_refused():
    graph = GRAPHS["hidden_markov"]
    with pytest.raises(ConfigError, match="hidden_size"):
        ContextualLatentPotentials(graph, 0)
    with pytest.raises(ConfigError, match="latents"):
        ContextualLatentPotentials(topologies.chain(3, 2), 4)
    with pytest.raises(ConfigError, match="emission_rank"):
        ContextualLatentPotentials(graph, HIDDEN, emission_rank=-1)
    with pytest.raises(ConfigError, match="hang on latents"):
        ContextualLatentPotentials(latents_over_nothing(), HIDDEN, emission_rank=1)
    with pytest.raises(ConfigError, match="70,000"):
        ContextualLatentPotentials(topologies.hidden_markov(2, 35_000, 2), HIDDEN, emission_rank=1)
    potentials = ContextualLatentPotentials(graph, HIDDEN)
    for wrong in (None, torch.zeros(2, SITES, HIDDEN + 1), torch.zeros(2, SITES - 1, HIDDEN)):
        with pytest.raises(ShapeError, match="hidden states"):
            potentials(wrong)


def test_reduced_hidden_states_are_read_through_the_matrix():
    graph, text = GRAPHS["hidden_markov"], hidden(2)
    whole = ContextualLatentPotentials(graph, 3, width=8, gates=True).double()
    reduced = ContextualLatentPotentials(graph, HIDDEN, width=8, gates=True, reduced=3).double()
    with torch.no_grad():
        for value in whole.parameters():
            value.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
        matrix = torch.randn(HIDDEN, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        reduced.load_state_dict({**whole.state_dict(), "reduction": matrix})
    expected = whole(text @ matrix)
    for key, value in reduced(text).items():
        torch.testing.assert_close(value, expected[key])
    with pytest.raises(ConfigError, match="reduced"):
        ContextualLatentPotentials(graph, HIDDEN, reduced=HIDDEN + 1)
