"""The reverse process as a Pyro model and the noise as its guide: the enumerated bound, and the enumerated law."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.diffusion import (
    CosineSchedule,
    LinearSchedule,
    NoisedSequence,
    PosteriorReveal,
    RevealStep,
    ReverseProcess,
)
from codd_ppl.diffusion.enumeration import log_prob_fn, nelbo_exact
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.graphs import topologies
from codd_ppl.testing import enumerate_sequences

SCHEDULES = [LinearSchedule(), CosineSchedule()]
COUPLINGS = [(kind, combine) for kind in ("chain", "hidden_markov") for combine in ("projected", "product")]
STATES = enumerate_sequences(2, 3)


def exact(denoiser, coupling, steps, schedule):
    """NELBO_T of every sequence of three bits."""
    return nelbo_exact(STATES, steps, schedule, log_prob_fn(denoiser, coupling, 2), 2)


def losses(process, one_step, repeats, copies, subsample_size=None):
    """(repeats,) estimates by Trace_ELBO of the mean NELBO_T over all sequences."""
    elbo, x0 = Trace_ELBO(), STATES.repeat(copies, 1)
    found = []
    for seed in range(repeats):
        pyro.set_rng_seed(seed)
        with torch.no_grad():
            if one_step:
                loss = elbo.loss(process.step_model, process.step_guide, x0, subsample_size)
            else:
                loss = elbo.loss(process.model, process.guide, x0)
        found.append(loss / len(x0))
    return torch.tensor(found)


@pytest.mark.parametrize(("steps", "schedule"), [(2, LinearSchedule()), (3, CosineSchedule())])
@pytest.mark.parametrize(("kind", "combine"), COUPLINGS)
def test_whole_chain_is_the_enumerated_bound(real, assert_unbiased, kind, combine, steps, schedule):
    denoiser, coupling = real(kind, combine)
    process = ReverseProcess(denoiser, coupling, steps, schedule)
    truth = exact(denoiser, coupling, steps, schedule).mean()
    assert_unbiased(losses(process, False, 20, 60), truth)


@pytest.mark.parametrize(("kind", "combine"), COUPLINGS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_all_steps_at_once_are_the_enumerated_bound(real, assert_unbiased, kind, combine, schedule):
    """The plate of steps with all T = 3 of them."""
    denoiser, coupling = real(kind, combine)
    process = ReverseProcess(denoiser, coupling, 3, schedule)
    truth = exact(denoiser, coupling, 3, schedule).mean()
    assert_unbiased(losses(process, True, 20, 30, subsample_size=3), truth, precision=0.04)


@pytest.mark.parametrize(
    ("kind", "combine", "schedule"),
    [("hidden_markov", "projected", LinearSchedule()), ("chain", "product", CosineSchedule())],
)
@pytest.mark.slow
@pytest.mark.ci
def test_one_subsampled_step_times_T_is_the_enumerated_bound(real, assert_unbiased, kind, combine, schedule):
    """One step of T = 3, counted three times: a noisier estimate, as the steps differ, of the same bound."""
    denoiser, coupling = real(kind, combine)
    process = ReverseProcess(denoiser, coupling, 3, schedule)
    truth = exact(denoiser, coupling, 3, schedule).mean()
    assert_unbiased(losses(process, True, 200, 20, subsample_size=1), truth, precision=0.05)


@pytest.mark.parametrize("one_step", [True, False])
def test_one_step_in_all_has_no_noise(real, one_step):
    denoiser, coupling = real("hidden_markov")
    process = ReverseProcess(denoiser, coupling, 1)
    truth = exact(denoiser, coupling, 1, LinearSchedule()).mean()
    found = losses(process, one_step, 3, 1, 1)
    torch.testing.assert_close(found.double(), truth.detach().expand(3), rtol=1e-6, atol=1e-6)


def test_independent_topology_is_the_factorised_bound(real, assert_unbiased):
    denoiser, coupling = real("independent")
    process = ReverseProcess(denoiser, coupling, 3)
    truth = nelbo_exact(STATES, 3, LinearSchedule(), log_prob_fn(denoiser, None, 2), 2).mean()
    assert_unbiased(losses(process, False, 20, 60), truth)


@pytest.mark.parametrize("one_step", [True, False])
def test_gradients_of_the_elbo_are_those_of_the_enumerated_bound(real, assert_unbiased, one_step):
    denoiser, coupling = real("hidden_markov")
    process = ReverseProcess(denoiser, coupling, 2)
    parameters = [denoiser.weight, *coupling.parameters()]

    def flat(gradients):
        return torch.cat([g.flatten() for g in gradients])

    truth = flat(torch.autograd.grad(exact(denoiser, coupling, 2, LinearSchedule()).mean(), parameters))
    x0, found = STATES.repeat(40, 1), []
    model, guide = (process.step_model, process.step_guide) if one_step else (process.model, process.guide)
    for seed in range(40):
        pyro.set_rng_seed(seed)
        loss = Trace_ELBO().differentiable_loss(model, guide, *((x0, 2) if one_step else (x0,)))
        found.append(flat(torch.autograd.grad(loss / len(x0), parameters)))
    network = denoiser.weight.numel()
    for part in (slice(0, network), slice(network, None)):
        assert_unbiased(torch.stack(found)[:, part], truth[part], precision=0.06)


def test_svi_trains_network_and_coupling(real):
    """Two opposite sequences: the factorised bound at T = 1 is 3 bits, the joint has 1."""
    torch.manual_seed(0)
    denoiser = BidirectionalTransformer(2, hidden_size=8, layers=1, heads=2)
    coupling = CouplingLayer(topologies.hidden_markov(3, 2, 2), 2)
    process = ReverseProcess(denoiser, coupling, 1)
    before = {name: p.clone() for name, p in [*denoiser.named_parameters(), *coupling.named_parameters()]}
    x0 = torch.tensor([[0, 0, 0], [1, 1, 1]])
    svi = SVI(process.model, process.guide, Adam({"lr": 0.1}), Trace_ELBO())
    loss = [svi.step(x0) / 2 for _ in range(80)]
    assert loss[0] > 2.5 * math.log(2)
    assert loss[-1] < 1.5 * math.log(2)
    now = dict([*denoiser.named_parameters(), *coupling.named_parameters()])
    assert all(not torch.equal(before[name], now[name]) for name in ("head.bias", "potentials.tables.table1"))


# ---------------------------------------------------------------------- the model run forward


@pytest.mark.parametrize(
    ("steps", "schedule"), [(1, LinearSchedule()), (2, CosineSchedule()), (3, LinearSchedule())]
)
@pytest.mark.parametrize(("kind", "combine"), COUPLINGS)
def test_generation_has_the_enumerated_law(real, reverse_law, assert_follows, kind, combine, steps, schedule):
    denoiser, coupling = real(kind, combine)
    pyro.set_rng_seed(0)
    with torch.no_grad():
        draws = ReverseProcess(denoiser, coupling, steps, schedule).predictive(6000)()["x_0"]
        law = reverse_law(denoiser, coupling, steps, schedule, 3 * [2])
    assert draws.shape == (6000, 1, 3)
    assert_follows(draws[:, 0], law.reshape(2, 2, 2))


@pytest.mark.parametrize("kind", ["chain", "hidden_markov"])
def test_infilling_has_the_enumerated_law(real, reverse_law, assert_follows, kind):
    """A template per sequence of the batch: nothing known, one token known, all known."""
    denoiser, coupling = real(kind)
    template = torch.tensor([[2, 2, 2], [2, 1, 2], [0, 1, 1]])
    pyro.set_rng_seed(1)
    with torch.no_grad():
        draws = ReverseProcess(denoiser, coupling, 2).predictive(6000)(template=template)["x_0"]
        for row, start in enumerate(template.tolist()):
            law = reverse_law(denoiser, coupling, 2, LinearSchedule(), start)
            assert_follows(draws[:, row], law.reshape(2, 2, 2))
    assert (draws[:, 1, 1] == 1).all()
    assert (draws[:, 2] == template[2]).all()


def test_infilling_with_a_perfect_joint_is_the_conditional(real, exact_marginals, assert_follows):
    (_, prior), (_, coupling) = (real("hidden_markov", c, sites=4) for c in ("product", "projected"))
    with torch.no_grad():
        joint = prior(torch.zeros(4, 2, dtype=torch.float64)).log_prob(enumerate_sequences(2, 4)).exp()
        joint = joint.reshape(2, 2, 2, 2)
        process = ReverseProcess(exact_marginals(joint), coupling, 3)
        pyro.set_rng_seed(2)
        draws = process.predictive(6000)(template=torch.tensor([[2, 1, 2, 0]]))["x_0"][:, 0]
    assert (draws[:, 1] == 1).all() and (draws[:, 3] == 0).all()
    conditional = joint[:, 1, :, 0] / joint[:, 1, :, 0].sum()
    assert_follows(draws[:, [0, 2]], conditional)


def test_conditioning_any_site_of_the_program(real, reverse_law, assert_follows):
    """pyro.condition on an intermediate sequence x_1: the last step starts there."""
    denoiser, coupling = real("hidden_markov")
    process = ReverseProcess(denoiser, coupling, 2)
    given = torch.tensor([[2, 0, 2]])
    pyro.set_rng_seed(3)
    model = pyro.condition(process.model, data={"x_1": given})
    with torch.no_grad():
        draws = Predictive(model, num_samples=6000, return_sites=["x_0"], parallel=True)()["x_0"][:, 0]
        law = reverse_law(denoiser, coupling, 1, LinearSchedule(), given[0].tolist())
    assert_follows(draws, law.reshape(2, 2, 2))


def test_generation_with_a_transformer_and_a_batch_of_templates():
    torch.manual_seed(0)
    denoiser = BidirectionalTransformer(5, hidden_size=8, layers=1, heads=2)
    coupling = CouplingLayer(topologies.latent_tree(8, 5, 3), 5, hidden_size=8)
    process = ReverseProcess(denoiser, coupling, 4)
    template = torch.full((3, 8), 5)
    template[1, ::2] = 3
    for parallel in (True, False):
        draws = Predictive(process.model, num_samples=7, return_sites=["x_0"], parallel=parallel)(
            template=template
        )["x_0"]
        assert draws.shape == (7, 3, 8)
        assert ((draws >= 0) & (draws < 5)).all()
        assert (draws[:, 1, ::2] == 3).all()


def test_the_program_has_the_sites_it_says(real):
    denoiser, coupling = real("hidden_markov")
    process = ReverseProcess(denoiser, coupling, 3)
    guide = poutine.trace(process.guide).get_trace(STATES)
    model = poutine.trace(poutine.replay(process.model, guide)).get_trace(STATES)
    assert guide.stochastic_nodes == ["data", "x_3", "x_2", "x_1"]
    assert [n for n in model.nodes if n.startswith("x_")] == ["x_3", "x_2", "x_1", "x_0"]
    assert model.nodes["x_0"]["is_observed"]
    for name in ("x_3", "x_2", "x_1", "x_0"):
        hidden = (model.nodes[name]["value"] == 2).sum(-1)
        assert bool((model.nodes[name]["fn"].log_prob(model.nodes[name]["value"]) <= 0).all())
        assert (hidden == 3).all() if name == "x_3" else (hidden <= 3).all()
    assert (model.nodes["x_0"]["value"] == STATES).all()


# ---------------------------------------------------------------------- the laws of one step


def partly_masked():
    """All 27 sequences of three bits or masks."""
    return enumerate_sequences(3, 3)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_noise_is_a_law(assert_follows, alpha):
    law = NoisedSequence(torch.tensor([1, 0, 1]), alpha, 2)
    table = law.log_prob(partly_masked()).exp().double()
    assert float(table.sum()) == pytest.approx(1)
    assert_follows(law.sample((5000,)), table.reshape(3, 3, 3))


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_guide_and_model_steps_are_laws(real, assert_follows, rate):
    denoiser, coupling = real("hidden_markov")
    xt = torch.tensor([2, 0, 2])
    with torch.no_grad():
        joint = coupling(denoiser(xt).logits, tokens=xt, known=xt != 2)
        for law in (
            PosteriorReveal(xt, torch.tensor([1, 0, 0]), rate, 2),
            RevealStep(xt, rate, joint, 2),
        ):
            table = law.log_prob(partly_masked()).exp().double()
            assert float(table.sum()) == pytest.approx(1)
            assert_follows(law.sample((5000,)), table.reshape(3, 3, 3))


def test_the_choice_of_sites_cancels(real):
    """log model - log guide = log p(x_S | x_k): the paired difference that the ELBO averages."""
    denoiser, coupling = real("chain")
    x0 = STATES
    xt = torch.where(torch.rand(8, 3) < 0.4, x0, 2)
    joint = coupling(denoiser(xt).logits, tokens=xt, known=xt != 2)
    guide = PosteriorReveal(xt, x0, 0.5, 2)
    shown = guide.sample()
    difference = RevealStep(xt, 0.5, joint, 2).log_prob(shown) - guide.log_prob(shown)
    revealed = (xt == 2) & (shown != 2)
    torch.testing.assert_close(difference, joint.log_prob(x0, sites=revealed))


# ---------------------------------------------------------------------- bad input


def test_errors_name_the_remedy(real):
    denoiser, coupling = real("hidden_markov")
    process = ReverseProcess(denoiser, coupling, 2)
    with pytest.raises(ConfigError, match="has no mask_token_id"):
        ReverseProcess(lambda xt: denoiser(xt), coupling, 2)
    assert ReverseProcess(lambda xt: denoiser(xt), coupling, 2, mask_token_id=2).mask_token_id == 2
    with pytest.raises(ConfigError, match="steps"):
        ReverseProcess(denoiser, coupling, 0)
    with pytest.raises(ShapeError, match="one shape"):
        process.model(STATES, template=torch.full((2, 3), 2))
    with pytest.raises(ShapeError, match="one shape"):
        process.model(template=torch.tensor([2, 2, 2]))
    with pytest.raises(ShapeError, match="flatten the batch"):
        process.step_model(STATES[None])
    joint = coupling(denoiser(STATES).logits)
    with pytest.raises(ShapeError, match="one joint distribution per sequence"):
        RevealStep(STATES[:3], 0.5, joint, 2)


def test_two_networks_under_one_name_are_found_out(real):
    denoiser, coupling = real("hidden_markov")
    ReverseProcess(denoiser, coupling, 2).model(STATES)
    other, _ = real("hidden_markov")
    with pytest.raises(ConfigError, match="clear_param_store"):
        ReverseProcess(other, coupling, 2).model(STATES)
    ReverseProcess(other, coupling, 2, name="second").model(STATES)
    names = set(pyro.get_param_store().keys())
    assert {"reverse.denoiser$$$weight", "second.denoiser$$$weight"} <= names


def test_a_frozen_network_is_no_parameter(real):
    denoiser, coupling = real("hidden_markov")
    denoiser.requires_grad_(False)
    ReverseProcess(denoiser, coupling, 2).model(STATES)
    assert all(name.startswith("reverse.coupling") for name in pyro.get_param_store())


def test_a_frozen_model_runs_beside_one_that_is_trained_under_the_same_name(real):
    denoiser, coupling = real("hidden_markov")
    ReverseProcess(denoiser, coupling, 2).model(STATES)
    frozen = [module.requires_grad_(False) for module in real("hidden_markov")]
    draws = ReverseProcess(*frozen, 2).predictive(3)()["x_0"]
    assert draws.shape == (3, 1, 3)
    registered = {id(pyro.param(name).unconstrained()) for name in pyro.get_param_store()}
    assert registered == {id(parameter) for parameter in [*denoiser.parameters(), *coupling.parameters()]}


def test_coupled_outputs_are_sites_of_a_program_of_your_own(real):
    """A CoupledCategorical as a latent and an observed site beside the process's own."""
    denoiser, coupling = real("hidden_markov")

    def model(xt):
        joint = coupling(denoiser(xt).logits, tokens=xt, known=xt != 2)
        x0 = pyro.sample("x0", joint)
        pyro.sample("ones", dist.Delta(x0.sum(-1)), obs=torch.tensor(2))

    trace = poutine.trace(pyro.condition(model, data={"x0": torch.tensor([1, 0, 1])})).get_trace(
        torch.tensor([2, 0, 2])
    )
    joint = coupling(
        denoiser(torch.tensor([2, 0, 2])).logits,
        tokens=torch.tensor([2, 0, 2]),
        known=torch.tensor([False, True, False]),
    )
    torch.testing.assert_close(trace.log_prob_sum(), joint.log_prob(torch.tensor([1, 0, 1])))
