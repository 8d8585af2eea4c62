"""Scores of what was written: exact joints at one step, NELBO_T in expectation, the best of several."""

import pytest
import torch

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.diffusion.schedules import LinearSchedule
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.graphs import topologies
from codd_ppl.sampling import (
    BlockSampler,
    PathScore,
    Sampler,
    TextSampler,
    WholeTextSampler,
    WindowedCoupling,
    best_of,
    path_nelbo,
)
from codd_ppl.testing import enumerate_sequences

VOCAB, MASK = 2, 2


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    denoiser = BidirectionalTransformer(VOCAB, hidden_size=16, layers=1, heads=2).eval()
    coupling = CouplingLayer(topologies.hidden_markov(4, VOCAB, 3), VOCAB)
    with torch.no_grad():
        denoiser.head.weight.normal_(std=0.5)
        for parameter in coupling.parameters():
            parameter.copy_(1.5 * torch.randn_like(parameter))
    return denoiser, coupling


@torch.no_grad()
def law(models, xt):
    denoiser, coupling = models
    output = denoiser(xt)
    return coupling(output.logits, hidden=output.hidden, tokens=xt, known=xt != MASK)


def test_the_score_of_one_step_is_the_exact_joint(models):
    template = torch.tensor([[2, 2, 2, 2], [2, 1, 2, 2], [0, 1, 0, 1]])
    score = PathScore(3)
    tokens = Sampler(*models, steps=1).generate(template, seeded(0), on_step=score).tokens
    assert torch.allclose(score.log_prob.float(), law(models, template).log_prob(tokens), atol=1e-5)
    assert score.log_prob[2] == 0


def test_the_score_of_a_path_is_the_sum_over_its_steps(models):
    template = torch.full((20, 4), MASK)
    score = PathScore(20)
    found = Sampler(*models, "random", steps=3).generate(template, seeded(1), on_step=score)
    expected = torch.zeros(20)
    for step in range(3):
        xt = torch.where(found.history < step, found.tokens, MASK)
        expected += law(models, xt).log_prob(found.tokens, sites=found.history == step)
    assert torch.allclose(score.log_prob.float(), expected, atol=1e-4)


def test_blocks_and_windows_are_scored_too(models):
    """One step a block: the log-probability of the whole text, computed by hand."""
    denoiser, coupling = models
    rows = [torch.tensor([1, 2, 2, 2, 2, 2, 2, 2, 2]), torch.full((4,), MASK)]
    inner = Sampler(denoiser, coupling, steps=1)
    score = PathScore(2)
    found = BlockSampler(inner).generate(rows, seeded(0), on_step=score)
    x, total = found.tokens[0][None], 0.0
    for start in (1, 5):
        xt = torch.cat((x[:, :start], torch.full((1, 4), MASK)), 1)
        total += coupling(denoiser(xt).logits[:, start:]).log_prob(x[:, start : start + 4]).item()
    assert score.log_prob[0].item() == pytest.approx(total, abs=1e-4)
    assert score.log_prob[1].item() == pytest.approx(
        law(models, rows[1][None]).log_prob(found.tokens[1]).item(), abs=1e-4
    )
    score = PathScore(1)
    tokens = WholeTextSampler(inner).generate(rows[:1], seeded(0), on_step=score).tokens[0]
    xt = rows[0][None]
    dist = WindowedCoupling(coupling, 9)(denoiser(xt).logits, tokens=xt, known=xt != MASK)
    assert score.log_prob[0].item() == pytest.approx(dist.log_prob(tokens[None]).item(), abs=1e-4)


def test_best_of_keeps_the_likeliest(models):
    inner = Sampler(*models, steps=1)
    rows = [torch.tensor([1, 2, 2, 2]), torch.full((4,), MASK), torch.tensor([2, 2, 0, 2])]
    seen = []
    sampler = BlockSampler(inner)
    assert isinstance(sampler, TextSampler)
    best = best_of(sampler, rows, 16, seeded(0), on_step=seen.append)
    assert best.scores.shape == (3, 16) and torch.equal(best.log_prob, best.scores.amax(-1))
    assert seen and len(best.generation.tokens) == 3
    for row, tokens, score in zip(rows, best.generation.tokens, best.log_prob, strict=True):
        dist = law(models, row[None])
        assert dist.log_prob(tokens[None]).item() == pytest.approx(score.item(), abs=1e-4)
        states = enumerate_sequences(VOCAB, 4)[:, None]
        # sixteen draws of at most sixteen texts: the best drawn is far above the average one
        mean = float(dist.log_prob(states).exp()[:, 0] @ dist.log_prob(states)[:, 0].clamp_min(-50))
        assert score > mean
    assert best.generation.nfe.tolist() == [16, 16, 16] and best.generation.calls == 2
    assert best_of(sampler, [], 2).log_prob.shape == (0,)
    with pytest.raises(ConfigError, match="at least 1"):
        best_of(sampler, rows, 0)


@torch.no_grad()
def test_path_nelbo_is_the_bound(models):
    """Against the sum over steps, masks and revealed sets, all enumerated, given a known token."""
    x, template, T = torch.tensor([[1, 0, 0]]), torch.tensor([[2, 0, 2]]), 2
    denoiser = models[0]
    coupling = CouplingLayer(topologies.hidden_markov(3, VOCAB, 3), VOCAB)
    grid, rates = LinearSchedule().grid(T).tolist(), LinearSchedule().reveal_rates(T).tolist()
    expected = 0.0
    free = torch.tensor([0, 2])
    for k in range(1, T + 1):
        for masked in enumerate_sequences(2, 2).bool():
            chance = float(torch.where(masked, 1 - grid[k], grid[k]).prod())
            for coins in enumerate_sequences(2, 2).bool():
                share = float(torch.where(coins, rates[k - 1], 1 - rates[k - 1]).prod())
                xt, sites = x.clone(), torch.zeros(1, 3, dtype=torch.bool)
                xt[0, free[masked]] = MASK
                sites[0, free[masked & coins]] = True
                joint = coupling(denoiser(xt).logits, tokens=xt, known=xt != MASK)
                expected -= chance * share * joint.log_prob(x, sites=sites).item()
    found = path_nelbo(denoiser, coupling, x, template, T, draws=4000, generator=seeded(0))
    assert found.shape == (1,)
    assert found.item() == pytest.approx(expected, abs=0.02)
    one = path_nelbo(denoiser, coupling, x, template, 1)
    joint = coupling(denoiser(template).logits, tokens=template, known=template != MASK)
    assert one.item() == pytest.approx(-joint.log_prob(x).item(), abs=1e-5)
    with pytest.raises(ConfigError, match="draws"):
        path_nelbo(denoiser, coupling, x, template, T, draws=0)
    with pytest.raises(ShapeError, match="template's shape"):
        path_nelbo(denoiser, coupling, x, template[:, :2], T)
