"""CoupledCategorical as a site of Pyro models: observed, latent, enumerated, in plates, predicted."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.graphs import topologies

GRAPHS = {"chain": topologies.chain(3, 3), "hidden_markov": topologies.hidden_markov(3, 3, 2)}
SEQUENCES = testing.enumerate_sequences(3, 3)


@pytest.fixture(params=GRAPHS)
def prior(request):
    """A law of three tokens, the first element of a batch of one."""
    graph = GRAPHS[request.param]
    tables = testing.random_log_potentials(graph, seed=1)
    return CoupledCategorical(compile(graph), tables, torch.randn(3, 3, dtype=torch.float64))


def test_observed_site(prior):
    x0 = prior.expand((4,)).sample()

    def model():
        with pyro.plate("sequences", 4):
            pyro.sample("x", prior, obs=x0)

    trace = poutine.trace(model).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), prior.log_prob(x0).sum())
    loss = Trace_ELBO().loss(model, lambda: None)
    assert loss == pytest.approx(-float(prior.log_prob(x0).sum()))


def test_observed_site_under_scale_and_mask(prior):
    x0, mask = prior.expand((4,)).sample(), torch.tensor([True, False, True, True])

    def model():
        with pyro.plate("sequences", 40, subsample_size=4), poutine.mask(mask=mask):
            pyro.sample("x", prior, obs=x0)

    expected = 10 * prior.log_prob(x0)[mask].sum()
    torch.testing.assert_close(poutine.trace(model).get_trace().log_prob_sum(), expected)


def test_gradients_reach_a_learnable_table():
    plan, x0 = compile(GRAPHS["chain"]), torch.tensor([[0, 1, 2], [0, 1, 1]])

    def model():
        edge = pyro.param("edge", torch.zeros(3, 3))
        with pyro.plate("sequences", 2):
            pyro.sample("x", CoupledCategorical(plan, {"edge": edge}, torch.zeros(3, 3)), obs=x0)

    optimiser = pyro.optim.Adam({"lr": 0.1})
    svi = pyro.infer.SVI(model, lambda: None, optimiser, Trace_ELBO())
    losses = [svi.step() for _ in range(60)]
    assert losses[0] == pytest.approx(6 * math.log(3), rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]


def test_latent_site_in_model_and_guide(prior):
    """Model and guide of one law: the evidence bound is exact, draw by draw."""
    noisy = torch.tensor(2)

    def model():
        x = pyro.sample("x", prior)
        pyro.sample("y", pyro.distributions.Categorical(logits=_likelihood(x)), obs=noisy)

    values = SEQUENCES
    logs = prior.log_prob(values) + _likelihood(values).log_softmax(-1)[..., 2]
    evidence = logs.logsumexp(0)
    # The posterior is again a coupled law: the observation depends on x0 alone.
    evidence_x0 = _likelihood(torch.arange(3)[:, None]).log_softmax(-1)[:, 2]
    tables = {k: v for k, v in prior.log_potentials.items() if k != prior.sites}
    shifted = prior.log_evidence.clone()
    shifted[0] += evidence_x0
    posterior = CoupledCategorical(prior.plan, tables, shifted)

    def guide():
        pyro.sample("x", posterior)

    losses = [Trace_ELBO().loss(model, guide) for _ in range(5)]
    assert losses == pytest.approx([-float(evidence)] * 5)


def _likelihood(x: torch.Tensor) -> torch.Tensor:
    """Logits of an observation with three values that depends on the first token."""
    return torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, -1.0], [0.5, 0.5, 0.0]], dtype=torch.float64)[x[..., 0]]


@pytest.mark.parametrize("plated", [False, True])
def test_enumerated_latent_site(prior, plated):
    """TraceEnum_ELBO sums the sequences out: -log p(y), exactly, with gradients."""
    noisy = torch.tensor([2, 0, 1])
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    @config_enumerate(default="parallel")
    def alone():
        x = pyro.sample("x", prior)
        pyro.sample("y", pyro.distributions.Categorical(logits=scale * _likelihood(x)), obs=noisy[0])

    @config_enumerate(default="parallel")
    def many():
        with pyro.plate("sequences", 3):
            x = pyro.sample("x", prior)
            pyro.sample("y", pyro.distributions.Categorical(logits=scale * _likelihood(x)), obs=noisy)

    logs = prior.log_prob(SEQUENCES)[:, None] + (scale * _likelihood(SEQUENCES)).log_softmax(-1)
    by_value = logs.logsumexp(0)
    expected = -(by_value[noisy].sum() if plated else by_value[2])
    elbo = TraceEnum_ELBO(max_plate_nesting=1 if plated else 0)
    loss = elbo.differentiable_loss(many if plated else alone, lambda: None)
    torch.testing.assert_close(loss, expected)
    (found,), (wanted,) = torch.autograd.grad(loss, scale), torch.autograd.grad(expected, scale)
    torch.testing.assert_close(found, wanted)


def test_enumeration_with_known_tokens(prior):
    """Sequences that contradict what is known have chance 0: they must not turn the sum into NaN."""
    known = prior.condition(torch.tensor([1, 0, 0]), torch.tensor([True, False, False]))

    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    @config_enumerate(default="parallel")
    def model():
        x = pyro.sample("x", known)
        pyro.sample("y", pyro.distributions.Categorical(logits=scale * _likelihood(x)), obs=torch.tensor(2))

    loss = TraceEnum_ELBO(max_plate_nesting=0).differentiable_loss(model, lambda: None)
    expected = -(scale * _likelihood(torch.tensor([1]))).log_softmax(-1)[2]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, scale), torch.autograd.grad(expected, scale))


def test_enumerated_guide(prior):
    """Summing the guide's sequences out gives the evidence bound without noise."""
    weaker = CoupledCategorical(compile(topologies.independent(3, 3)), {}, prior.marginals.log())

    def model():
        pyro.sample("x", prior)

    @config_enumerate(default="parallel")
    def guide():
        pyro.sample("x", weaker)

    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(model, guide)
    expected = torch.distributions.kl_divergence(weaker, prior)
    assert loss == pytest.approx(float(expected))


def test_predictive(prior):
    def model():
        with pyro.plate("sequences", 2):
            return pyro.sample("x", prior)

    draws = Predictive(model, num_samples=3000, parallel=True)()["x"]
    assert draws.shape == (3000, 2, 3)
    index = (draws * torch.tensor([9, 3, 1])).sum(-1).flatten()
    assert (
        testing.chi_square_p_value(torch.bincount(index, minlength=27), prior.log_prob(SEQUENCES).exp())
        > 1e-4
    )


def test_conditioned_program(prior):
    def model():
        return pyro.sample("x", prior)

    x0 = torch.tensor([2, 1, 0])
    trace = poutine.trace(pyro.condition(model, data={"x": x0})).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), prior.log_prob(x0))
