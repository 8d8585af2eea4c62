"""Couplings along trees that each input chooses, against the enumeration of all trees and all sequences."""

import itertools
import math
from typing import Any

import networkx as nx
import pytest
import torch
from scipy import stats

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers import DenoiserOutput
from codd_ppl.diffusion import LinearSchedule, ReverseProcess, coupled_nelbo, factorised_nelbo, noise
from codd_ppl.diffusion.nelbo import SetDistribution
from codd_ppl.distributions import MaximumTree, SpanningTreeMixture
from codd_ppl.errors import ConfigError, LogitsError, ShapeError, TokenError
from codd_ppl.evaluation import nelbo_table
from codd_ppl.graphs import topologies
from codd_ppl.sampling import Coupling, JointDistribution, Sampler
from codd_ppl.spanning_tree_coupling import MaximumTreeCoupling, SpanningTreeCoupling

KINDS = [SpanningTreeCoupling, MaximumTreeCoupling]


def random_coupling(
    kind: type[SpanningTreeCoupling], sites: int, vocab: int, **settings: Any
) -> SpanningTreeCoupling:
    coupling = kind(sites, vocab, **settings).double()
    with torch.no_grad():
        coupling.potentials.tables.normal_(std=2.0)
        coupling.potentials.log_beta.normal_(std=2.0)
    return coupling


def sequences(sites: int, vocab: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(vocab), repeat=sites)))


def pair_law(coupling: SpanningTreeCoupling, q: torch.Tensor, i: int, j: int) -> tuple[float, torch.Tensor]:
    """Weight and joint law of two sites, with the projection done the slow way."""
    independent = q[i][:, None] * q[j]
    if j - i > coupling.potentials.max_offset:
        return 1.0, independent
    law = independent * coupling.potentials.tables[j - i - 1].detach().exp()
    for _ in range(3000):
        law = law * (q[i] / law.sum(1))[:, None]
        law = law * (q[j] / law.sum(0))
    beta = float(coupling.potentials.log_beta.detach()[j - i - 1].exp())
    return beta + 1, (beta * law + independent) / (beta + 1)


def mixture_by_enumeration(
    coupling: SpanningTreeCoupling, q: torch.Tensor, sites: list[int], values: torch.Tensor
) -> torch.Tensor:
    """Probability of each row of values, (n, len(sites)), by the sum over every tree."""
    laws = {(i, j): pair_law(coupling, q, i, j) for i, j in itertools.combinations(sites, 2)}
    alone = torch.stack([q[i, values[:, a]] for a, i in enumerate(sites)]).prod(0)
    place = {site: a for a, site in enumerate(sites)}
    top, bottom, count = torch.zeros_like(alone), 0.0, 0
    for edges in itertools.combinations(laws, len(sites) - 1):
        graph = nx.Graph(list(edges))
        graph.add_nodes_from(sites)
        if not nx.is_connected(graph):
            continue
        count += 1
        weight, ratio = 1.0, torch.ones_like(alone)
        for i, j in edges:
            x, y = values[:, place[i]], values[:, place[j]]
            weight *= laws[i, j][0]
            ratio = ratio * laws[i, j][1][x, y] / (q[i, x] * q[j, y])
        top, bottom = top + weight * ratio, bottom + weight
    assert count == max(1, len(sites)) ** max(0, len(sites) - 2)
    return alone * top / bottom


@pytest.mark.parametrize(("vocab", "reach"), [(2, 4), (3, 2)])
def test_mixture_equals_the_sum_over_all_trees(vocab: int, reach: int) -> None:
    coupling = random_coupling(SpanningTreeCoupling, 5, vocab, max_offset=reach, iterations=500)
    logits = torch.randn(5, vocab, dtype=torch.float64)
    dist = coupling(logits)
    assert isinstance(dist, SpanningTreeMixture)
    everything = sequences(5, vocab)
    expected = mixture_by_enumeration(coupling, logits.softmax(-1), list(range(5)), everything)
    torch.testing.assert_close(dist.log_prob(everything).exp(), expected, rtol=1e-9, atol=1e-12)
    chosen = torch.tensor([True, False, True, True, False])
    part = mixture_by_enumeration(coupling, logits.softmax(-1), [0, 2, 3], everything[:, chosen])
    torch.testing.assert_close(dist.log_prob(everything, sites=chosen).exp(), part, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dist.restrict(chosen).log_prob(everything, sites=chosen).exp(), part)


@pytest.mark.parametrize("iterations", [1, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_normalised_with_the_marginals_of_the_network(
    kind: type[SpanningTreeCoupling], iterations: int
) -> None:
    coupling = random_coupling(kind, 5, 3, max_offset=3, iterations=iterations)
    logits = torch.randn(2, 5, 3, dtype=torch.float64)
    logits[0, 1, 2] = -torch.inf
    known = torch.zeros(2, 5, dtype=torch.bool)
    known[1, 2] = True
    tokens = torch.full((2, 5), 1)
    dist = coupling(logits, tokens=tokens, known=known)
    everything = sequences(5, 3)[:, None]
    chance = dist.log_prob(everything).exp()
    torch.testing.assert_close(chance.sum(0), torch.ones(2, dtype=torch.float64))
    summed = torch.stack([(chance[..., None] * (everything == v)).sum(0) for v in range(3)], -1)
    torch.testing.assert_close(summed, dist.marginals)
    expected = torch.where(known[..., None], torch.eye(3, dtype=torch.float64)[1], logits.softmax(-1))
    torch.testing.assert_close(dist.marginals, expected)
    assert isinstance(dist, JointDistribution)
    assert isinstance(dist, SetDistribution) == (kind is SpanningTreeCoupling)
    assert isinstance(coupling, Coupling)
    wide = dist.expand((4, 2))
    torch.testing.assert_close(wide.log_prob(tokens), dist.log_prob(tokens).expand(4, 2))


def test_maximum_tree_is_one_tree_and_its_marginals_are_exact() -> None:
    coupling = random_coupling(MaximumTreeCoupling, 5, 3, max_offset=2, iterations=500)
    logits = torch.randn(3, 5, 3, dtype=torch.float64)
    known = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 1, 1]]).bool()
    tokens = torch.zeros(3, 5, dtype=torch.int64)
    dist = coupling(logits, tokens=tokens, known=known)
    assert isinstance(dist, MaximumTree)
    everything = sequences(5, 3)
    log_beta = coupling.potentials.log_beta.detach()
    for row in range(3):
        q = dist.marginals[row].detach()
        graph = nx.Graph()
        masked = (~known[row]).nonzero()[:, 0].tolist()
        for i, j in itertools.combinations(masked, 2):
            if j - i <= 2:
                graph.add_edge(i, j, weight=float(log_beta[j - i - 1]))
        law = torch.stack([q[i, everything[:, i]] for i in range(5)]).prod(0)
        parents = dist.forest.parents[row].tolist()
        found = {frozenset((i, p)) for i, p in enumerate(parents) if p >= 0}
        total = sum(graph.edges[tuple(edge)]["weight"] for edge in found)
        best = sum(d["weight"] for *_, d in nx.maximum_spanning_edges(graph))
        assert total == pytest.approx(best)
        for i, j in (sorted(edge) for edge in found):
            x, y = everything[:, i], everything[:, j]
            law = law * pair_law(coupling, q, i, j)[1][x, y] / (q[i, x] * q[j, y])
        law = law.nan_to_num(0.0)
        torch.testing.assert_close(dist.log_prob(everything[:, None])[:, row].exp(), law)
        chosen = torch.tensor([True, True, False, False, True])
        value = torch.tensor([0, 0, 2, 2, 1]) if row < 2 else torch.tensor([0, 1, 2, 2, 0])
        agree = ((everything == value) | ~chosen).all(-1)
        part = dist.log_prob(value, sites=chosen)[row].exp()
        torch.testing.assert_close(part, law[agree].sum())


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_law(kind: type[SpanningTreeCoupling], generator: torch.Generator) -> None:
    coupling = random_coupling(kind, 4, 2, max_offset=3, iterations=2)
    known = torch.tensor([[False] * 4, [False, True, False, False]])
    dist = coupling(torch.randn(2, 4, 2, dtype=torch.float64), tokens=torch.ones(2, 4).long(), known=known)
    drawn = dist.sample((8000,), generator=generator)
    everything = sequences(4, 2)
    chance = dist.log_prob(everything[:, None]).exp().detach()
    for row in range(2):
        counts = torch.bincount(
            (drawn[:, row] * (2 ** torch.arange(3, -1, -1))).sum(-1), minlength=16
        ).double()
        assert bool((counts[chance[:, row] == 0] == 0).all())
        want = chance[:, row] * 8000
        keep = want > 5
        seen = torch.cat([counts[keep], counts[~keep].sum()[None] + 1e-9])
        want = torch.cat([want[keep], want[~keep].sum()[None] + 1e-9])
        assert stats.chisquare(seen.numpy(), (want * seen.sum() / want.sum()).numpy()).pvalue > 1e-3
    assert torch.equal(drawn, dist.sample((8000,), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_sets_of_the_draws_and_of_the_batch(kind: type[SpanningTreeCoupling]) -> None:
    coupling = random_coupling(kind, 5, 3, max_offset=2)
    dist = coupling(torch.randn(2, 5, 3, dtype=torch.float64))
    value, sites = torch.randint(3, (4, 2, 5)), torch.rand(4, 2, 5) < 0.6
    each = torch.stack([dist.log_prob(value[k], sites=sites[k]) for k in range(4)])
    torch.testing.assert_close(dist.log_prob(value, sites=sites), each)
    same = torch.stack([dist.log_prob(value[k], sites=sites[0]) for k in range(4)])
    torch.testing.assert_close(dist.log_prob(value, sites=sites[0]), same)


@pytest.mark.parametrize("kind", KINDS)
def test_no_dependence_is_the_product_of_categoricals(kind: type[SpanningTreeCoupling]) -> None:
    logits = torch.randn(3, 6, 4)
    alone = CouplingLayer(topologies.independent(6, 4), 4)(logits)
    value, sites = torch.randint(4, (3, 6)), torch.rand(3, 6) < 0.5
    dist = kind(6, 4, max_offset=2)(logits)
    torch.testing.assert_close(dist.log_prob(value, sites=sites), alone.log_prob(value, sites=sites))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
@pytest.mark.ci
def test_gradients_reach_tables_weights_scores_and_logits(kind: type[SpanningTreeCoupling]) -> None:
    coupling = random_coupling(kind, 4, 2, max_offset=2, hidden_size=3, iterations=4)
    scores = coupling.potentials.scores
    assert scores is not None
    torch.nn.init.normal_(scores.right)
    hidden = torch.randn(2, 4, 3, dtype=torch.float64)
    value = torch.randint(2, (2, 4))
    sites = torch.tensor([[True, True, False, True], [True] * 4])
    logits = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    names = ["tables", "log_beta", "scores.left", "scores.right"]
    start = [dict(coupling.potentials.named_parameters())[name].detach().requires_grad_() for name in names]

    def query(logits: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        replaced = {f"potentials.{k}": v for k, v in zip(names, parameters, strict=True)}
        dist = torch.func.functional_call(coupling, replaced, (logits,), {"hidden": hidden})
        return dist.log_prob(value, sites=sites)

    assert torch.autograd.gradcheck(query, (logits, *start))
    assert all(
        bool((g != 0).any()) for g in torch.autograd.grad(query(logits, *start).sum(), (logits, *start))
    )


# --- where it is used -------------------------------------------------------------------------------


class Frequencies:
    """A network that knows how often each token occurs, and nothing else."""

    hidden_size = 2

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.vocab_size = self.mask_token_id = logits.shape[-1]

    def __call__(self, xt: torch.Tensor) -> DenoiserOutput:
        return DenoiserOutput(
            logits=self.logits.expand(*xt.shape, self.vocab_size), hidden=torch.zeros(*xt.shape, 2)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_has_the_law_that_the_bound_bounds(
    kind: type[SpanningTreeCoupling], generator: torch.Generator
) -> None:
    """T = 2 over three sites: the sum over the set of the first step is the law of the samples."""
    coupling = random_coupling(kind, 3, 2, max_offset=2).float()
    denoiser = Frequencies(torch.randn(3, 2))
    everything, masked = sequences(3, 2), torch.ones(8, 3, dtype=torch.bool)
    law, bound = torch.zeros(8), torch.zeros(8)
    first = coupling(denoiser(everything).logits)
    with torch.no_grad():
        for chosen in itertools.product([False, True], repeat=3):  # each site is revealed with chance 1/2
            sites = torch.tensor(chosen).expand(8, 3)
            rest = coupling(denoiser(everything).logits, tokens=everything, known=sites)
            both = first.log_prob(everything, sites=sites) + rest.log_prob(everything, sites=masked & ~sites)
            law += both.exp() / 8
            bound -= both / 8
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-5)
    assert bool((bound >= -law.log() - 1e-5).all())
    drawn = (
        Sampler(denoiser, coupling, steps=2).generate(torch.full((20_000, 3), 2), generator=generator).tokens
    )
    counts = torch.bincount((drawn * torch.tensor([4, 2, 1])).sum(-1), minlength=8)
    assert stats.chisquare(counts.numpy(), (law / law.sum()).double().numpy() * len(drawn)).pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_the_pyro_program(kind: type[SpanningTreeCoupling]) -> None:
    """Its probabilities sum to 1 and are those of its draws."""
    coupling = random_coupling(kind, 3, 2, max_offset=2).float()
    process = ReverseProcess(Frequencies(torch.randn(3, 2)), coupling, steps=3)
    xt = torch.tensor([[2, 2, 2], [2, 1, 2]])
    step = process.reveal_step(xt, 2)
    everything = sequences(3, 3)[:, None]
    chance = step.log_prob(everything.expand(27, 2, 3)).detach().double().exp()
    torch.testing.assert_close(chance.sum(0), torch.ones(2).double())
    drawn = step.sample((20_000,))
    for row in range(2):
        counts = torch.bincount((drawn[:, row] * torch.tensor([9, 3, 1])).sum(-1), minlength=27)
        keep = chance[:, row] > 0
        assert bool((counts[~keep] == 0).all())
        want = chance[keep, row] / chance[keep, row].sum() * len(drawn)
        assert stats.chisquare(counts[keep].numpy(), want.numpy()).pvalue > 1e-3


def planted(number: int, generator: torch.Generator) -> torch.Tensor:
    """Eight tokens of four values along a tree: each repeats the one two before it, with chance 0.9."""
    blocks = torch.randint(4, (number, 8), generator=generator)
    for i in range(2, 8):
        keep = torch.rand(number, generator=generator) < 0.9
        blocks[:, i] = torch.where(keep, blocks[:, i - 2], blocks[:, i])
    return blocks


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_tree_is_found(kind: type[SpanningTreeCoupling], generator: torch.Generator) -> None:
    blocks = planted(2000, generator)
    coupling = kind(8, 4, max_offset=4)
    found = coupling.init_from_corpus(blocks)
    assert found["offset 2"] > 10 * found["offset 1"] and found["sharpness"] > 1 and found["gain"] > 0.3
    denoiser = Frequencies(torch.zeros(4))
    held_out = planted(200, generator)
    noised = noise(held_out, 1, LinearSchedule(), 4, generator)
    output = denoiser(noised.xt)
    dist = coupling(output.logits, hidden=output.hidden, tokens=noised.xt, known=noised.known)
    coupled = coupled_nelbo(noised, output.logits, dist).mean().detach()
    factorised = factorised_nelbo(noised, output.logits).mean()
    assert float(factorised) == pytest.approx(8 * math.log(4))
    # What the pairs at offset 2 tell: six edges of mutual information I.
    change = torch.tensor([0.925, 0.025, 0.025, 0.025])
    information = math.log(4) + float((change * change.log()).sum())
    assert float(factorised - coupled) > 0.85 * 6 * information
    table = nelbo_table(
        {"factorised": (denoiser, None), "trees": (denoiser, coupling)}, held_out, steps=(1, 2, 8)
    )
    assert table.values["trees"][1].mean() < table.values["factorised"][1].mean() - 1.0
    assert table.values["trees"][2].mean() < table.values["factorised"][2].mean()


def test_it_trains_in_the_module() -> None:
    from codd_ppl import BidirectionalTransformer, CoDDModule

    denoiser = BidirectionalTransformer(vocab_size=4, hidden_size=8, layers=1, heads=2)
    coupling = SpanningTreeCoupling(8, 4, max_offset=2, hidden_size=8)
    module = CoDDModule(denoiser, coupling, steps=2)
    noised = noise(torch.randint(4, (6, 8)), 2, LinearSchedule(), denoiser.mask_token_id)
    module(noised).mean().backward()
    gradient = coupling.potentials.tables.grad
    assert gradient is not None and bool(gradient.isfinite().all())


def test_wrong_input_is_named() -> None:
    for settings in ({"max_offset": 0}, {"max_offset": 5}, {"iterations": 0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            SpanningTreeCoupling(5, 3, **({"max_offset": 2} | settings))
    with pytest.raises(ConfigError, match="hidden_markov"):
        SpanningTreeCoupling(9, 50_000)
    coupling = SpanningTreeCoupling(5, 3, max_offset=2, hidden_size=4)
    with pytest.raises(ShapeError, match=r"hidden=output\.hidden"):
        coupling(torch.zeros(5, 3))
    coupling = SpanningTreeCoupling(5, 3, max_offset=2)
    with pytest.raises(ShapeError, match="sites"):
        coupling(torch.zeros(4, 3))
    with pytest.raises(LogitsError):
        coupling(torch.full((5, 3), torch.nan))
    with pytest.raises(ShapeError, match="blocks"):
        coupling.init_from_corpus(torch.zeros(3, 4, dtype=torch.int64))
    dist = coupling(torch.zeros(2, 5, 3))
    with pytest.raises(TokenError, match="from 0 to 2"):
        dist.log_prob(torch.full((2, 5), 3))
    with pytest.raises(ShapeError, match="expected tokens of shape"):
        dist.log_prob(torch.zeros(3, 5, dtype=torch.int64))
    with pytest.raises(ShapeError, match="bool mask"):
        dist.log_prob(torch.zeros(2, 5, dtype=torch.int64), sites=torch.ones(5))
