"""Windows over sequences longer than the graph: minimum covers, laws by enumeration, and extension of tied chains."""

import itertools

import pytest
import torch

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.diffusion.nelbo import SetDistribution
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.graphs import topologies
from codd_ppl.potentials import ContextualLatentPotentials, MixturePotentials
from codd_ppl.sampling import (
    Coupling,
    JointDistribution,
    Sampler,
    WindowedCoupling,
    aligned_cover,
    extended,
    minimum_cover,
    on_graph,
)
from codd_ppl.spanning_tree_coupling import SpanningTreeCoupling
from codd_ppl.testing import chi_square_p_value, enumerate_sequences

VOCAB, MASK = 2, 2


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def lively(coupling, seed=0):
    """Strong random potentials."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator))
    return coupling


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    network = BidirectionalTransformer(VOCAB, hidden_size=16, layers=1, heads=2)
    with torch.no_grad():
        network.head.weight.normal_(std=0.5)
    return network.eval()


COUPLINGS = {
    "hidden_markov": lambda: lively(CouplingLayer(topologies.hidden_markov(3, VOCAB, 3), VOCAB)),
    "product": lambda: lively(
        CouplingLayer(topologies.latent_tree(3, VOCAB, 3, tie=False), VOCAB, combine="product")
    ),
    "spanning_trees": lambda: lively(SpanningTreeCoupling(3, VOCAB, max_offset=2)),
}


@torch.no_grad()
def windowed(denoiser, coupling, xt):
    output = denoiser(xt)
    layer = WindowedCoupling(coupling, xt.shape[1])
    return layer(output.logits, hidden=output.hidden, tokens=xt, known=xt != MASK)


def counts(tokens):
    place = VOCAB ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return (tokens * place).sum(-1).bincount(minlength=VOCAB ** tokens.shape[1])


# ---------------------------------------------------------------------- covers


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
def test_covers_are_minimal_and_disjoint(length):
    """Against a search over all sets of windows, for every set of seven sites at once."""
    sites = enumerate_sequences(2, 7).bool()
    cover = minimum_cover(sites, length)
    assert ((cover.start >= 0) & (cover.start <= 7 - length)).all()
    taken = torch.zeros(sites.shape, dtype=torch.int64)
    rows = cover.row[:, None].expand_as(cover.chosen)
    taken.index_put_((rows, cover.place), cover.chosen.long(), accumulate=True)
    assert torch.equal(taken, sites.long()), "each site of the set in exactly one window, no other site"
    assert cover.chosen.any(-1).all()
    windows = [set(range(s, s + length)) for s in range(7 - length + 1)]
    for row, used in zip(sites, cover.row.bincount(minlength=len(sites)), strict=True):
        wanted = set(row.nonzero()[:, 0].tolist())
        fewest = next(
            n
            for n in range(8)
            if any(wanted <= set().union(*some) for some in itertools.combinations(windows, n))
        )
        assert used == fewest


def test_a_window_has_its_sites_in_the_middle():
    sites = torch.zeros(2, 20, dtype=torch.bool)
    sites[0, 9], sites[0, 10], sites[1, 0], sites[1, 19] = True, True, True, True
    assert minimum_cover(sites, 6).start.tolist() == [7, 0, 14]


@pytest.mark.parametrize("length", [0, 8])
def test_windows_must_fit(length):
    with pytest.raises(ConfigError, match=r"1 to 7"):
        minimum_cover(torch.ones(1, 7, dtype=torch.bool), length)


def test_aligned_covers():
    """By hand: blocks from each row's start on; one that the end cuts short is the last part of a window."""
    sites = torch.tensor(
        [[0, 1, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]
    ).bool()
    cover = aligned_cover(sites, 3, torch.tensor([1, 2, 0]))
    assert cover.row.tolist() == [0, 0, 0, 2, 2, 2] and cover.start.tolist() == [1, 4, 5, 0, 3, 5]
    chosen = [[1, 0, 0], [0, 0, 1], [0, 0, 1], [1, 1, 1], [1, 1, 1], [0, 1, 1]]
    assert cover.chosen.long().tolist() == chosen
    taken = torch.zeros_like(sites, dtype=torch.int64)
    taken.index_put_((cover.row[:, None].expand_as(cover.place), cover.place), cover.chosen.long(), True)
    assert torch.equal(taken, (sites & (torch.arange(8) >= torch.tensor([1, 2, 0])[:, None])).long())
    first = aligned_cover(sites, 3, torch.tensor([1, 2, 0]), most=1)
    assert first.row.tolist() == [0, 2] and first.start.tolist() == [1, 0]
    assert len(aligned_cover(sites[:0], 3, torch.zeros(0, dtype=torch.int64)).row) == 0
    with pytest.raises(ConfigError, match="1 to 8"):
        aligned_cover(sites, 9, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"expected \(3,\)"):
        aligned_cover(sites, 3, torch.zeros(2, dtype=torch.int64))


# ---------------------------------------------------------------------- laws


@pytest.mark.parametrize("name", COUPLINGS)
def test_log_prob_is_the_product_over_windows(denoiser, name):
    """Written out window by window with the coupling itself; two rows with covers of different sizes."""
    coupling = COUPLINGS[name]()
    xt = torch.tensor([[2, 2, 0, 1, 2, 2, 2, 2], [1, 2, 0, 0, 1, 1, 1, 0]])
    dist = windowed(denoiser, coupling, xt)
    output = denoiser(xt)
    value = torch.randint(VOCAB, xt.shape, generator=seeded(0))
    revealed = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0, 0]]).bool()
    expected = []
    for row, windows in enumerate([[(0, [0, 1]), (5, [5, 6, 7])], [(0, [1])]]):
        total = torch.zeros(())
        for start, places in windows:
            part = (slice(row, row + 1), slice(start, start + 3))
            law = coupling(
                output.logits[part], hidden=output.hidden[part], tokens=xt[part], known=xt[part] != MASK
            )
            chosen = torch.zeros(1, 3, dtype=torch.bool)
            chosen[0, [p - start for p in places]] = True
            total = total + law.log_prob(value[part], sites=chosen)[0]
        expected.append(total)
    assert torch.allclose(dist.log_prob(value, sites=revealed), torch.stack(expected), atol=1e-5)
    assert torch.allclose(dist.restrict(revealed).log_prob(value), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("name", COUPLINGS)
@pytest.mark.parametrize("sites", [range(7), [0, 2, 6], [3], []])
def test_probabilities_of_every_set_sum_to_one(denoiser, name, sites):
    coupling = COUPLINGS[name]()
    xt = torch.tensor([[2, 2, 2, 1, 2, 2, 2]])
    dist = windowed(denoiser, coupling, xt)
    chosen = torch.zeros(1, 7, dtype=torch.bool)
    chosen[0, list(sites)] = True
    values = torch.where(chosen & (xt == MASK), enumerate_sequences(VOCAB, 7), torch.where(xt == MASK, 0, xt))
    logs = dist.log_prob(values.unique(dim=0)[:, None], sites=chosen).detach()
    assert float(logs.exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", COUPLINGS)
@torch.no_grad()
def test_draws_have_the_law_that_log_prob_says(denoiser, name):
    """One step on sequences of seven, two kinds of rows in one batch; and whole draws of the distribution."""
    coupling = COUPLINGS[name]()
    template = torch.full((8000, 7), MASK)
    template[4000:, 2] = 1
    tokens = Sampler(denoiser, WindowedCoupling(coupling, 7), steps=1).generate(template, seeded(1)).tokens
    for part in (slice(0, 4000), slice(4000, None)):
        dist = windowed(denoiser, coupling, template[part][:1])
        law = dist.log_prob(enumerate_sequences(VOCAB, 7)[:, None])[:, 0].exp()
        assert chi_square_p_value(counts(tokens[part]), law) > 1e-4
        assert chi_square_p_value(counts(dist.sample((4000,), generator=seeded(2))[:, 0]), law) > 1e-4


@torch.no_grad()
def test_the_law_is_neither_independent_nor_blind_to_the_cover(denoiser):
    """The tests above can fail: independent sites are told apart, and so is the cover of another set."""
    coupling = COUPLINGS["hidden_markov"]()
    xt = torch.full((1, 7), MASK)
    dist = windowed(denoiser, coupling, xt)
    draws = dist.sample((8000,), generator=seeded(0))[:, 0]
    alone = CouplingLayer(topologies.independent(7, VOCAB), VOCAB)(denoiser(xt).logits)
    states = enumerate_sequences(VOCAB, 7)[:, None]
    assert chi_square_p_value(counts(draws), alone.log_prob(states)[:, 0].exp()) < 1e-6


@torch.no_grad()
def test_two_steps_have_the_law_of_the_reverse_process(denoiser):
    """Random unmasking, state by state over the sets that the first step reveals: the law that NELBO_2 bounds."""
    coupling = COUPLINGS["hidden_markov"]()
    layer = WindowedCoupling(coupling, 5)
    tokens = (
        Sampler(denoiser, layer, "random", steps=2).generate(torch.full((10_000, 5), MASK), seeded(3)).tokens
    )
    states = enumerate_sequences(VOCAB, 5)
    first = windowed(denoiser, coupling, torch.full((1, 5), MASK))
    law = torch.zeros(len(states))
    for coins in enumerate_sequences(2, 5).bool():  # each set with chance 1/32
        now = first.log_prob(states[:, None], sites=coins.expand(len(states), 1, 5))[:, 0]
        xt = torch.where(coins, states, MASK)
        law += (now + windowed(denoiser, coupling, xt).log_prob(states)).exp() / 32
    assert float(law.sum()) == pytest.approx(1, abs=1e-4)
    assert chi_square_p_value(counts(tokens), law) > 1e-4


def test_a_graph_as_long_as_the_text_is_the_coupling_itself(denoiser):
    coupling = COUPLINGS["hidden_markov"]()
    xt = torch.tensor([[2, 1, 2], [2, 2, 2]])
    output = denoiser(xt)
    plain = coupling(output.logits, tokens=xt, known=xt != MASK)
    dist = windowed(denoiser, coupling, xt)
    value = torch.tensor([[0, 1, 1], [1, 0, 1]])
    assert torch.allclose(dist.log_prob(value), plain.log_prob(value), atol=1e-6)
    assert torch.allclose(dist.marginals, plain.marginals, atol=1e-5)
    assert torch.equal(dist.sample(generator=seeded(0)), plain.sample(generator=seeded(0)))
    assert torch.equal(dist.mode, plain.mode)


def test_known_tokens_rows_without_a_set_and_protocols(denoiser):
    coupling = COUPLINGS["hidden_markov"]()
    xt = torch.tensor([[0, 2, 1, 2, 1], [0, 1, 1, 0, 1]])
    dist = windowed(denoiser, coupling, xt)
    assert isinstance(WindowedCoupling(coupling, 5), Coupling)
    assert isinstance(dist, JointDistribution) and isinstance(dist, SetDistribution)
    assert torch.equal(
        dist.sample((3,), generator=seeded(0))[..., [0, 2, 4]], xt[:, [0, 2, 4]].expand(3, 2, 3)
    )
    assert torch.equal(dist.marginals[1], torch.nn.functional.one_hot(xt[1], VOCAB).float())
    assert torch.allclose(dist.marginals.sum(-1), torch.ones(2, 5))
    nothing = dist.restrict(torch.zeros(2, 5, dtype=torch.bool))
    assert torch.equal(nothing.sample(), torch.where(xt == MASK, 0, xt))
    assert torch.equal(nothing.log_prob(xt), torch.zeros(2))
    value = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    assert dist.log_prob(value)[0] > -torch.inf and dist.log_prob(value)[1] == -torch.inf


def test_all_windows_of_all_rows_are_one_query(denoiser):
    coupling = COUPLINGS["hidden_markov"]()
    calls = []
    coupling.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    template = torch.full((3, 11), MASK)
    template[1, 1:] = 0
    template[2] = 1
    windowed(denoiser, coupling, template).sample(generator=seeded(0))
    assert calls == [4 + 1 + 0]


def test_errors_of_windows_teach(denoiser):
    coupling = COUPLINGS["hidden_markov"]()
    with pytest.raises(ConfigError, match="pad the text"):
        WindowedCoupling(coupling, 2)
    layer = WindowedCoupling(coupling, 5)
    with pytest.raises(ShapeError, match=r"\(batch, 5, 2\)"):
        layer(torch.zeros(1, 4, 2))
    with pytest.raises(ShapeError, match="together"):
        layer(torch.zeros(1, 5, 2), tokens=torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ConfigError, match="no projection to start"):
        Sampler(denoiser, layer, warm_start=True)


# ---------------------------------------------------------------------- extension

TIED = {
    "hidden_markov": lambda n: topologies.hidden_markov(n, VOCAB, 3),
    "chain": lambda n: topologies.chain(n, VOCAB),
    "skip_chain": lambda n: topologies.skip_chain(n, VOCAB, (1, 2)),
    "mixture": lambda n: topologies.star(n, VOCAB, 3, tie="emission"),
    "independent": lambda n: topologies.independent(n, VOCAB),
}


@pytest.mark.parametrize("combine", ["projected", "product"])
@pytest.mark.parametrize("name", TIED)
def test_an_extended_coupling_is_the_one_built_on_the_longer_graph(denoiser, name, combine):
    short = lively(CouplingLayer(TIED[name](4), VOCAB, combine=combine, sweeps=2))
    for sites in (6, 3):
        long, built = (
            extended(short, sites),
            CouplingLayer(TIED[name](sites), VOCAB, combine=combine, sweeps=2),
        )
        built.load_state_dict(short.state_dict())
        assert long.graph == built.graph and long.sites == sites
        logits = denoiser(torch.full((2, sites), MASK)).logits
        value = torch.randint(VOCAB, (2, sites), generator=seeded(0))
        assert torch.equal(long(logits).log_prob(value), built(logits).log_prob(value))
    assert extended(short, 4) is short


def test_parameters_are_shared_and_stay_frozen():
    short = lively(CouplingLayer(TIED["hidden_markov"](4), VOCAB)).eval()
    short.potentials.requires_grad_(False)
    long = extended(short, 9)
    assert not long.training
    for mine, theirs in zip(long.parameters(), short.parameters(), strict=True):
        assert mine is theirs and not mine.requires_grad


@pytest.mark.parametrize("ratio", [False, True])
def test_contextual_potentials_and_mixtures_extend_too(ratio):
    graph = topologies.hidden_markov
    kinds = [
        lambda n: ContextualLatentPotentials(
            graph(n, VOCAB, 4), 16, width=8, gates=True, emission_rank=2, mask_ratio=ratio
        ),
        lambda n: MixturePotentials(graph(n, VOCAB, 4), 2, 16, width=8, mask_ratio=ratio),
    ]
    for make in kinds:
        short = lively(CouplingLayer(graph(4, VOCAB, 4), VOCAB, 16, potentials=make(4)))
        built = CouplingLayer(graph(7, VOCAB, 4), VOCAB, 16, potentials=make(7))
        built.load_state_dict(short.state_dict())
        logits, hidden = torch.randn(2, 7, VOCAB), torch.randn(2, 7, 16)
        value = torch.randint(VOCAB, (2, 7))
        found = extended(short, 7)(logits, hidden=hidden).log_prob(value)
        assert torch.equal(found, built(logits, hidden=hidden).log_prob(value))


def test_what_belongs_to_a_length_does_not_extend():
    tree = CouplingLayer(topologies.latent_tree(4, VOCAB, 3), VOCAB)
    with pytest.raises(ConfigError, match="WindowedCoupling or BlockSampler"):
        extended(tree, 8)
    with pytest.raises(ConfigError, match="at least 1"):
        extended(tree, 0)
    hmm = CouplingLayer(topologies.hidden_markov(4, VOCAB, 3), VOCAB)
    with pytest.raises(ConfigError, match="same ties"):
        extended(hmm, 1)
    with pytest.raises(ConfigError, match="same ties"):
        on_graph(hmm, topologies.hidden_markov(8, VOCAB, 4))
