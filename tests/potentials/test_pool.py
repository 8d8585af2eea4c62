"""Pooled target marginals: the weights' form, and what the coupling makes of them."""

import pytest
import torch

from codd_ppl import CouplingLayer, topologies
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.inference import native
from codd_ppl.potentials import LatentPotentials, LogarithmicPool
from codd_ppl.testing import brute_marginals

SITES, VOCAB, STATES = 4, 3, 2
GRAPH = topologies.hidden_markov(SITES, VOCAB, STATES)


def logs(seed: int, *batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, SITES, VOCAB, generator=generator, dtype=torch.float64).log_softmax(-1)


def layer(pool: LogarithmicPool | None, sweeps: int = 40) -> CouplingLayer:
    return CouplingLayer(
        GRAPH, VOCAB, potentials=LatentPotentials(GRAPH, seed=3), sweeps=sweeps, pool=pool
    ).double()


def test_the_start_is_the_pure_network():
    pool, network = LogarithmicPool(), logs(0, 5)
    masked = torch.rand(5, SITES, generator=torch.Generator().manual_seed(1)) < 0.6
    found = pool(network, logs(1, 5), logs(2), masked)
    torch.testing.assert_close(found, torch.where(masked[..., None], network, 0.0))


def test_weights_are_linear_between_knots_and_the_network_s_at_0():
    pool = LogarithmicPool((0.5, 1.0))
    with torch.no_grad():
        pool.weights.copy_(torch.tensor([[0.5, 0.7, -0.1], [0.1, 0.9, 0.3]]))
    found = pool.at(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    expected = [[1, 0, 0], [0.75, 0.35, -0.05], [0.5, 0.7, -0.1], [0.3, 0.8, 0.1], [0.1, 0.9, 0.3]]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.allclose(pool.shares(torch.rand(9)).sum(-1), torch.ones(9))


def test_the_formula_and_what_is_ruled_out():
    pool = LogarithmicPool((1.0,)).double()
    with torch.no_grad():
        pool.weights.copy_(torch.tensor([[0.6, 0.5, -0.2]]))
    network, prior, alone = logs(0), logs(1), logs(2)
    network[0, 1], prior[1, 2] = -torch.inf, -torch.inf
    prior[2] = torch.tensor([0.0, -torch.inf, -torch.inf])
    network[2] = torch.tensor([-torch.inf, -0.5, -1.0])
    found = pool(network, prior, alone, torch.ones(SITES, dtype=torch.bool))
    expected = (0.6 * network + 0.5 * prior - 0.2 * alone).log_softmax(-1)
    torch.testing.assert_close(found[[0, 1, 3]], expected[[0, 1, 3]])
    assert found[0, 1] == -torch.inf and found[1, 2] == -torch.inf and bool(found.exp().isfinite().all())
    # No token is possible for both: the network's own law is left, for the projection to name the site.
    torch.testing.assert_close(found[2], network[2].log_softmax(-1))


@pytest.mark.skipif(native.library() is None, reason="no compiled loops here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab,own", [(2, False), (3, True), (16, False), (65, True), (70, False)])
def test_the_compiled_loop_is_the_same(vocab, own, dtype, monkeypatch):
    """At any mask ratio, however the inputs lie in memory, with tokens ruled out by either and by both together."""
    generator, pool = torch.Generator().manual_seed(vocab), LogarithmicPool((0.25, 0.5, 1.0)).to(dtype)
    torch.nn.init.normal_(pool.weights, generator=generator)
    network, prior, alone = (
        torch.randn(vocab, 5, 6, generator=generator, dtype=dtype).permute(2, 1, 0).log_softmax(-1)
        for _ in range(3)
    )
    network[0, 1, 0] = prior[1, 2, vocab // 2] = -torch.inf
    network[2, 3, : vocab // 2], prior[2, 3, vocab // 2 :] = -torch.inf, -torch.inf
    masked = torch.linspace(0, 1, 6)[:, None] > torch.rand(5, 6, generator=generator).T
    masked[0], masked[2] = True, True
    network[~masked] = torch.nan  # not read
    assert not masked.is_contiguous()
    inputs = (network, prior, alone if own else alone[0], masked)
    before = torch.get_num_threads()
    with torch.no_grad():
        try:
            torch.set_num_threads(2)
            monkeypatch.setattr(native, "WORK", 1)  # the batch in parts
            found = pool(*inputs)
        finally:
            torch.set_num_threads(before)
        monkeypatch.setattr(native, "library", lambda: None)
        expected = pool(*inputs)
    close = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    assert bool((found[~masked] == 0).all())


def test_prior_marginals_are_those_of_enumeration():
    coupling, known = layer(LogarithmicPool()), torch.tensor([[False, True, False, False], [False] * 4])
    tokens = torch.tensor([[0, 2, 0, 0], [0, 0, 0, 0]])
    potentials = coupling.potentials()
    given, alone = coupling.prior_marginals(potentials, tokens, known, torch.float64)
    clamped = torch.zeros(2, SITES, VOCAB, dtype=torch.float64)
    clamped[0, 1, :2] = -torch.inf
    expected = brute_marginals(GRAPH, {**potentials, GRAPH.tokens: clamped})
    for i, name in enumerate(GRAPH.tokens):
        torch.testing.assert_close(given[:, i].exp(), expected[name])
    torch.testing.assert_close(alone.expand(2, -1, -1)[1], given[1])
    batched = {k: t.expand(2, *t.shape) for k, t in potentials.items()}
    again = coupling.prior_marginals(batched, tokens, known, torch.float64)
    torch.testing.assert_close(again[0], given)
    torch.testing.assert_close(again[1], alone.expand(2, -1, -1))


def test_the_coupling_s_marginals_are_the_pooled_ones():
    """With many sweeps exactly; and with the starting weights the coupling is the one without a pool."""
    pool, logits = LogarithmicPool((0.5, 1.0)), logs(4, 3)
    known = torch.tensor([[False] * 4, [True, False, False, False], [False, False, True, True]])
    tokens = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 2, 1]])
    plain, pooled = layer(None), layer(pool)
    pair = [c(logits, tokens=tokens, known=known).log_evidence for c in (plain, pooled)]
    torch.testing.assert_close(pair[0], pair[1])
    with torch.no_grad():
        pool.weights.copy_(torch.tensor([[0.3, 0.8, -0.2], [0.2, 0.6, 0.1]]))
    prior, alone = pooled.prior_marginals(pooled.potentials(), tokens, known, torch.float64)
    target = pool(logits.log_softmax(-1), prior, alone, ~known)
    found = pooled(logits, tokens=tokens, known=known).marginals
    torch.testing.assert_close(found[~known], target.exp()[~known], rtol=1e-7, atol=1e-7)
    assert not torch.allclose(found[~known], logits.softmax(-1)[~known], atol=1e-2)


def test_weights_are_trained_through_the_sweep():
    coupling, logits = layer(LogarithmicPool(), sweeps=1), logs(5, 2)
    x0 = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    coupling(logits).log_prob(x0).sum().backward()
    gradient = coupling.pool.weights.grad
    assert gradient is not None and bool(gradient[-1].abs().min() > 1e-4) and not bool(gradient[:-1].any())


@pytest.mark.parametrize("recorded", [False, True])
def test_shapes_are_checked(recorded):
    """Before a loop reads beyond what is there."""
    pool, network, prior, alone = LogarithmicPool(), logs(0, 4), logs(1, 4), logs(2)
    masked = torch.ones(4, SITES, dtype=torch.bool)
    wrong = (
        (network, prior[:1], alone, masked),
        (network, prior[0], alone, masked),
        (network[:1], prior, alone, masked),
        (network, prior, prior[:, :1], masked),
        (network, prior, prior[:2], masked),
        (network, prior, alone, masked[0]),
        (network, prior, alone, masked.byte()),
    )
    for inputs in wrong:
        with torch.set_grad_enabled(recorded), pytest.raises(ShapeError, match="pool: expected"):
            pool(*inputs)


def test_settings_are_checked():
    for knots in ((), (0.5, 0.5), (0.0, 1.0), (0.5, 1.5)):
        with pytest.raises(ConfigError, match="knots"):
            LogarithmicPool(knots)
    with pytest.raises(ConfigError, match="projected"):
        CouplingLayer(GRAPH, VOCAB, combine="product", pool=LogarithmicPool())
