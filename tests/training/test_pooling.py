"""Fitting the pool: never worse than either expert, and the right one wins where one knows nothing."""

import pytest
import torch

from codd_ppl import CouplingLayer, topologies
from codd_ppl.denoisers import DenoiserOutput
from codd_ppl.errors import ConfigError, LogitsError, ShapeError
from codd_ppl.inference import sample
from codd_ppl.model_folder import load_model, save_model
from codd_ppl.potentials import LatentPotentials, LogarithmicPool
from codd_ppl.training import fit_pool

SITES, VOCAB, STATES = 12, 5, 4
GRAPH = topologies.hidden_markov(SITES, VOCAB, STATES)


class Network:
    """The exact conditional marginals of a hidden Markov model, or of one that knows nothing (sharpness 0)."""

    vocab_size, mask_token_id, hidden_size = VOCAB, VOCAB, 1

    def __init__(self, potentials: LatentPotentials, sharpness: float) -> None:
        self.layer, self.sharpness = CouplingLayer(GRAPH, VOCAB, potentials=potentials), sharpness

    def __call__(self, xt: torch.Tensor) -> DenoiserOutput:
        known = xt != self.mask_token_id
        logs, _ = self.layer.prior_marginals(self.layer.potentials(), xt * known, known, torch.float32)
        return DenoiserOutput(self.sharpness * logs.clamp(min=-30), torch.zeros(*xt.shape, 1))


def peaked(seed: int) -> LatentPotentials:
    potentials = LatentPotentials(GRAPH, seed)
    with torch.no_grad():
        for table in potentials.tables.values():
            table.mul_(5)
    return potentials


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    with torch.no_grad():
        truth = CouplingLayer(GRAPH, VOCAB, potentials=peaked(0))
        drawn = sample(truth.plan, truth.potentials(), (1000,), torch.Generator().manual_seed(0))
    return torch.stack([drawn[name] for name in GRAPH.tokens], -1)


def test_a_network_that_knows_nothing_leaves_it_to_the_prior(text):
    coupling = CouplingLayer(GRAPH, VOCAB, potentials=peaked(0), pool=LogarithmicPool())
    fit = fit_pool(Network(peaked(0), 0.0), coupling, text, sites=12000)
    for network, prior, pooled in zip(fit.network, fit.prior, fit.pooled, strict=True):
        assert network == pytest.approx(torch.tensor(float(VOCAB)).log2().item(), abs=1e-5)
        assert pooled == pytest.approx(prior, abs=0.03)
    assert fit.prior[0] < 0.8 * fit.network[0]
    # Near r = 1 the prior with and without what is known are the same: only their sum is determined.
    weights = coupling.pool.weights
    torch.testing.assert_close(weights[1:, 1:].sum(-1), torch.ones(4), rtol=0.2, atol=0.2)
    assert bool((weights[1:4, 1] > 0.7).all())


def test_a_perfect_network_keeps_its_marginals(text):
    coupling = CouplingLayer(GRAPH, VOCAB, potentials=LatentPotentials(GRAPH, 9), pool=LogarithmicPool())
    fit = fit_pool(Network(peaked(0), 1.0), coupling, text, sites=12000)
    torch.testing.assert_close(coupling.pool.weights[1:4, 0], torch.ones(3), rtol=0.2, atol=0.2)
    for network, pooled in zip(fit.network, fit.pooled, strict=True):
        assert pooled == pytest.approx(network, abs=0.03)


def test_the_pool_is_not_worse_than_either_and_the_fit_is_its_best(text):
    """A blunt network and another model's prior. No other weights do better: the problem is convex."""
    coupling = CouplingLayer(GRAPH, VOCAB, potentials=peaked(0), pool=LogarithmicPool())
    network = Network(peaked(1), 0.5)
    fit = fit_pool(network, coupling, text, sites=2000, penalty=0.0)
    for alone, prior, pooled in zip(fit.network, fit.prior, fit.pooled, strict=True):
        assert pooled < alone + 1e-3 and pooled < prior + 1e-2
    best = sum(fit.pooled)
    again = fit_pool(network, coupling, text, sites=2000, penalty=0.0)
    assert sum(again.pooled) == pytest.approx(best, abs=1e-6)


def test_a_model_folder_keeps_the_pool(tmp_path):
    from codd_ppl.denoisers import BidirectionalTransformer

    coupling = CouplingLayer(GRAPH, VOCAB, pool=LogarithmicPool((0.25, 1.0)))
    with torch.no_grad():
        coupling.pool.weights.normal_(generator=torch.Generator().manual_seed(0))
    network = BidirectionalTransformer(VOCAB, hidden_size=16, layers=1, heads=2)
    save_model(tmp_path / "model", network, coupling)
    found = load_model(tmp_path / "model").coupling.pool
    assert torch.equal(found.weights, coupling.pool.weights) and torch.equal(found.knots, coupling.pool.knots)


def test_bad_input_is_refused(text):
    coupling = CouplingLayer(GRAPH, VOCAB, pool=LogarithmicPool())
    with pytest.raises(ShapeError, match="12 sites"):
        fit_pool(Network(peaked(0), 1.0), coupling, text[:, :5])
    with pytest.raises(ConfigError, match="LogarithmicPool"):
        fit_pool(Network(peaked(0), 1.0), CouplingLayer(GRAPH, VOCAB), text)


class Told:
    """Knows each site by what stands as far into the text before the block."""

    vocab_size, mask_token_id, hidden_size = VOCAB, VOCAB, 1

    def __call__(self, xt: torch.Tensor) -> DenoiserOutput:
        told = torch.cat((xt[:, :SITES], xt[:, :SITES]), 1)
        logits = 20.0 * torch.nn.functional.one_hot(told.clamp(max=VOCAB - 1), VOCAB).float()
        return DenoiserOutput(logits, torch.zeros(*xt.shape, 1))


def test_the_network_reads_what_is_before_each_block(text):
    coupling = CouplingLayer(GRAPH, VOCAB, potentials=peaked(0), pool=LogarithmicPool())
    fit = fit_pool(Told(), coupling, text, sites=2000, contexts=text)
    assert max(fit.network) < 1e-4 and min(fit.prior) > 0.05
    with pytest.raises(ShapeError):
        fit_pool(Told(), coupling, text, sites=2000, contexts=text.float())


def test_logits_that_are_nan_leave_the_pool_as_it_was(text):
    class Broken(Told):
        def __call__(self, xt: torch.Tensor) -> DenoiserOutput:
            return DenoiserOutput(torch.full((*xt.shape, VOCAB), torch.nan), torch.zeros(*xt.shape, 1))

    coupling = CouplingLayer(GRAPH, VOCAB, potentials=peaked(0), pool=LogarithmicPool())
    before = coupling.pool.weights.detach().clone()
    with pytest.raises(LogitsError, match="NaN"):
        fit_pool(Broken(), coupling, text, sites=200)
    assert torch.equal(coupling.pool.weights, before)
