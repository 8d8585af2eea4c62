"""Adaptive policies: the prefix by brute force, fewer steps on easy text, and what they cost."""

import pytest
import torch

from codd_ppl import CouplingLayer, topologies
from codd_ppl.denoisers import DenoiserOutput
from codd_ppl.errors import ConfigError
from codd_ppl.sampling import (
    ConfidenceThreshold,
    Entropy,
    EntropyBound,
    JointConfidence,
    JointEntropy,
    LowConfidence,
    RevealState,
    Sampler,
    network_marginals,
    unmasking_policy,
)
from codd_ppl.sampling.adaptive import longest_prefix
from codd_ppl.testing import chi_square_p_value, enumerate_sequences

ADAPTIVE = [JointConfidence(0.3), JointEntropy(1.2, draws=None), EntropyBound(1.0), ConfidenceThreshold(0.6)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def law(batch=6, sites=5, vocab=3, scale=2.0, sharp=1.5, seed=0):
    generator = seeded(seed)
    coupling = CouplingLayer(topologies.hidden_markov(sites, vocab, 3), vocab).double()
    for parameter in coupling.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    logits = sharp * torch.randn(batch, sites, vocab, generator=generator, dtype=torch.float64)
    known = torch.rand(batch, sites, generator=generator) < 0.3
    return coupling(logits, tokens=torch.zeros(batch, sites, dtype=torch.int64), known=known)


def state(dist, number=0, generator=None):
    masked = ~dist.known
    return RevealState(
        masked=masked,
        step=0,
        steps=9,
        rate=0.5,
        number=torch.full((len(masked),), number),
        generator=generator,
        coupled=lambda: dist.marginals.detach(),
        network=lambda: dist.marginals.detach(),
        joint=lambda: dist,
    )


def longest(dist, policy, criterion):
    """The prefix by trying all sizes of all rows, from tables of the joint."""
    marginals = dist.marginals.detach()
    joint = dist.log_prob(enumerate_sequences(3, 5)[:, None]).exp().detach().T.reshape(-1, 3, 3, 3, 3, 3)
    score = policy.order.confidence(marginals)
    result = torch.zeros_like(dist.known)
    for b, row in enumerate(dist.known.tolist()):
        order = sorted((i for i in range(5) if not row[i]), key=lambda i: -float(score[b, i]))
        size = max(
            [n for n in range(1, len(order) + 1) if criterion(joint[b], marginals[b], order[:n])] + [1]
        )
        result[b, order[:size]] = True
    return result


def joint_of(joint, sites):
    rest = [i for i in range(5) if i not in sites]
    return joint.sum(rest) if rest else joint


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("order", [LowConfidence(), Entropy()])
def test_joint_confidence_is_the_longest_prefix(threshold, order):
    dist, policy = law(), JointConfidence(threshold, order)

    def likely(joint, marginals, sites):
        best = [int(marginals[i].argmax()) for i in sorted(sites)]
        return float(joint_of(joint, sites)[tuple(best)]) >= threshold

    assert torch.equal(policy.reveal(state(dist)), longest(dist, policy, likely))


@pytest.mark.parametrize("threshold", [0.1, 0.7, 1.5, 3.0])
def test_joint_entropy_is_the_longest_prefix(threshold):
    dist, policy = law(), JointEntropy(threshold, draws=None)

    def certain(joint, marginals, sites):
        return float(torch.special.entr(joint_of(joint, sites)).sum()) <= threshold

    expected = longest(dist, policy, certain)
    assert torch.equal(policy.reveal(state(dist)), expected)
    many = JointEntropy(threshold, draws=4_000).reveal(state(dist, generator=seeded(1)))
    assert (many != expected).any(-1).sum() <= 1  # an estimate may miss a threshold that is close


@pytest.mark.parametrize("threshold", [0.1, 0.5, 1.0, 2.0])
def test_the_entropy_bound_is_the_longest_prefix(threshold):
    dist, policy = law(), EntropyBound(threshold)

    def independent(joint, marginals, sites):
        entropies = [float(torch.special.entr(marginals[i]).sum()) for i in sites]
        return sum(entropies) - max(entropies) <= threshold

    assert torch.equal(policy.reveal(state(dist)), longest(dist, policy, independent))


def test_the_confidence_threshold_looks_at_each_site_alone():
    dist = law()
    top = dist.marginals.detach().amax(-1)
    revealed = ConfidenceThreshold(0.6).reveal(state(dist))
    assert torch.equal(revealed & (top >= 0.6), ~dist.known & (top >= 0.6))
    assert (revealed & (top < 0.6)).sum(-1).max() <= 1
    assert (
        ConfidenceThreshold(1.1).reveal(state(dist, number=2)).sum(-1) == (~dist.known).sum(-1).clamp(max=2)
    ).all()


@pytest.mark.parametrize("policy", ADAPTIVE)
def test_thresholds_that_never_or_always_hold(policy):
    dist = law()
    at_least_one = (~dist.known).any(-1)
    strict = type(policy)(1.0 if isinstance(policy, JointConfidence) else 1e-9)
    if not isinstance(policy, ConfidenceThreshold):
        assert torch.equal(strict.reveal(state(dist, generator=seeded(0))).sum(-1), at_least_one.long())
        loose = type(policy)(0.0 if isinstance(policy, JointConfidence) else 1e9)
        assert torch.equal(loose.reveal(state(dist, generator=seeded(0))), ~dist.known)


def test_bisection_asks_for_all_rows_together():
    asked = []

    def holds(size):
        asked.append(size.tolist())
        return size <= torch.tensor([5, 1, 0, 100, 64])

    most = torch.tensor([100, 100, 100, 100, 0])
    assert longest_prefix(holds, most).tolist() == [5, 1, 1, 100, 0]
    assert len(asked) <= 7


class Table:
    """A network with these logits at every step; notes its calls."""

    def __init__(self, logits):
        self.logits, self.calls, self.hidden_size = logits, 0, 1
        self.vocab_size = self.mask_token_id = logits.shape[-1]

    def __call__(self, xt):
        self.calls += 1
        logits = self.logits.expand(len(xt), -1, -1)
        return DenoiserOutput(logits=logits, hidden=logits[..., :1])


@pytest.mark.parametrize(
    "name", ["joint_confidence", "joint_entropy", "entropy_bound", "confidence_threshold"]
)
def test_easy_text_takes_fewer_steps(name):
    coupling = CouplingLayer(topologies.hidden_markov(12, 5, 4), 5)
    logits = torch.randn(12, 5, generator=seeded(0))
    used = {}
    for sharpness in (0.0, 3.0, 40.0):
        denoiser = Table(sharpness * logits)
        sampler = Sampler(denoiser, coupling, name, steps=12)
        generation = sampler.generate(torch.full((3, 12), 5), seeded(1))
        assert generation.nfe == denoiser.calls == int(generation.history.max()) + 1
        assert (generation.tokens < 5).all()
        used[sharpness] = generation.nfe
    assert used[40.0] == 1 and used[0.0] >= 10 and used[40.0] < used[3.0] <= used[0.0]


def test_rows_that_are_finished_cause_no_calls_and_the_steps_are_a_maximum():
    coupling = CouplingLayer(topologies.hidden_markov(6, 3, 2), 3)
    denoiser = Table(torch.zeros(6, 3))
    template = torch.full((2, 6), 3)
    template[0, 1:] = 0
    sampler = Sampler(denoiser, coupling, JointConfidence(0.99), steps=50)
    generation = sampler.generate(template, seeded(0))
    assert generation.nfe == denoiser.calls == 6
    assert generation.history[0].tolist() == [0, -1, -1, -1, -1, -1]
    assert Sampler(denoiser, coupling, JointConfidence(0.99), steps=2).generate(template, seeded(0)).nfe == 2


@pytest.mark.parametrize("policy", [JointConfidence(0.3), EntropyBound(1.0)])
def test_a_step_draws_the_marginal_of_its_set(toy, policy):
    """The set depends on xt alone: the first step of all rows reveals the same one."""
    toy = toy(vocab=2)
    generation = Sampler(toy.denoiser, toy.perfect, policy, steps=3).generate(toy.template(8_000), seeded(2))
    first = (generation.history[0] == 0).nonzero()[:, 0]
    assert torch.equal((generation.history == 0).any(0).nonzero()[:, 0], first) and 0 < len(first) < 3
    found = (generation.tokens[:, first] * 2 ** torch.arange(len(first) - 1, -1, -1)).sum(-1)
    expected = toy.joint.sum([i for i in range(3) if i not in first.tolist()]).flatten()
    assert chi_square_p_value(found.bincount(minlength=len(expected)), expected) > 1e-3


def test_ranking_by_the_network_alone_asks_no_coupling():
    def refuse():
        raise AssertionError("the coupling was asked")

    dist = law()
    blind = RevealState(~dist.known, 0, 9, 0.5, torch.zeros(6, dtype=torch.int64), None, refuse,
                        lambda: dist.marginals.detach(), refuse)  # fmt: skip
    assert EntropyBound(0.5, Entropy(network_marginals)).reveal(blind).any()


def test_errors():
    for make in (
        lambda: JointConfidence(1.5),
        lambda: JointEntropy(-1.0),
        lambda: EntropyBound(float("inf")),
    ):
        with pytest.raises(ConfigError, match="threshold"):
            make()
    with pytest.raises(ConfigError, match="draws"):
        JointEntropy(1.0, draws=0)
    assert unmasking_policy("joint_confidence") == JointConfidence()
    lonely = state(law())
    without = RevealState(lonely.masked, 0, 9, 0.5, lonely.number, None, lonely.coupled, lonely.network)
    with pytest.raises(ConfigError, match="RevealState"):
        JointConfidence().reveal(without)


def test_an_order_with_a_temperature_is_random_and_prefers_confidence():
    marginals = torch.tensor([0.5, 0.7, 0.9])[:, None] * torch.tensor([1.0, 0.0]) + torch.tensor(
        [0.5, 0.3, 0.1]
    )[:, None] * torch.tensor([0.0, 1.0])
    many = RevealState(torch.ones(6_000, 3, dtype=torch.bool), 0, 9, 0.5, torch.ones(6_000, dtype=torch.int64),
                       seeded(0), lambda: marginals.expand(6_000, 3, 2), lambda: marginals)  # fmt: skip
    chosen = LowConfidence(temperature=0.2).reveal(many)
    expected = (torch.tensor([0.5, 0.7, 0.9]) / 0.2).softmax(0)
    assert chi_square_p_value(chosen.sum(0), expected) > 1e-3
    with pytest.raises(ConfigError, match="temperature"):
        LowConfidence(temperature=-1.0)
