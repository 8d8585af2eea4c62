import itertools
import math

import pytest
import torch
from scipy.integrate import quad

from codd_ppl.diffusion.closed_forms import perfect_log_prob
from codd_ppl.diffusion.enumeration import log_prob_fn, nelbo_exact, pattern_weights, reveal_patterns
from codd_ppl.diffusion.schedules import CosineSchedule, LinearSchedule
from codd_ppl.errors import ConfigError
from codd_ppl.testing import enumerate_sequences

SCHEDULES = [LinearSchedule(), CosineSchedule()]


@pytest.mark.parametrize("sites", [1, 2, 4])
def test_reveal_patterns_are_all_pairs_once(sites):
    masked, revealed = reveal_patterns(sites)
    pairs = {(tuple(m), tuple(s)) for m, s in zip(masked.tolist(), revealed.tolist(), strict=True)}
    assert len(pairs) == len(masked) == 3**sites - 2**sites
    assert not (revealed & ~masked).any() and bool(revealed.any(-1).all())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(("sites", "steps"), [(1, 1), (3, 1), (3, 2), (4, 5)])
def test_weights_are_the_law_of_the_noise(schedule, sites, steps):
    """Against step-by-step products over sites; and each site is revealed in exactly one of the T steps."""
    alphas, weights = schedule.grid(steps, dtype=torch.float64), pattern_weights(sites, steps, schedule)
    masked, revealed = reveal_patterns(sites)
    shown = torch.zeros(sites, dtype=torch.float64)
    for m, s in zip(masked.tolist(), revealed.tolist(), strict=True):
        slow = 0.0
        for k in range(1, steps + 1):
            rate = (alphas[k - 1] - alphas[k]) / (1 - alphas[k])
            chance = [
                (1 - alphas[k]) * (rate if b else 1 - rate) if a else alphas[k]
                for a, b in zip(m, s, strict=True)
            ]
            slow += float(math.prod(chance))
        assert slow == pytest.approx(float(weights[sum(m), sum(s)]), rel=1e-12)
        shown += slow * torch.tensor(s)
    torch.testing.assert_close(shown, torch.ones(sites, dtype=torch.float64))


def test_weights_converge_to_the_continuous_limit():
    limit = pattern_weights(5, math.inf, LinearSchedule())
    for schedule in SCHEDULES:
        errors = [(pattern_weights(5, T, schedule) - limit)[1:, 1:].abs().max() for T in (100, 1000, 10_000)]
        assert errors[2] < 1e-3
        assert errors[0] / errors[1] == pytest.approx(10, rel=0.3)  # first order in 1/T


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(("vocab", "sites"), [(2, 4), (3, 3)])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, math.inf])
def test_perfect_joint_denoiser_is_tight_for_every_sequence(random_joint, schedule, vocab, sites, steps):
    """NELBO_T(x0) = -log p(x0), so that its expectation is H(x0), for every T."""
    joint = random_joint(vocab, sites)
    x0 = enumerate_sequences(vocab, sites)
    bound = nelbo_exact(x0, steps, schedule, perfect_log_prob(joint, vocab), vocab)
    torch.testing.assert_close(bound, -joint.flatten().log())


def test_infinite_steps_is_the_mdlm_bound(tiny):
    """Integral over t of (1/t) E_{xt} sum_{i masked} -log softmax(l_i)[x0_i], by quadrature over all masks."""
    denoiser, _ = tiny(3, 4, dtype=torch.float64)
    denoiser.requires_grad_(False)
    x0 = torch.tensor([[2, 0, 1, 1]])
    total = 0.0
    for mask in itertools.product([False, True], repeat=4):
        masked = torch.tensor(mask)
        if not masked.any():
            continue
        logits = denoiser(torch.where(masked, 3, x0)).logits
        cross_entropy = float(-logits.log_softmax(-1)[0, masked].gather(-1, x0[0, masked, None]).sum())
        m = int(masked.sum())
        total += cross_entropy * quad(lambda t, m=m: t ** (m - 1) * (1 - t) ** (4 - m), 0, 1)[0]
    fn = log_prob_fn(denoiser, None, 3)
    bounds = {T: float(nelbo_exact(x0, T, LinearSchedule(), fn, 3)) for T in (500, 1000, math.inf)}
    assert bounds[math.inf] == pytest.approx(total, rel=1e-9)
    for schedule in SCHEDULES:
        assert float(nelbo_exact(x0, math.inf, schedule, fn, 3)) == pytest.approx(total, rel=1e-9)
        assert float(nelbo_exact(x0, 2000, schedule, fn, 3)) == pytest.approx(total, rel=2e-3)
    assert abs(bounds[1000] - total) == pytest.approx(abs(bounds[500] - total) / 2, rel=0.02)


def test_infinite_steps_is_the_average_over_orders(tiny):
    """One token at a time, in every order: the same for a coupled denoiser."""
    denoiser, coupling = tiny(2, 3, dtype=torch.float64)
    fn = log_prob_fn(denoiser, coupling, 2)
    x0 = enumerate_sequences(2, 3)
    losses = []
    for order in itertools.permutations(range(3)):
        loss = torch.zeros(len(x0), dtype=torch.float64)
        for position, site in enumerate(order):
            known = torch.tensor([i in order[:position] for i in range(3)])
            revealed = (torch.arange(3) == site).expand(len(x0), 3)
            loss = loss - fn(x0, torch.where(known, x0, 2), revealed)
        losses.append(loss)
    torch.testing.assert_close(
        nelbo_exact(x0, math.inf, LinearSchedule(), fn, 2), torch.stack(losses).mean(0)
    )


def test_zero_coupling_is_the_factorised_model(tiny):
    denoiser, coupling = tiny(2, 4, spread=0.0, dtype=torch.float64)
    x0 = enumerate_sequences(2, 4)
    bounds = [nelbo_exact(x0, 3, LinearSchedule(), log_prob_fn(denoiser, c, 2), 2) for c in (coupling, None)]
    torch.testing.assert_close(*bounds)


def test_one_step_is_the_joint_itself(tiny):
    denoiser, coupling = tiny(3, 3, dtype=torch.float64)
    x0 = enumerate_sequences(3, 3)
    blank = torch.full_like(x0, 3)
    joint = coupling(denoiser(blank).logits, tokens=blank, known=blank != 3)
    bound = nelbo_exact(x0, 1, LinearSchedule(), log_prob_fn(denoiser, coupling, 3), 3)
    torch.testing.assert_close(bound, -joint.log_prob(x0))


def test_chunks_and_batch_shape_change_nothing(tiny):
    denoiser, coupling = tiny(2, 4, dtype=torch.float64)
    fn, x0 = log_prob_fn(denoiser, coupling, 2), enumerate_sequences(2, 4)
    whole = nelbo_exact(x0, 3, LinearSchedule(), fn, 2)
    for rows in (1, 100, 10**6):
        torch.testing.assert_close(nelbo_exact(x0, 3, LinearSchedule(), fn, 2, rows_per_call=rows), whole)
    folded = nelbo_exact(x0.reshape(2, 8, 4), 3, LinearSchedule(), fn, 2)
    torch.testing.assert_close(folded, whole.reshape(2, 8))
    torch.testing.assert_close(nelbo_exact(x0[5], 3, LinearSchedule(), fn, 2), whole[5])


def test_gradients_flow(tiny):
    denoiser, coupling = tiny(2, 3, dtype=torch.float64)
    fn = log_prob_fn(denoiser, coupling, 2)
    nelbo_exact(enumerate_sequences(2, 3), 2, LinearSchedule(), fn, 2).sum().backward()
    assert denoiser.weight.grad.abs().sum() > 0 and coupling.table.grad.abs().sum() > 0


def test_refuses_what_it_cannot_enumerate(tiny):
    denoiser, _ = tiny(2, 3)
    fn = log_prob_fn(denoiser, None, 2)
    with pytest.raises(ConfigError, match="12 sites"):
        nelbo_exact(torch.zeros(1, 13, dtype=torch.long), 2, LinearSchedule(), fn, 2)
    for steps in (0, 2.5, -math.inf):
        with pytest.raises(ConfigError, match="steps"):
            nelbo_exact(torch.zeros(1, 3, dtype=torch.long), steps, LinearSchedule(), fn, 2)
