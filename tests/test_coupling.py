"""CouplingLayer and CoupledCategorical against enumeration, their edge cases and their errors."""

import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from scipy.stats import chisquare

from codd_ppl import CoupledCategorical, CouplingLayer, FactorGraph, topologies
from codd_ppl.errors import (
    ConfigError,
    CyclicGraphError,
    GraphError,
    IntractableError,
    LogitsError,
    ShapeError,
    TokenError,
)

V, L = 3, 4
GRAPHS = {
    "chain": topologies.chain(L, V),
    "tree": topologies.tree([None, 0, 0, 1], V),
    "hidden_markov": topologies.hidden_markov(L, V, 5),
    "latent_tree": topologies.latent_tree(L, V, 2),
    "mixture": topologies.star(L, V, states=3),
    "independent": topologies.independent(L, V),
}
KNOWN = torch.tensor([[True, False, False, False], [False, False, False, True]])


def layer(name: str, combine: str = "projected", sweeps: int = 20) -> CouplingLayer:
    torch.manual_seed(3)
    result = CouplingLayer(GRAPHS[name], V, combine=combine, sweeps=sweeps).double()
    for parameter in result.parameters():
        torch.nn.init.normal_(parameter)
    return result


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    return torch.randn(2, L, V, dtype=torch.float64, requires_grad=True), torch.randint(0, V, (2, L))


@pytest.mark.parametrize("combine", ["projected", "product"])
@pytest.mark.parametrize("name", GRAPHS)
def test_against_enumeration(name: str, combine: str) -> None:
    logits, x = inputs()
    coupling = layer(name, combine)
    dist = coupling(logits, tokens=x, known=KNOWN)
    every = dist.enumerate_support()
    log_p = dist.log_prob(every)
    assert torch.allclose(log_p.logsumexp(0), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    y = torch.randint(0, V, (2, L))
    for sites in (torch.rand(2, L) < 0.5 for _ in range(5)):
        agree = ((every == y) | ~sites).all(-1)
        clash = (KNOWN & sites & (y != x)).any(-1)
        reference = torch.where(agree, log_p, -torch.inf).logsumexp(0)
        found = dist.log_prob(y, sites=sites)
        assert torch.equal(clash, found == -torch.inf)
        assert torch.allclose(found[~clash], reference[~clash], atol=1e-10)
    one_hot = torch.nn.functional.one_hot(every, V)
    assert torch.allclose(dist.marginals, (log_p.exp()[..., None, None] * one_hot).sum(0), atol=1e-10)
    assert torch.allclose(dist.entropy(), -(log_p.exp() * log_p.clamp(min=-1e9)).sum(0), atol=1e-10)
    free = ~KNOWN & (torch.rand(2, L) < 0.5)
    gain = dist.condition(y, free).log_partition - dist.log_partition
    assert torch.allclose(gain, dist.log_prob(y, sites=free), atol=1e-10)
    if combine == "projected":
        gap = (dist.marginals - logits.softmax(-1))[~KNOWN].abs().max()
        assert gap < 1e-6
    dist.log_prob(torch.where(KNOWN, x, y)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in coupling.parameters())
    assert logits.grad is not None and bool((logits.grad[~KNOWN].abs().sum(-1) > 0).all())


@pytest.mark.parametrize("combine", ["projected", "product"])
def test_independent_is_the_product_of_categoricals_bit_for_bit(combine: str) -> None:
    logits, x = torch.randn(7, L, V), torch.randint(0, V, (7, L))
    dist = CouplingLayer(GRAPHS["independent"], V, combine=combine)(logits)
    assert torch.equal(dist.log_prob(x), logits.log_softmax(-1).gather(-1, x[..., None])[..., 0].sum(-1))


@pytest.mark.parametrize("name", ["chain", "hidden_markov", "independent"])
def test_draws_follow_the_law(name: str, generator: torch.Generator) -> None:
    logits, x = inputs()
    dist = layer(name)(logits, tokens=x, known=KNOWN)
    draws = dist.sample((20_000,), generator=generator)
    place = V ** torch.arange(L - 1, -1, -1)
    p = dist.log_prob(dist.enumerate_support()).exp().detach()
    for b in range(2):
        counts = torch.bincount((draws[:, b] * place).sum(-1), minlength=V**L).double()
        expected = p[:, b] * 20_000
        assert counts[expected == 0].sum() == 0
        keep = expected >= 5
        rest = torch.stack([counts[~keep].sum(), expected[~keep].sum()])
        found, wanted = counts[keep], expected[keep]
        if rest[1] >= 5:
            found, wanted = torch.cat([found, rest[:1]]), torch.cat([wanted, rest[1:]])
        wanted = wanted * found.sum() / wanted.sum()
        assert chisquare(found.numpy(), wanted.numpy()).pvalue > 1e-3


def test_mode_without_latents_is_the_best_sequence() -> None:
    logits, x = inputs()
    dist = layer("chain", "product")(logits, tokens=x, known=KNOWN)
    every = dist.enumerate_support()
    assert torch.equal(dist.mode, every[dist.log_prob(every).argmax(0), torch.arange(2)])


def test_entropy_of_a_large_mixture_needs_samples() -> None:
    dist = CouplingLayer(topologies.hidden_markov(12, 5, 3), 5)(torch.randn(2, 12, 5))
    with pytest.raises(IntractableError, match="num_samples"):
        dist.entropy()
    estimate = dist.entropy(num_samples=200)
    assert estimate.shape == (2,) and bool((estimate > 0).all())


def test_divergence() -> None:
    logits, _ = inputs()
    p, q = layer("chain")(logits), layer("chain", "product")(logits)
    every = p.enumerate_support()
    log_p, log_q = p.log_prob(every), q.log_prob(every)
    expected = (log_p.exp() * (log_p - log_q)).sum(0)
    assert torch.allclose(torch.distributions.kl_divergence(p, q), expected, atol=1e-10)
    other = layer("hidden_markov")(logits)
    expected = (log_p.exp() * (log_p - other.log_prob(every))).sum(0)
    assert torch.allclose(torch.distributions.kl_divergence(p, other), expected, atol=1e-10)


@pytest.mark.parametrize("combine", ["projected", "product"])
def test_edges(combine: str) -> None:
    coupling = layer("hidden_markov", combine, 1).float()
    x, none = torch.randint(0, V, (2, L)), torch.zeros(2, L, dtype=torch.bool)
    logits = torch.randn(2, L, V)
    everything = coupling(logits, tokens=x, known=~none)
    assert torch.equal(everything.sample(), x) and torch.allclose(everything.log_prob(x), torch.zeros(2))
    assert coupling(logits, tokens=x, known=none).sample().shape == (2, L)
    empty = coupling(logits[:0], tokens=x[:0], known=none[:0])
    assert empty.sample().shape == (0, L) and empty.log_prob(x[:0]).shape == (0,)
    assert coupling(logits[0]).log_prob(x[0]).shape == ()
    assert coupling(logits.expand(5, 2, L, V)).sample((3,)).shape == (3, 5, 2, L)
    single = CouplingLayer(topologies.hidden_markov(1, V, 2), V, combine=combine)(torch.randn(2, 1, V))
    assert torch.allclose(
        single.log_prob(torch.zeros(2, 1, dtype=torch.int64)).exp().sum(), single.marginals[:, 0, 0].sum()
    )


def test_bad_input() -> None:
    coupling, logits, x = (
        layer("hidden_markov").float(),
        torch.zeros(2, L, V),
        torch.zeros(2, L, dtype=torch.int64),
    )
    known = torch.ones(2, L, dtype=torch.bool)
    with pytest.raises(ShapeError, match="4, 3"):
        coupling(torch.zeros(2, L + 1, V))
    with pytest.raises(ShapeError, match="known="):
        coupling(logits, tokens=x)
    with pytest.raises(ShapeError, match="tokens=xt"):
        coupling(logits, known=known)
    with pytest.raises(ShapeError, match="bool"):
        coupling(logits, tokens=x, known=known.long())
    with pytest.raises(TokenError, match="site 1"):
        coupling(logits, tokens=x.index_fill(1, torch.tensor([1]), V), known=known)
    for value in (math.nan, math.inf):
        bad = logits.clone()
        bad[1, 2, 0] = value
        with pytest.raises(LogitsError, match=r"site 2 of batch element \(1,\)"):
            coupling(bad)
    with pytest.raises(LogitsError, match="every token ruled out"):
        coupling(torch.full((2, L, V), -math.inf))
    with pytest.raises(GraphError, match="cardinality"):
        CouplingLayer(topologies.chain(3, 4), 5)
    with pytest.raises(GraphError, match="expected a FactorGraph, found str"):
        CouplingLayer("hidden_markov", 5)
    graph = topologies.chain(3, V, tie=None)
    graph.add_factor(("x0", "x2"))
    large = topologies.grid(2, 2, 2000, tie=False)
    with pytest.raises(CyclicGraphError, match="x0"):
        CouplingLayer(large, 2000)
    assert CouplingLayer(graph, V).plan.route == "clique contraction"
    with pytest.raises(GraphError, match="no tokens"):
        CouplingLayer(FactorGraph(), V)
    dist = coupling(logits)
    with pytest.raises(TokenError):
        dist.log_prob(x + V)
    with pytest.raises(ShapeError):
        dist.log_prob(x[:, :2])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_tokens_of_a_type_that_is_narrower_than_the_vocabulary(dtype: torch.dtype) -> None:
    coupling, logits = CouplingLayer(topologies.hidden_markov(L, 300, 2), 300), torch.randn(2, L, 300)
    x = torch.tensor([[7, 0, 0, 100], [0, 99, 1, 0]])
    expected = coupling(logits, tokens=x, known=KNOWN)
    for compiled in (False, True):  # no compiled loops where gradients are recorded
        with torch.set_grad_enabled(not compiled):
            found = coupling(logits, tokens=x.to(dtype), known=KNOWN)
            assert torch.allclose(found.marginals, expected.marginals, atol=1e-5)
    with pytest.raises(TokenError, match="site 3"):
        coupling(logits, tokens=-x.to(dtype), known=KNOWN.roll(1, 0))


def test_in_a_pyro_model() -> None:
    """Observed: its log-probability. Latent and enumerated: summed out exactly."""
    logits, x = torch.randn(1, 2, V), torch.tensor([[2, 1]])
    coupling = CouplingLayer(topologies.chain(2, V), V, combine="product")
    torch.nn.init.normal_(next(coupling.parameters()))
    dist: CoupledCategorical = coupling(logits)

    def observed() -> None:
        with pyro.plate("batch", 1):
            pyro.sample("x", dist, obs=x)

    loss = Trace_ELBO().loss(observed, lambda: None)
    assert loss == pytest.approx(-float(dist.log_prob(x).detach()), abs=1e-5)

    @config_enumerate
    def latent() -> None:
        with pyro.plate("batch", 1):
            value = pyro.sample("x", dist)
            pyro.sample("y", pyro.distributions.Normal(value.sum(-1).float(), 1.0), obs=torch.tensor([1.5]))

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(latent, lambda: None)
    every = dist.enumerate_support()
    likelihood = torch.distributions.Normal(every.sum(-1).float(), 1.0).log_prob(torch.tensor(1.5))
    assert loss == pytest.approx(-float((dist.log_prob(every) + likelihood).logsumexp(0).detach()), abs=1e-4)


@pytest.mark.parametrize("name", ["chain", "hidden_markov", "latent_tree", "mixture"])
@pytest.mark.slow
@pytest.mark.ci
def test_a_law_to_start_from(name: str) -> None:
    """Same fixed point; one sweep from a near law is nearer to it than one from w = 1, and from itself stays."""
    logits, x = (t.detach() for t in inputs())
    exact = layer(name, sweeps=200)(logits, tokens=x, known=KNOWN)
    once = layer(name, sweeps=1)
    again = once(logits, tokens=x, known=KNOWN, start=exact)
    assert torch.allclose(again.log_weights, exact.log_weights, atol=1e-9)
    assert torch.allclose(again.log_evidence, exact.log_evidence, atol=1e-9)
    nearby = logits + 1e-3 * torch.randn_like(logits)
    target = layer(name, sweeps=200)(nearby, tokens=x, known=KNOWN)
    warm, cold = once(nearby, tokens=x, known=KNOWN, start=exact), once(nearby, tokens=x, known=KNOWN)
    warm_gap, cold_gap = ((d.marginals - target.marginals).abs().max() for d in (warm, cold))
    assert warm_gap < 0.05 * cold_gap or cold_gap < 1e-9
    more = KNOWN | torch.tensor([False, False, True, False])
    both = [
        layer(name, sweeps=200)(logits, tokens=x, known=more, start=start).marginals
        for start in (None, exact)
    ]
    assert torch.allclose(*both, atol=1e-9)
    assert once(logits, tokens=x, known=KNOWN, start=exact.expand(exact.batch_shape)).log_weights is not None
    assert exact.condition(x, KNOWN).log_weights is exact.log_weights


def test_a_start_is_a_constant_to_the_gradient() -> None:
    logits, x = inputs()
    first = layer("chain", sweeps=1)(logits, tokens=x, known=KNOWN)
    other = logits.detach().clone().requires_grad_()
    law = layer("chain", sweeps=1)(other, tokens=x, known=KNOWN, start=first)
    law.log_prob(x).sum().backward()
    assert logits.grad is None and other.grad is not None and bool(other.grad.isfinite().all())


def test_a_start_that_can_not_be_one() -> None:
    logits, x = inputs()
    product = layer("chain", "product")(logits, tokens=x, known=KNOWN)
    assert product.log_weights is None
    with pytest.raises(ConfigError, match="which knows its weights"):
        layer("chain")(logits, tokens=x, known=KNOWN, start=product)
    law = layer("chain")(logits, tokens=x, known=KNOWN)
    for coupling in (layer("chain", "product"), layer("independent")):
        assert not coupling.warm_starts
        with pytest.raises(ConfigError, match="nothing"):
            coupling(logits, tokens=x, known=KNOWN, start=law)
    with pytest.raises(ShapeError, match="as the targets"):
        layer("chain")(logits[:1], tokens=x[:1], known=KNOWN[:1], start=law)
