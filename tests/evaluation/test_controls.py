"""The controls of a coupling: each against its closed form."""

import math

import pytest
import torch

from codd_ppl import BidirectionalTransformer, CouplingLayer, topologies
from codd_ppl.errors import ConfigError
from codd_ppl.evaluation import MarginalsAlone, PriorAlone, Sharpened, nelbo_table
from codd_ppl.inference import log_partition
from codd_ppl.potentials import LogarithmicPool, TablePotentials

SITES, VOCAB = 5, 3
GRAPH = topologies.hidden_markov(SITES, VOCAB, 4)


@pytest.fixture
def denoiser() -> BidirectionalTransformer:
    torch.manual_seed(0)
    return BidirectionalTransformer(VOCAB, 16, 1, 2).eval()


def blocks(n: int = 40) -> torch.Tensor:
    return torch.randint(VOCAB, (n, SITES), generator=torch.Generator().manual_seed(1))


def table(draws: int = 4, **models):
    return nelbo_table(models, blocks(), (1, 2, SITES), draws=draws, reveals=4)


@pytest.mark.parametrize("kind", ["latent", "free tables"])
@pytest.mark.slow
@pytest.mark.ci
def test_the_prior_alone_has_one_bound_for_every_number_of_steps(kind, denoiser):
    """And at one step it is the likelihood of the text under the prior, block by block."""
    if kind == "latent":
        coupling = CouplingLayer(GRAPH, VOCAB, seed=2)
    else:
        graph = topologies.chain(SITES, VOCAB)
        coupling = CouplingLayer(graph, VOCAB, potentials=TablePotentials(graph))
        coupling.init_from_corpus(blocks(200).sort(-1).values, progress=False)
    found = table(draws=200, prior=(denoiser, PriorAlone(coupling)), network=(denoiser, None))
    potentials = coupling.potentials()
    start = coupling.potentials.evidence()
    flat = torch.zeros(VOCAB) if start is None else start
    names, x0 = coupling.graph.tokens, blocks()
    clamped = torch.where(torch.nn.functional.one_hot(x0, VOCAB) > 0, flat, -torch.inf)
    with torch.no_grad():
        total = log_partition(coupling.plan, {**potentials, names: clamped})
        total = total - log_partition(coupling.plan, {**potentials, names: flat.expand(SITES, -1)})
    exact = -total.double() / (SITES * math.log(2))
    torch.testing.assert_close(found.per_block("prior", 1), exact, rtol=1e-4, atol=1e-4)
    for T in (2, SITES):
        assert abs(found.mean("prior", T) - float(exact.mean())) < 0.05


def test_marginals_alone_are_the_factorised_model_unless_there_is_a_pool(denoiser):
    plain = CouplingLayer(GRAPH, VOCAB, sweeps=40, seed=2)
    pooled = CouplingLayer(GRAPH, VOCAB, sweeps=40, seed=2, pool=LogarithmicPool((1.0,)))
    with torch.no_grad():
        pooled.pool.weights.copy_(torch.tensor([[0.2, 1.0, 0.0]]))
    found = table(
        factorised=(denoiser, None),
        same=(denoiser, MarginalsAlone(plain)),
        pooled=(denoiser, MarginalsAlone(pooled)),
    )
    for T in (1, 2, SITES):
        same = found.per_block("same", T) - found.per_block("factorised", T)
        assert float(same.abs().max()) < 1e-4
        assert float((found.per_block("pooled", T) - found.per_block("factorised", T)).abs().max()) > 1e-2
    logits, known = torch.randn(2, SITES, VOCAB), torch.zeros(2, SITES, dtype=torch.bool)
    known[0, 1] = True
    tokens = torch.ones(2, SITES, dtype=torch.int64)
    law, alone = (c(logits, tokens=tokens, known=known) for c in (pooled, MarginalsAlone(pooled)))
    torch.testing.assert_close(alone.marginals, law.marginals)
    x0 = torch.ones(2, SITES, dtype=torch.int64)
    torch.testing.assert_close(alone.log_prob(x0), law.marginals[..., 1].log().sum(-1))


def test_sharper_logits(denoiser):
    xt = torch.full((2, SITES), VOCAB)
    plain, sharp = denoiser(xt), Sharpened(denoiser, 0.5)(xt)
    torch.testing.assert_close(sharp.logits, 2 * plain.logits)
    assert torch.equal(sharp.hidden, plain.hidden)
    found = table(a=(denoiser, None), b=(Sharpened(denoiser, 1.0), None), c=(Sharpened(denoiser, 0.5), None))
    for T in (1, 2, SITES):
        torch.testing.assert_close(found.per_block("a", T), found.per_block("b", T))
        assert found.mean("c", T) != pytest.approx(found.mean("a", T), abs=1e-4)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="temperature"):
            Sharpened(denoiser, wrong)
