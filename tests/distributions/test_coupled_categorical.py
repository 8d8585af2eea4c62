"""CoupledCategorical against the enumerated law of its tokens: probabilities, draws, entropy, conditioning."""

import math

import pytest
import torch
from pyro.distributions import MaskedDistribution

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.errors import ConfigError, IntractableError, ShapeError, TokenError
from codd_ppl.graphs import FactorGraph, topologies

L, V = 3, 3


def mixed() -> FactorGraph:
    graph = topologies.independent(L, V)
    graph.add_variable("z0", 2, latent=True)
    graph.add_factor(("x1", "z0", "x0"))
    graph.add_factor(("x2", "z0"))
    graph.add_factor(("x2",), name="prior")
    return graph


GRAPHS = {
    "independent": topologies.independent(L, V),
    "chain": topologies.chain(L, V),
    "star": topologies.star(L, V, states=2),
    "hidden_markov": topologies.hidden_markov(L, V, 2),
    "latent_tree": topologies.latent_tree(L, V, 2),
    "mixed": mixed(),
}
SEQUENCES = testing.enumerate_sequences(V, L)


def law(dist: CoupledCategorical, graph: FactorGraph) -> torch.Tensor:
    """Log-probability of every sequence, (*batch, sequences), by enumeration."""
    joint = testing.enumerate_log_joint(graph, dist.log_potentials)
    lead = joint.dim() - len(graph)
    latent = [lead + i for i, v in enumerate(graph) if v.latent]
    joint = joint.logsumexp(latent) if latent else joint
    return joint.flatten(lead).log_softmax(-1)


def make(name, batch=(), known=0.0, infinite=0.0, seed=0) -> CoupledCategorical:
    graph = GRAPHS[name]
    generator = torch.Generator().manual_seed(seed)
    tables = testing.random_log_potentials(graph, seed=seed)
    evidence = torch.randn(*batch, L, V, generator=generator, dtype=torch.float64)
    ruled_out = torch.rand(*batch, L, V, generator=generator) < infinite
    tokens = torch.randint(V, (*batch, L), generator=generator)
    ruled_out &= torch.arange(V) != tokens[..., None]
    is_known = torch.rand(*batch, L, generator=generator) < known
    return CoupledCategorical(
        compile(graph), tables, evidence.masked_fill(ruled_out, -math.inf), tokens, is_known
    )


@pytest.fixture(params=GRAPHS)
def name(request):
    return request.param


# -- probabilities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [0.0, 0.5, 1.1])
def test_joint_log_prob_is_the_enumerated_one_and_sums_to_one(name, known):
    dist = make(name, (4,), known, infinite=0.2, seed=1)
    found = dist.log_prob(SEQUENCES[:, None, :])
    assert found.shape == (V**L, 4)
    torch.testing.assert_close(found, law(dist, GRAPHS[name]).T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.exp().sum(0), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_log_prob_of_any_subset_is_the_sum_over_the_rest(name):
    dist = make(name, (2,), known=0.3, seed=2)
    exact = law(dist, GRAPHS[name]).exp()  # (2, sequences)
    for bits in range(2**L):
        sites = torch.tensor([bool(bits >> i & 1) for i in range(L)])
        found = dist.log_prob(SEQUENCES[:, None, :], sites=sites)
        alike = ((SEQUENCES[:, None] == SEQUENCES[None, :]) | ~sites).all(-1).double()
        torch.testing.assert_close(found.T.exp(), exact @ alike, rtol=1e-9, atol=1e-9)


def test_each_sequence_may_have_a_set_of_its_own(name):
    dist = make(name, (3,), known=0.3, seed=3)
    value, sites = dist.sample((5,)), torch.rand(5, 3, L) < 0.5
    found = dist.log_prob(value, sites=sites)
    assert found.shape == (5, 3)
    for i in range(5):
        for j in range(3):
            alone = dist.log_prob(value[i], sites=sites[i, j])[j]
            torch.testing.assert_close(found[i, j], alone, rtol=1e-12, atol=1e-12)


def test_tokens_outside_the_set_are_not_read(name):
    dist = make(name, (3,), seed=3)
    value, sites = dist.sample(), torch.tensor([True, False, True])
    masked = torch.where(sites, value, V)  # the mask token's id
    assert torch.equal(dist.log_prob(masked, sites=sites), dist.log_prob(value, sites=sites))


def test_known_sites_contribute_nothing_and_a_clash_is_impossible(name):
    dist = make(name, seed=4)
    tokens, known = torch.tensor([1, 0, 2]), torch.tensor([True, False, False])
    dist = dist.condition(tokens, known)
    assert dist.log_prob(tokens, sites=known) == 0
    assert dist.log_prob(tokens, sites=torch.tensor([True, True, False])) == dist.log_prob(
        tokens, sites=~known & (torch.arange(L) < 2)
    )
    assert dist.log_prob(torch.tensor([0, 0, 2])) == -math.inf
    assert dist.log_prob(torch.tensor([0, 0, 2]), sites=known) == -math.inf
    assert dist.log_prob(torch.tensor([0, 0, 2]), sites=~known).isfinite()
    none = torch.zeros(L, dtype=torch.bool)
    assert dist.log_prob(tokens, sites=none) == 0


def test_independent_sites_are_the_product_of_categoricals_bit_for_bit():
    logits = (3 * torch.randn(50, 7, 11)).log_softmax(-1)
    plan = compile(topologies.independent(7, 11))
    value = torch.randint(11, (50, 7))
    for evidence, normalized in ((3 * logits, False), (logits, True)):
        expected = evidence if normalized else evidence.log_softmax(-1)
        expected = expected.gather(-1, value[..., None])[..., 0].sum(-1)
        dist = CoupledCategorical(plan, {}, evidence, normalized=normalized)
        assert torch.equal(dist.log_prob(value), expected)
        assert torch.equal(dist.expand((2, 50)).log_prob(value)[1], expected)


def test_marginals(name):
    dist = make(name, (3,), known=0.4, infinite=0.2, seed=5)
    table = law(dist, GRAPHS[name]).exp().reshape(3, V, V, V)
    expected = torch.stack([table.sum([1 + j for j in range(L) if j != i]) for i in range(L)], 1)
    torch.testing.assert_close(dist.marginals, expected, rtol=1e-9, atol=1e-9)
    one_hot = torch.nn.functional.one_hot(dist.tokens, V).double()
    assert torch.equal(dist.marginals[dist.known], one_hot[dist.known])


def test_log_partition(name):
    dist = make(name, (3,), known=0.4, seed=5)
    expected = testing.brute_log_partition(GRAPHS[name], dist.log_potentials)
    torch.testing.assert_close(dist.log_partition, expected.expand(3), rtol=1e-9, atol=1e-9)


def test_gradcheck(name):
    start = make(name, (2,), known=0.3, seed=6)
    keys = [k for k in start.log_potentials if k != start.sites]
    value, sites = start.sample(), torch.tensor([[True, False, True], [False, True, True]])

    def function(evidence, *tables):
        dist = CoupledCategorical(
            start.plan, dict(zip(keys, tables, strict=True)), evidence, start.tokens, start.known
        )
        return dist.log_prob(value), dist.log_prob(value, sites=sites), dist.entropy(), dist.marginals

    evidence = torch.randn(2, L, V, dtype=torch.float64, requires_grad=True)
    leaves = [evidence, *(start.log_potentials[k].clone().requires_grad_() for k in keys)]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


# -- draws ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [0.0, 0.4])
def test_draws_follow_the_law(name, known):
    dist = make(name, (2,), known, infinite=0.2, seed=7)
    draws = dist.sample((8000,), generator=torch.Generator().manual_seed(1))
    assert draws.shape == (8000, 2, L) and draws.dtype == torch.int64
    assert bool((draws == dist.tokens)[:, dist.known].all())
    index = (draws * torch.tensor([V * V, V, 1])).sum(-1)
    for b, p in enumerate(law(dist, GRAPHS[name]).exp().expand(2, -1)):
        assert testing.chi_square_p_value(torch.bincount(index[:, b], minlength=V**L), p) > 1e-4


def test_seeds_and_sample_shapes():
    dist = make("hidden_markov", (2, 1))
    assert dist.sample().shape == (2, 1, L)
    assert dist.sample((4, 3)).shape == (4, 3, 2, 1, L)
    torch.manual_seed(3)
    one = dist.sample((9,))
    torch.manual_seed(3)
    assert torch.equal(dist.sample((9,)), one)
    draws = [dist.sample((9,), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_mode(name):
    """The tokens of a best assignment of everything; without latents, the most probable sequence."""
    dist = make(name, (3,), known=0.3, infinite=0.2, seed=8)
    graph = GRAPHS[name]
    best = testing.enumerate_log_joint(graph, dist.log_potentials).flatten(1).argmax(-1)
    expected = []
    for variable in reversed(list(graph)):
        expected.insert(0, best % variable.cardinality)
        best = best // variable.cardinality
    tokens = [e for e, v in zip(expected, graph, strict=True) if not v.latent]
    assert torch.equal(dist.mode, torch.stack(tokens, -1))


# -- entropy -------------------------------------------------------------------------------------------


def test_entropy_is_that_of_the_tokens(name):
    dist = make(name, (3,), known=0.3, infinite=0.2, seed=9)
    expected = torch.special.entr(law(dist, GRAPHS[name]).exp()).sum(-1)
    torch.testing.assert_close(dist.entropy(), expected.expand(3), rtol=1e-9, atol=1e-9)


def test_entropy_without_latents_is_exact_at_any_size_and_estimated_with_them():
    chain = CoupledCategorical(
        compile(topologies.chain(12, 5)), {"edge": torch.zeros(5, 5)}, torch.zeros(12, 5)
    )
    torch.testing.assert_close(chain.entropy(), torch.tensor(12 * math.log(5)))
    graph = topologies.hidden_markov(12, 5, 2)
    tables = {key: torch.zeros_like(t) for key, t in testing.random_log_potentials(graph).items()}
    dist = CoupledCategorical(compile(graph), tables, torch.zeros(12, 5))
    with pytest.raises(IntractableError, match="num_samples"):
        dist.entropy()
    torch.testing.assert_close(
        dist.entropy(num_samples=3), torch.tensor(12 * math.log(5), dtype=torch.float64)
    )
    with pytest.raises(ConfigError, match="num_samples >= 1, found 0"):
        dist.entropy(num_samples=0)


def test_the_estimate_is_near_the_entropy():
    dist = make("hidden_markov", (2,), seed=1)
    draws = dist.sample((4000,), generator=torch.Generator().manual_seed(0))
    error = dist.log_prob(draws).std(0) / math.sqrt(4000)
    found = dist.entropy(num_samples=4000, generator=torch.Generator().manual_seed(0))
    assert bool(((found - dist.entropy()).abs() < 4 * error).all())


# -- other laws ----------------------------------------------------------------------------------------


def test_conditioning_is_the_ratio_of_partitions(name):
    dist = make(name, (3,), seed=2)
    value, sites = (
        dist.sample(),
        torch.tensor([[True, False, False], [False, False, False], [True, True, True]]),
    )
    given = dist.condition(value, sites)
    assert torch.equal(given.known, sites)
    torch.testing.assert_close(
        given.log_partition - dist.log_partition, dist.log_prob(value, sites=sites), rtol=1e-9, atol=1e-9
    )
    chain_rule = dist.log_prob(value, sites=sites) + given.log_prob(value)
    torch.testing.assert_close(chain_rule, dist.log_prob(value), rtol=1e-9, atol=1e-9)
    everything = dist.condition(value)
    assert torch.equal(everything.mode, value) and bool((everything.log_prob(value).abs() < 1e-12).all())


def test_conditioning_errors():
    dist = make("chain", (2,)).condition(
        torch.zeros(2, L, dtype=torch.int64), torch.tensor([True, False, False])
    )
    with pytest.raises(TokenError, match=r"'x0' of batch element \(0,\) is known as token 0, found 1"):
        dist.condition(torch.ones(2, L, dtype=torch.int64))
    with pytest.raises(ShapeError, match="expand"):
        dist.condition(torch.zeros(5, 2, L, dtype=torch.int64))


def test_expand(name):
    dist = make(name, (2,), known=0.3)
    wide = dist.expand((4, 2))
    assert wide.batch_shape == (4, 2) and wide.event_shape == (L,)
    value = dist.sample()
    torch.testing.assert_close(
        wide.log_prob(value), dist.log_prob(value).expand(4, 2), rtol=1e-12, atol=1e-12
    )
    assert wide.sample((3,)).shape == (3, 4, 2, L)
    torch.testing.assert_close(wide.marginals[1], dist.marginals, rtol=1e-12, atol=1e-12)


def test_mask_and_to_event():
    dist = make("hidden_markov", (2,))
    value = dist.sample()
    masked = dist.mask(torch.tensor([True, False]))
    assert isinstance(masked, MaskedDistribution)
    assert torch.equal(masked.log_prob(value), dist.log_prob(value) * torch.tensor([1.0, 0.0]))
    assert dist.to_event(1).log_prob(value) == dist.log_prob(value).sum()


def test_support():
    dist = make("chain", (2,))
    assert dist.support.event_dim == 1 and dist.support.is_discrete
    assert torch.equal(dist.support.check(torch.tensor([[0, 1, 2], [0, 1, 3]])), torch.tensor([True, False]))
    assert dist.has_enumerate_support
    assert torch.equal(dist.enumerate_support(expand=False)[:, 0], SEQUENCES)
    assert torch.equal(dist.enumerate_support(), SEQUENCES[:, None].expand(-1, 2, -1))
    large = CoupledCategorical(compile(topologies.independent(13, 2)), {}, torch.zeros(13, 2))
    assert not large.has_enumerate_support
    with pytest.raises(IntractableError, match=r"2 \*\* 13"):
        large.enumerate_support()
    assert CoupledCategorical(large.plan, {}, torch.zeros(13, 2)).entropy().item() == pytest.approx(
        13 * math.log(2)
    )


def test_repr():
    dist = make("chain", (2,)).condition(
        torch.zeros(2, L, dtype=torch.int64), torch.tensor([True, False, False])
    )
    assert repr(dist) == "CoupledCategorical(batch_shape=(2,), sites=3, vocab_size=3, known=2 of 6)"


def test_sites_are_in_reading_order_however_declared():
    graph = FactorGraph()
    for token in ("x2", "x0", "x1"):
        graph.add_variable(token, 2)
    evidence = torch.tensor([[0.0, -1.0], [-2.0, 0.0], [0.0, -3.0]])
    dist = CoupledCategorical(compile(graph), {}, evidence)
    assert dist.sites == ("x0", "x1", "x2")
    assert dist.mode.tolist() == [0, 1, 0]
    torch.testing.assert_close(dist.marginals, evidence.softmax(-1))
