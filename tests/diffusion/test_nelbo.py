"""The bound from one noised batch: unbiased against enumeration, with real couplings, and its known limits."""

import math

import pytest
import torch

from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.diffusion.enumeration import log_prob_fn, nelbo_exact
from codd_ppl.diffusion.nelbo import NoisedBatch, coupled_nelbo, factorised_nelbo, noise
from codd_ppl.diffusion.schedules import CosineSchedule, LinearSchedule
from codd_ppl.errors import ConfigError, ShapeError, TokenError
from codd_ppl.testing import enumerate_sequences

SCHEDULES = [LinearSchedule(), CosineSchedule()]
COUPLINGS = [(kind, combine) for kind in ("chain", "hidden_markov") for combine in ("projected", "product")]
COUPLINGS.append(("latent_tree", "projected"))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def estimates(denoiser, coupling, x0, steps, schedule, copies, seed=0):
    """(copies, len(x0)) estimates of the bound; factorised if there is no coupling."""
    noised = noise(x0.repeat(copies, 1), steps, schedule, denoiser.mask_token_id, seeded(seed))
    output = denoiser(noised.xt)
    if coupling is None:
        return factorised_nelbo(noised, output.logits).reshape(copies, -1)
    dist = coupling(output.logits, hidden=output.hidden, tokens=noised.xt, known=noised.known)
    return coupled_nelbo(noised, output.logits, dist).reshape(copies, -1)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("steps", [2, 3, 8])
def test_factorised_is_unbiased_for_every_sequence(real, assert_unbiased, schedule, steps):
    denoiser, _ = real("independent", vocab=3, sites=3)
    x0 = enumerate_sequences(3, 3)
    truth = nelbo_exact(x0, steps, schedule, log_prob_fn(denoiser, None, 3), 3)
    assert_unbiased(estimates(denoiser, None, x0, steps, schedule, 4000), truth)


@pytest.mark.parametrize(("steps", "schedule"), [(2, LinearSchedule()), (5, CosineSchedule())])
@pytest.mark.parametrize(("kind", "combine"), COUPLINGS)
def test_coupled_is_unbiased_for_every_sequence(real, assert_unbiased, kind, combine, steps, schedule):
    denoiser, coupling = real(kind, combine)
    x0 = enumerate_sequences(2, 3)
    truth = nelbo_exact(x0, steps, schedule, log_prob_fn(denoiser, coupling, 2), 2)
    alone = nelbo_exact(x0, steps, schedule, log_prob_fn(denoiser, None, 2), 2)
    assert (truth - alone).abs().max() > 0.02  # the coupling does something
    assert_unbiased(estimates(denoiser, coupling, x0, steps, schedule, 4000), truth, precision=0.03)


@pytest.mark.parametrize(("kind", "combine"), COUPLINGS)
def test_one_step_has_no_noise(real, kind, combine):
    denoiser, coupling = real(kind, combine)
    x0 = enumerate_sequences(2, 3)
    blank = torch.full_like(x0, 2)
    expected = -coupling(denoiser(blank).logits).log_prob(x0)
    torch.testing.assert_close(estimates(denoiser, coupling, x0, 1, LinearSchedule(), 1)[0], expected)


@pytest.mark.parametrize(
    ("steps", "schedule"), [(1, LinearSchedule()), (2, CosineSchedule()), (3, LinearSchedule())]
)
@pytest.mark.parametrize(("kind", "combine"), COUPLINGS)
def test_bound_of_the_law_that_the_chain_samples_from(real, reverse_law, kind, combine, steps, schedule):
    """NELBO_T(x0) >= -log p_T(x0), p_T the enumerated law of T steps of generation; with equality for T = 1."""
    denoiser, coupling = real(kind, combine)
    with torch.no_grad():
        law = reverse_law(denoiser, coupling, steps, schedule, 3 * [2])
        bound = nelbo_exact(enumerate_sequences(2, 3), steps, schedule, log_prob_fn(denoiser, coupling, 2), 2)
    assert float(law.sum()) == pytest.approx(1)
    assert bool((bound >= -law.log() - 1e-9).all())
    if steps == 1:
        torch.testing.assert_close(bound, -law.log())


@pytest.mark.parametrize("steps", [1, 2, 4, math.inf])
@pytest.mark.parametrize("combine", ["projected", "product"])
def test_a_network_that_knows_the_prior_makes_the_projection_perfect(real, exact_marginals, combine, steps):
    """Logits = the HMM's own conditional marginals: projected, NELBO_T = -log p(x0); the product counts twice."""
    (_, coupling), (_, prior) = (real("hidden_markov", c, sites=4) for c in (combine, "product"))
    coupling.requires_grad_(False)
    x0 = enumerate_sequences(2, 4)
    log_joint = prior(torch.zeros(4, 2, dtype=torch.float64)).log_prob(x0).detach()
    denoiser = exact_marginals(log_joint.exp().reshape(2, 2, 2, 2))
    bound = nelbo_exact(x0, steps, LinearSchedule(), log_prob_fn(denoiser, coupling, 2), 2)
    excess = float(log_joint.exp() @ (bound + log_joint))
    if combine == "projected":
        torch.testing.assert_close(bound, -log_joint)
    else:
        assert excess > 1e-3


# ---------------------------------------------------------------------- the factorised model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("combine", ["projected", "product"])
def test_independent_topology_is_the_factorised_model_bit_for_bit(real, combine, dtype):
    _, coupling = real("independent", combine, vocab=11, sites=16, dtype=dtype)
    denoiser = BidirectionalTransformer(11, hidden_size=16, layers=1, heads=2).to(dtype)
    x0 = torch.randint(11, (40, 16), generator=seeded(0))
    for steps in (1, 4, 16):
        noised = noise(x0, steps, LinearSchedule(), denoiser.mask_token_id, seeded(steps))
        output = denoiser(noised.xt)
        dist = coupling(output.logits, hidden=output.hidden, tokens=noised.xt, known=noised.known)
        coupled, alone = coupled_nelbo(noised, output.logits, dist), factorised_nelbo(noised, output.logits)
        assert coupled.dtype == dtype
        assert torch.equal(coupled, alone)
        gradients = [
            torch.autograd.grad(loss.sum(), denoiser.head.weight, retain_graph=True)[0]
            for loss in (coupled, alone)
        ]
        torch.testing.assert_close(*gradients)


def test_linear_schedule_is_the_mdlm_loss_for_every_number_of_steps(real):
    """1/t sum over masked sites of -log softmax(l_i)[x0_i] (arXiv:2406.07524), at t = k/T."""
    denoiser, _ = real("independent", vocab=5, sites=6)
    x0 = torch.randint(5, (200, 6), generator=seeded(0))
    for steps in (1, 3, 1000):
        noised = noise(x0, steps, LinearSchedule(), 5, seeded(1))
        logits = denoiser(noised.xt).logits
        singles = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x0, reduction="none")
        mdlm = (singles * (noised.xt == 5)).sum(-1) / (noised.step / steps)
        torch.testing.assert_close(factorised_nelbo(noised, logits), mdlm, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_many_steps_reach_the_continuous_bound(real, assert_unbiased, schedule):
    """T -> infinity, real independent coupling: the MDLM bound, the same for both schedules."""
    denoiser, coupling = real("independent", vocab=2, sites=3)
    x0 = enumerate_sequences(2, 3)
    fn = log_prob_fn(denoiser, coupling, 2)
    limit = nelbo_exact(x0, math.inf, schedule, fn, 2)
    errors = [(nelbo_exact(x0, T, schedule, fn, 2) - limit).abs().max() for T in (10, 100, 1000)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0
    assert errors[2] < 2e-3
    assert_unbiased(estimates(denoiser, coupling, x0, 4000, schedule, 6000), limit, precision=0.03)


# ---------------------------------------------------------------------- noise and gradients


@pytest.mark.parametrize(("kind", "combine"), COUPLINGS[:4])
def test_gradients_are_unbiased(real, assert_unbiased, kind, combine):
    denoiser, coupling = real(kind, combine)
    x0 = torch.tensor([[0, 1, 1], [1, 1, 0]])
    parameters = [denoiser.weight, *coupling.parameters()]

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    truth = gradient(nelbo_exact(x0, 3, LinearSchedule(), log_prob_fn(denoiser, coupling, 2), 2).mean())
    found = torch.stack(
        [
            gradient(estimates(denoiser, coupling, x0, 3, LinearSchedule(), 500, seed).mean())
            for seed in range(40)
        ]
    )
    size = denoiser.weight.numel()
    for part in (slice(0, size), slice(size, None)):
        assert truth[part].abs().max() > 0.01
        assert_unbiased(found[:, part], truth[part], precision=0.05)


def test_the_paired_difference_is_far_less_noisy(real):
    """The coupled estimate, and still more the gain over the factorised one, against -T log p(x_S) itself."""
    denoiser, coupling = real("hidden_markov", sites=6)
    x0 = torch.randint(2, (4000, 6), generator=seeded(0))
    noised = noise(x0, 6, LinearSchedule(), 2, seeded(1))
    with torch.no_grad():
        logits = denoiser(noised.xt).logits
        dist = coupling(logits, tokens=noised.xt, known=noised.known)
        naive = -6 * dist.log_prob(x0, sites=noised.revealed)
        coupled, alone = coupled_nelbo(noised, logits, dist), factorised_nelbo(noised, logits)
    assert float(coupled.mean()) == pytest.approx(float(naive.mean()), rel=0.05)
    assert naive.var() > 1.5 * coupled.var()
    assert naive.var() > 5 * (coupled - alone).var()


def test_noise_is_stratified_seeded_and_leaves_x0_alone():
    x0 = torch.randint(7, (60, 5), generator=seeded(0))
    before = x0.clone()
    one, two = (noise(x0, 6, LinearSchedule(), 7, seeded(3)) for _ in range(2))
    assert torch.equal(x0, before)
    for name in ("xt", "known", "revealed", "step", "rate"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert one.step.bincount(minlength=7).tolist() == [0, 10, 10, 10, 10, 10, 10]
    assert torch.equal(one.known, one.xt != 7)
    assert torch.equal(one.masked, ~one.known)
    assert torch.equal(one.xt[one.known], x0[one.known])
    assert not (one.revealed & one.known).any()
    torch.testing.assert_close(one.rate, 1 / one.step)
    assert one.revealed[one.step == 1].equal(one.masked[one.step == 1])  # the last step reveals all
    assert not one.known[one.step == 6].any()  # the first one sees nothing


@pytest.mark.parametrize("shape", [(0, 3), (3,), (2, 4, 3), (5, 1)])
def test_batch_shapes(real, shape):
    denoiser, coupling = real("hidden_markov", sites=shape[-1])
    noised = noise(torch.zeros(shape, dtype=torch.long), 2, LinearSchedule(), 2, seeded(0))
    assert noised.step.shape == noised.rate.shape == shape[:-1]
    output = denoiser(noised.xt)
    dist = coupling(output.logits, tokens=noised.xt, known=noised.known)
    bound = coupled_nelbo(noised, output.logits, dist)
    assert bound.shape == shape[:-1]
    assert bool(bound.isfinite().all())


def test_nothing_masked_costs_nothing(real):
    denoiser, coupling = real("hidden_markov")
    x0 = torch.tensor([[0, 1, 1]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    noised = NoisedBatch(x0, x0, everything, ~everything, torch.tensor([1]), torch.ones(1), 4)
    logits = denoiser(x0).logits
    dist = coupling(logits, tokens=x0, known=everything)
    assert factorised_nelbo(noised, logits).tolist() == [0.0]
    assert coupled_nelbo(noised, logits, dist).tolist() == pytest.approx([0.0], abs=1e-12)


def test_a_token_that_the_network_rules_out_costs_everything(real):
    """+inf, and no NaN, whether it is among the revealed ones or not."""
    denoiser, coupling = real("hidden_markov")
    x0 = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 0, 1]])
    masked = torch.ones(3, 3, dtype=torch.bool)
    revealed = torch.tensor([[True, True, False], [True, False, True], [True, True, False]])
    xt = torch.full_like(x0, 2)
    noised = NoisedBatch(x0, xt, ~masked, revealed, torch.tensor([2, 2, 2]), torch.full((3,), 0.5), 2)
    logits = denoiser(xt).logits.detach()
    logits[:, 1, 1] = -torch.inf
    dist = coupling(logits, tokens=xt, known=~masked)
    for bound in (factorised_nelbo(noised, logits), coupled_nelbo(noised, logits, dist)):
        assert bound.isinf().tolist() == [True, True, False]
        assert bool((bound > 0).all())


def test_half_precision_logits_are_scored_in_single(real):
    x0 = torch.randint(5, (30, 6), generator=seeded(0))
    noised = noise(x0, 3, LinearSchedule(), 5, seeded(1))
    logits = 4 * torch.randn(30, 6, 5, generator=seeded(2))
    half = factorised_nelbo(noised, logits.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, factorised_nelbo(noised, logits.bfloat16().float()))


def test_errors_name_the_remedy(real):
    denoiser, _ = real("independent")
    x0 = torch.zeros(2, 3, dtype=torch.long)
    noised = noise(x0, 2, LinearSchedule(), 2)
    with pytest.raises(ShapeError, match=r"noised\.xt"):
        factorised_nelbo(noised, denoiser(x0).logits[:1])
    with pytest.raises(TokenError, match="mask_token_id"):
        noise(x0, 2, LinearSchedule(), 0)
    with pytest.raises(ShapeError, match="token ids"):
        noise(x0.float(), 2, LinearSchedule(), 2)
    for steps in (0, 1.5, True):
        with pytest.raises(ConfigError, match="steps"):
            noise(x0, steps, LinearSchedule(), 2)
