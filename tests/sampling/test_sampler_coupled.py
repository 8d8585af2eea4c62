"""The sampler with a real transformer and real couplings: laws by enumeration, templates, seeds, edge cases."""

import itertools

import pytest
import torch

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.diffusion.schedules import CosineSchedule, LinearSchedule
from codd_ppl.errors import ConfigError
from codd_ppl.graphs import topologies
from codd_ppl.sampling import (
    Coupling,
    Entropy,
    JointDistribution,
    LowConfidence,
    Margin,
    Sampler,
    WarmCoupling,
    network_marginals,
)
from codd_ppl.spanning_tree_coupling import SpanningTreeCoupling
from codd_ppl.testing import chi_square_p_value, enumerate_sequences

POLICIES = ["random", "low_confidence", "margin", "entropy"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def models(graph, vocab, combine="projected", dropout=0.0, seed=0):
    """A transformer with lively logits and a coupling with strong random potentials."""
    torch.manual_seed(seed)
    denoiser = BidirectionalTransformer(vocab, hidden_size=16, layers=1, heads=2, dropout=dropout)
    coupling = CouplingLayer(graph, vocab, combine=combine)
    with torch.no_grad():
        denoiser.head.weight.normal_(std=0.5)
        for parameter in coupling.parameters():
            parameter.copy_(1.5 * torch.randn_like(parameter))
    return denoiser, coupling


@pytest.fixture(scope="module")
def hmm():
    """Twelve sites, seven tokens."""
    return models(topologies.hidden_markov(12, 7, 4), 7)


def counts(tokens, vocab):
    place = vocab ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return (tokens * place).sum(-1).bincount(minlength=vocab ** tokens.shape[1])


@torch.no_grad()
def joint_tables(denoiser, coupling, xts):
    """p(x | xt) over all sequences, one row for each xt."""
    now = torch.tensor(xts)
    output = denoiser(now)
    joint = coupling(output.logits, hidden=output.hidden, tokens=now, known=now != denoiser.mask_token_id)
    return joint.log_prob(enumerate_sequences(coupling.vocab_size, coupling.sites)[:, None]).exp().T


def joint_table(denoiser, coupling, xt):
    return joint_tables(denoiser, coupling, [xt])[0]


def law(denoiser, coupling, steps, schedule, template):
    """The law of ``steps`` random reverse steps, state by state (the mask is the id after the vocabulary)."""
    mask = denoiser.mask_token_id
    states = enumerate_sequences(coupling.vocab_size, coupling.sites).tolist()
    xts = enumerate_sequences(mask + 1, coupling.sites).tolist()
    rows = dict(zip(map(tuple, xts), joint_tables(denoiser, coupling, xts).tolist(), strict=True))
    rates = schedule.reveal_rates(steps).tolist()
    chances = {tuple(template): 1.0}
    for k in range(steps, 0, -1):
        after: dict[tuple[int, ...], float] = {}
        for xt, chance in chances.items():
            masked = [i for i, token in enumerate(xt) if token == mask]
            for coins in itertools.product((False, True), repeat=len(masked)):
                shown = {i for i, coin in zip(masked, coins, strict=True) if coin}
                share = rates[k - 1] ** len(shown) * (1 - rates[k - 1]) ** (len(masked) - len(shown))
                for x, p in zip(states, rows[xt], strict=True):
                    following = tuple(x[i] if i in shown else xt[i] for i in range(len(xt)))
                    after[following] = after.get(following, 0.0) + chance * share * p
        chances = {xt: p for xt, p in after.items() if p > 0}
    return torch.tensor([chances.get(tuple(x), 0.0) for x in states])


TOPOLOGIES = {
    "hidden_markov": lambda sites, vocab: topologies.hidden_markov(sites, vocab, 3),
    "latent_tree": lambda sites, vocab: topologies.latent_tree(sites, vocab, 3),
    "chain": topologies.chain,
    "independent": topologies.independent,
}


def test_real_objects_meet_the_protocols(hmm):
    denoiser, coupling = hmm
    assert isinstance(coupling, Coupling)
    assert isinstance(coupling(denoiser(torch.full((2, 12), 7)).logits), JointDistribution)


# ---------------------------------------------------------------------- laws


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("combine", ["projected", "product"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_one_step_draws_the_joint_whatever_the_policy(topology, combine, policy):
    """Two kinds of rows in one batch: nothing known, and one token known."""
    denoiser, coupling = models(TOPOLOGIES[topology](4, 3), 3, combine)
    template = torch.full((10_000, 4), 3)
    template[5000:, 2] = 1
    generation = Sampler(denoiser, coupling, policy, steps=1).generate(template, seeded(0))
    assert generation.nfe == 1
    for rows in (slice(0, 5000), slice(5000, None)):
        expected = joint_table(denoiser, coupling, template[rows][0].tolist())
        assert float(expected.sum()) == pytest.approx(1, abs=1e-5)
        assert chi_square_p_value(counts(generation.tokens[rows], 3), expected) > 1e-4


def test_the_chi_square_test_tells_the_joint_from_its_marginals():
    """The same network without the coupling: the joint draws don't pass as independent ones."""
    denoiser, coupling = models(topologies.hidden_markov(4, 3, 3), 3)
    alone = CouplingLayer(topologies.independent(4, 3), 3)
    tokens = Sampler(denoiser, coupling, steps=1).generate(torch.full((8000, 4), 3), seeded(0)).tokens
    assert chi_square_p_value(counts(tokens, 3), joint_table(denoiser, alone, 4 * [3])) < 1e-6


@pytest.mark.parametrize("topology", ["hidden_markov", "independent"])
@pytest.mark.parametrize(
    ("steps", "schedule"), [(2, LinearSchedule()), (3, CosineSchedule()), (5, LinearSchedule())]
)
def test_random_steps_have_the_law_of_the_model(topology, steps, schedule):
    """From an empty template and from one with a known token; five steps for three sites included."""
    denoiser, coupling = models(TOPOLOGIES[topology](3, 2), 2)
    for template in ([2, 2, 2], [2, 0, 2]):
        tokens = (
            Sampler(denoiser, coupling, "random", steps, schedule)
            .generate(torch.tensor([template]).repeat(10_000, 1), seeded(1))
            .tokens
        )
        expected = law(denoiser, coupling, steps, schedule, template)
        assert float(expected.sum()) == pytest.approx(1, abs=1e-5)
        assert chi_square_p_value(counts(tokens, 2), expected) > 1e-4


@pytest.mark.parametrize("policy", [LowConfidence, Margin, Entropy])
def test_a_confident_step_reveals_a_draw_of_the_joint(policy):
    """Two steps on three sites: one site by confidence, then two. Ranked by the network's own marginals."""
    denoiser, coupling = models(topologies.hidden_markov(3, 3, 3), 3)
    sampler = Sampler(denoiser, coupling, policy(network_marginals), steps=2)
    generation = sampler.generate(torch.full((12_000, 3), 3), seeded(2))
    first = generation.history[0].argmin()
    assert (generation.history == (torch.arange(3) != first).long()).all()
    joint = joint_table(denoiser, coupling, [3, 3, 3]).reshape(3, 3, 3)
    marginal = joint.sum([i for i in range(3) if i != first])
    expected = torch.zeros(27)
    for value in range(3):
        xt = [value if i == first else 3 for i in range(3)]
        expected += marginal[value] * joint_table(denoiser, coupling, xt)
    assert chi_square_p_value(counts(generation.tokens, 3), expected) > 1e-4


def test_projected_marginals_rank_as_the_network_does(hmm):
    """Its marginals are the network's (one sweep: nearly), so nearly the same sites come first."""
    denoiser, coupling = hmm
    template = torch.full((50, 12), 7)
    template[:, ::3] = torch.randint(7, (50, 4), generator=seeded(0))
    one, two = (
        Sampler(denoiser, coupling, policy, steps=2).generate(template, seeded(3)).history
        for policy in (LowConfidence(), LowConfidence(network_marginals))
    )
    assert (one == two).float().mean() > 0.9


# ---------------------------------------------------------------------- templates and edge cases


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_templates_of_known_and_masked_tokens(hmm, policy, steps):
    """A batch with rows empty, half known, known but for one, and full; also more steps than sites."""
    denoiser, coupling = hmm
    text = torch.randint(7, (4, 12), generator=seeded(0))
    hidden = torch.zeros(4, 12, dtype=torch.bool)
    hidden[0], hidden[1, ::2], hidden[2, 5] = True, True, True
    template = torch.where(hidden, 7, text)
    generation = Sampler(denoiser, coupling, policy, steps).generate(template, seeded(1))
    tokens, history = generation.tokens, generation.history
    assert tokens.dtype == history.dtype == torch.int64
    assert torch.equal(tokens[~hidden], text[~hidden])
    assert ((tokens >= 0) & (tokens < 7)).all()
    assert (history[~hidden] == -1).all()
    assert ((history[hidden] >= 0) & (history[hidden] < steps)).all()
    assert generation.nfe == len(history[hidden].unique()) <= min(steps, 19)


@pytest.mark.parametrize("policy", POLICIES)
def test_all_known_nothing_known_and_no_rows(hmm, policy):
    denoiser, coupling = hmm
    sampler = Sampler(denoiser, coupling, policy, steps=4)
    text = torch.randint(7, (3, 12), generator=seeded(0))
    full = sampler.generate(text, seeded(0))
    assert full.nfe == 0
    assert torch.equal(full.tokens, text)
    assert (full.history == -1).all()
    empty = sampler.generate(torch.full((5, 12), 7), seeded(0))
    assert 1 <= empty.nfe <= 4
    assert (empty.history >= 0).all()
    nobody = sampler.generate(torch.full((0, 12), 7), seeded(0))
    assert nobody.tokens.shape == nobody.history.shape == (0, 12)
    assert nobody.nfe == 0


@pytest.mark.parametrize("topology", ["hidden_markov", "latent_tree", "independent"])
def test_a_single_site_and_a_template_without_batch(topology):
    denoiser, coupling = models(TOPOLOGIES[topology](1, 3), 3)
    generation = Sampler(denoiser, coupling, steps=3).generate(torch.tensor([3]), seeded(0))
    assert generation.tokens.shape == generation.history.shape == (1,)
    assert generation.nfe == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_seeds(hmm, policy):
    sampler = Sampler(*hmm, policy, steps=3)
    template = torch.full((20, 12), 7)
    template[:, 4] = 2
    first, again, other = (sampler.generate(template, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.history, again.history)
    assert not torch.equal(first.tokens, other.tokens)
    before = torch.get_rng_state()
    sampler.generate(template, seeded(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    one = sampler.generate(template).tokens
    torch.manual_seed(9)
    assert torch.equal(sampler.generate(template).tokens, one)


def test_dropout_is_off_and_modes_come_back():
    denoiser, coupling = models(topologies.hidden_markov(6, 3, 2), 3, dropout=0.5)
    denoiser.train()
    sampler = Sampler(denoiser, coupling, steps=2)
    first, again = (sampler.generate(torch.full((20, 6), 3), seeded(0)).tokens for _ in range(2))
    assert torch.equal(first, again)
    assert denoiser.training
    assert denoiser.body[0].dropout.training


def test_generation_leaves_the_models_alone(hmm):
    denoiser, coupling = hmm
    before = {name: p.clone() for m in hmm for name, p in m.named_parameters()}
    Sampler(denoiser, coupling, "entropy", steps=3).generate(torch.full((3, 12), 7), seeded(0))
    after = {name: p for m in hmm for name, p in m.named_parameters()}
    assert all(torch.equal(before[name], after[name]) and after[name].grad is None for name in before)


def test_a_warm_start_hands_each_law_to_the_next_step(hmm, monkeypatch):
    denoiser, coupling = hmm
    starts, laws, forward = [], [], CouplingLayer.forward

    def noted(self, *args, start=None, **settings):
        starts.append(start)
        laws.append(forward(self, *args, start=start, **settings))
        return laws[-1]

    monkeypatch.setattr(CouplingLayer, "forward", noted)
    template = torch.full((3, 12), 7)
    sampler = Sampler(denoiser, coupling, "entropy", steps=4, warm_start=True)
    for _ in range(2):  # nothing is kept from one text to the next
        starts.clear()
        laws.clear()
        sampler.generate(template, seeded(0))
        assert len(laws) == 4 and starts[0] is None
        assert all(start is law for start, law in zip(starts[1:], laws[:-1], strict=True))
    starts.clear()
    Sampler(denoiser, coupling, "entropy", steps=4).generate(template, seeded(0))
    assert starts == [None] * 4, "off by default"


def test_at_the_fixed_point_a_warm_start_changes_nothing():
    """Same draws with many sweeps, other laws with one."""
    denoiser, coupling = models(topologies.hidden_markov(6, 5, 3), 5)
    denoiser, coupling = denoiser.double(), coupling.double()
    template = torch.full((40, 6), 5)
    for sweeps, same in ((60, True), (1, False)):
        coupling.sweeps = sweeps
        cold, warm = (
            Sampler(denoiser, coupling, steps=4, warm_start=w).generate(template, seeded(1)).tokens
            for w in (False, True)
        )
        assert torch.equal(cold, warm) or not same


def test_a_warm_start_needs_a_projection(hmm):
    denoiser, coupling = hmm
    assert isinstance(coupling, WarmCoupling) and coupling.warm_starts
    product = CouplingLayer(topologies.chain(12, 7), 7, combine="product")
    independent = CouplingLayer(topologies.independent(12, 7), 7)
    tree = SpanningTreeCoupling(12, 7)
    assert isinstance(tree, Coupling) and not isinstance(tree, WarmCoupling)
    for other in (product, independent, tree):
        Sampler(denoiser, other)
        with pytest.raises(ConfigError, match="no projection to start"):
            Sampler(denoiser, other, warm_start=True)
