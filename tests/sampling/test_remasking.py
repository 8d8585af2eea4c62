"""Masking again: the process keeps its marginals, a perfect joint its law; counts, history and errors."""

import math

import pytest
import torch

from codd_ppl.diffusion.schedules import CosineSchedule, LinearSchedule
from codd_ppl.errors import ConfigError
from codd_ppl.sampling import Cap, Confident, RemaskState, Rescale, Sampler, remasking_strategy
from codd_ppl.testing import chi_square_p_value

STRATEGIES = [Cap(0.3), Rescale(0.5), Confident(0.3)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def counts(tokens, vocab):
    place = vocab ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return (tokens * place).sum(-1).bincount(minlength=vocab ** tokens.shape[1])


def state(alpha_t, alpha_s, written=((True, True, False), (True, False, False)), confidence=None):
    written = torch.tensor(written)
    return RemaskState(torch.ones_like(written), written, alpha_t, alpha_s, confidence, seeded(0))


def test_the_formulas_by_hand():
    now = state(0.5, 0.75)
    assert now.sigma_max == 0.5
    assert Cap(0.04).sigma(now) == 0.04 and Cap(0.9).sigma(now) == 0.5 and Rescale(0.2).sigma(now) == 0.1
    assert Cap(0.04).rate(now) == pytest.approx((0.75 - 0.96 * 0.5) / 0.5)
    assert Cap(0.0).rate(now) == pytest.approx(0.5)  # the plain rate (alpha_s - alpha_t) / (1 - alpha_t)
    assert Rescale(1.0).rate(now) == pytest.approx(1.0)
    assert state(0.0, 0.1).sigma_max == 1.0 and state(0.8, 1.0).sigma_max == 0.0
    for alpha_t, alpha_s in ((0.1, 0.3), (0.5, 0.9), (0.7, 1.0)):  # a site stays written with chance alpha_s
        for strategy in (Cap(0.3), Rescale(0.7), Confident(0.3)):
            now = state(alpha_t, alpha_s)
            sigma, rate = strategy.sigma(now), strategy.rate(now)
            assert alpha_t * (1 - sigma) + (1 - alpha_t) * rate == pytest.approx(alpha_s)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()])
def test_the_masks_have_the_marginals_of_the_process(toy, strategy, schedule):
    toy, steps, rows = toy(sites=4, vocab=2), 4, 4_000
    sampler = Sampler(toy.denoiser, toy.perfect, "random", steps, schedule, remasking=strategy)
    generation = sampler.generate(toy.template(rows), seeded(1))
    assert generation.nfe == len(toy.denoiser.seen) == steps
    alphas = schedule.grid(steps, dtype=torch.float64).tolist()
    returned = 0
    for step, xt in enumerate(toy.denoiser.seen):
        share = float((xt != toy.mask).double().mean())
        alpha = alphas[steps - step]
        assert abs(share - alpha) < 5 * math.sqrt(max(alpha * (1 - alpha), 1e-12) / (4 * rows)) + 1e-9
        if step:
            returned += int(((toy.denoiser.seen[step - 1] != toy.mask) & (xt == toy.mask)).sum())
    assert returned > 0


@pytest.mark.parametrize("strategy", STRATEGIES[:2])
@pytest.mark.parametrize("policy", ["random", "random_order"])
def test_a_perfect_joint_keeps_its_law(toy, strategy, policy):
    toy = toy(vocab=2)
    sampler = Sampler(toy.denoiser, toy.perfect, policy, steps=4, remasking=strategy)
    tokens = sampler.generate(toy.template(8_000), seeded(2)).tokens
    assert chi_square_p_value(counts(tokens, 2), toy.joint.flatten()) > 1e-3


def test_doubtful_tokens_are_masked_again_rather_than_sure_ones():
    written = torch.ones(6_000, 3, dtype=torch.bool)
    confidence = torch.tensor([0.1, 0.5, 0.9]).expand(6_000, 3)
    again = (
        Confident(0.3).remask(RemaskState(written, written, 0.5, 0.8, confidence, seeded(0))).double().mean(0)
    )
    expected = 0.9 * torch.tensor([-0.1, -0.5, -0.9]).double().softmax(0)
    assert torch.allclose(again, expected, atol=0.03) and float(again.mean()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("policy", ["random", "random_order", "low_confidence", "joint_confidence"])
def test_templates_counts_and_history(toy, strategy, policy):
    toy = toy(sites=4, vocab=2)
    m = toy.mask
    template = torch.tensor([[m, m, m, m], [0, m, 1, m], [1, 1, 0, 0], [m, 0, 1, 1]]).repeat(20, 1)
    generation = Sampler(toy.denoiser, toy.perfect, policy, 6, remasking=strategy).generate(
        template, seeded(4)
    )
    masked = template == m
    assert torch.equal(generation.tokens[~masked], template[~masked])
    assert ((generation.tokens >= 0) & (generation.tokens < 2)).all()
    assert (generation.history[~masked] == -1).all()
    assert ((generation.history[masked] >= 0) & (generation.history[masked] < 6)).all()
    assert generation.nfe == len(toy.denoiser.seen) <= 6
    for xt in toy.denoiser.seen:
        assert (xt == m).any() and torch.equal(xt[~masked], template[~masked])
    again = any(
        bool(((a != m) & (b == m)).any())
        for a, b in zip(toy.denoiser.seen, toy.denoiser.seen[1:], strict=False)
    )
    assert again


def test_history_is_the_last_step_that_wrote_a_site(toy):
    toy, seen = toy(sites=4, vocab=2), []

    class Everything:
        def reveal(self, state):
            seen.append(state.masked.clone())
            return state.masked

    sampler = Sampler(toy.denoiser, toy.perfect, Everything(), steps=5, remasking=Cap(0.5))
    generation = sampler.generate(toy.template(50), seeded(5))
    last = torch.zeros(50, 4, dtype=torch.int64)
    for step, masked in enumerate(seen):
        last = torch.where(masked, step, last)
    written_at_the_end = generation.history == 4
    assert torch.equal(
        generation.history.masked_fill(written_at_the_end, 0), last.masked_fill(written_at_the_end, 0)
    )
    assert written_at_the_end.any() and not written_at_the_end.all()


def test_nothing_to_write_costs_nothing(toy):
    toy = toy()
    generation = Sampler(toy.denoiser, toy.perfect, remasking="cap").generate(
        torch.tensor([[0, 1, 2]]), seeded(0)
    )
    assert generation.nfe == 0 and toy.denoiser.seen == []


def test_confidence_is_recorded_when_asked(toy):
    toy = toy(sites=4, vocab=2)
    template = toy.template(30)
    template[:, 1] = 1
    sampler = Sampler(toy.denoiser, toy.perfect, "low_confidence", steps=3)
    plain, recorded = (sampler.generate(template, seeded(6), record=r) for r in (False, True))
    assert plain.confidence is None and torch.equal(plain.tokens, recorded.tokens)
    assert recorded.confidence.shape == template.shape and (recorded.confidence[:, 1] == 1).all()
    for step in range(3):  # what was known at a step is what history says
        xt = torch.where(recorded.history < step, recorded.tokens, toy.mask)
        marginals = toy.perfect(None, tokens=xt, known=xt != toy.mask).marginals
        expected = marginals.gather(-1, recorded.tokens[..., None])[..., 0].float()
        here = recorded.history == step
        assert torch.allclose(recorded.confidence[here], expected[here])
    assert sampler.generate(template[0], seeded(6), record=True).confidence.shape == (4,)


def test_names_and_errors():
    assert [remasking_strategy(n) for n in ("cap", "rescale", "confidence")] == [
        Cap(),
        Rescale(),
        Confident(),
    ]
    with pytest.raises(ConfigError, match=r"unmasking="):
        remasking_strategy("low_confidence")
    for wrong in (Cap, 3):
        with pytest.raises(ConfigError, match="remask"):
            remasking_strategy(wrong)
    for make in (Cap, Rescale, Confident):
        with pytest.raises(ConfigError, match="eta"):
            make(1.5)


def invalid_pairs(strategy, steps, vocab):
    """Chance that two tokens which must be equal differ in the end, for independent draws from exact marginals.

    A Markov chain over: both masked, one masked, both written and equal, both written and different.
    """
    alphas = LinearSchedule().grid(steps, dtype=torch.float64).tolist()
    none, one, equal, different = 1.0, 0.0, 0.0, 0.0
    for k in range(steps, 0, -1):
        now = state(alphas[k], alphas[k - 1])
        sigma, rate = (0.0, 1.0) if k == 1 else (strategy.sigma(now), strategy.rate(now))
        keep, written = 1 - sigma, equal + different
        none, one, equal, different = (
            none * (1 - rate) ** 2 + one * sigma * (1 - rate) + written * sigma**2,
            none * 2 * rate * (1 - rate)
            + one * (keep * (1 - rate) + sigma * rate)
            + written * 2 * sigma * keep,
            none * rate**2 / vocab + one * keep * rate + equal * keep**2,
            none * rate**2 * (1 - 1 / vocab) + different * keep**2,
        )
    assert none == one == 0.0 and equal + different == pytest.approx(1.0)
    return different


@pytest.mark.parametrize("strategy", [Cap(0.0), Cap(0.2), Rescale(0.5), Rescale(1.0)])
def test_what_it_does_to_pairs_that_are_drawn_independently(toy, strategy):
    """It doesn't mend them: masks that fall together are drawn anew together."""
    vocab, steps, rows = 5, 8, 6_000
    pairs = toy(joint=torch.eye(vocab, dtype=torch.float64))
    sampler = Sampler(pairs.denoiser, pairs.factorised, "random", steps, remasking=strategy)
    tokens = sampler.generate(pairs.template(rows), seeded(5)).tokens
    wrong, expected = int((tokens[:, 0] != tokens[:, 1]).sum()), invalid_pairs(strategy, steps, vocab)
    assert abs(wrong / rows - expected) < 4 * math.sqrt(expected * (1 - expected) / rows)
    plain = (1 - 1 / vocab) / steps  # both in the same one of the steps
    assert expected == pytest.approx(plain) if strategy.eta == 0 else expected > plain
    coupled = Sampler(pairs.denoiser, pairs.perfect, "random", steps, remasking=strategy)
    tokens = coupled.generate(pairs.template(rows), seeded(5)).tokens
    assert tokens[:, 0].equal(tokens[:, 1])
