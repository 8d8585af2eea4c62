"""Ways to draw: their laws through the sampler, the k best, and errors that teach."""

import pytest
import torch

from codd_ppl import CouplingLayer, topologies
from codd_ppl.denoisers import DenoiserOutput
from codd_ppl.errors import ConfigError
from codd_ppl.sampling import (
    ActivatedCoupling,
    AnyOrder,
    Joint,
    KBest,
    Latent,
    Mode,
    Sampler,
    Temperature,
    TopK,
    TopP,
    drawing_method,
    k_best,
)
from codd_ppl.testing import chi_square_p_value, enumerate_sequences

GRAPHS = {
    "hidden_markov": lambda sites, vocab: topologies.hidden_markov(sites, vocab, 3),
    "latent_tree": lambda sites, vocab: topologies.latent_tree(sites, vocab, 3),
    "chain": topologies.chain,
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Constant:
    """A network that says the same whatever it is shown; notes how often it was asked."""

    def __init__(self, logits):
        self.logits, self.calls = logits, 0
        self.vocab_size = self.mask_token_id = logits.shape[-1]
        self.hidden_size = 1

    def __call__(self, xt):
        self.calls += 1
        logits = self.logits.expand(*xt.shape, -1)
        return DenoiserOutput(logits=logits, hidden=logits[..., :1])


def models(name="hidden_markov", sites=4, vocab=3, seed=0, scale=1.5):
    generator = seeded(seed)
    coupling = CouplingLayer(GRAPHS[name](sites, vocab), vocab).double()
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return Constant(torch.randn(sites, vocab, generator=generator, dtype=torch.float64)), coupling


@torch.no_grad()
def law(denoiser, coupling, batch=1, known=None):
    tokens = torch.zeros(batch, coupling.sites, dtype=torch.int64)
    known = torch.zeros(coupling.sites, dtype=torch.bool) if known is None else known
    return coupling(denoiser(tokens).logits, tokens=tokens, known=known.expand_as(tokens))


def counts(tokens, vocab=3):
    place = vocab ** torch.arange(tokens.shape[-1] - 1, -1, -1)
    return (tokens * place).sum(-1).bincount(minlength=vocab ** tokens.shape[-1])


@torch.no_grad()
def table(dist):
    return dist.log_prob(enumerate_sequences(dist.vocab_size, len(dist.sites))[:, None]).exp()[:, 0]


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(
    "draw",
    [
        "joint",
        "latent",
        "any_order",
        AnyOrder(order="entropy", turns=None),
        AnyOrder(order="margin", turns=1),
    ],
)
def test_at_temperature_one_every_random_draw_is_the_joint(name, draw):
    denoiser, coupling = models(name)
    sampler = Sampler(denoiser, coupling, steps=1, drawing=draw)
    generation = sampler.generate(torch.full((8_000, 4), 3), seeded(1))
    assert generation.nfe == denoiser.calls == 1
    expected = table(law(denoiser, coupling))
    assert chi_square_p_value(counts(generation.tokens), expected) > 1e-3


def test_a_subset_is_drawn_from_its_marginal_in_any_order():
    denoiser, coupling = models()
    dist = law(denoiser, coupling, 8_000)
    revealed = torch.tensor([True, False, True, True]).expand(8_000, 4)
    expected = table(law(denoiser, coupling)).reshape(3, 3, 3, 3).sum(1).flatten()
    drawn = AnyOrder().draw(dist, revealed, seeded(2))[:, [0, 2, 3]]
    assert chi_square_p_value(counts(drawn), expected) > 1e-3


@pytest.mark.parametrize("draw", [Latent, AnyOrder])
def test_lower_temperatures_write_likelier_text(draw):
    denoiser, coupling = models()
    dist = law(denoiser, coupling, 4_000)
    revealed = torch.ones(4_000, 4, dtype=torch.bool)
    scores = [
        float(dist.log_prob(draw(t).draw(dist, revealed, seeded(3))).mean().detach())
        for t in (0.3, 0.7, 1.0, 2.0)
    ]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[2] + 0.2


def test_the_order_of_any_order_is_that_of_the_heuristic():
    denoiser, coupling = models(sites=6)
    dist, asked = law(denoiser, coupling, 1), []

    class Watched:
        marginals, log_prob, sample = dist.marginals, dist.log_prob, dist.sample

        def sample_in_turns(self, turns, temperature, generator=None):
            asked.append(turns(dist.marginals))
            return torch.zeros(1, 6, dtype=torch.int64)

    revealed = torch.tensor([[True, True, False, True, True, True]])
    AnyOrder(0.5, turns=None).draw(Watched(), revealed)
    AnyOrder(0.5, turns=2).draw(Watched(), revealed)
    order = dist.marginals.amax(-1)[0].masked_fill(~revealed[0], -1).argsort(descending=True)[:5]
    assert asked[0][0, order].tolist() == [0, 1, 2, 3, 4] and asked[0][0, 2] == -1
    assert asked[1][0, order].tolist() == [0, 0, 0, 1, 1] and asked[1][0, 2] == -1


@pytest.mark.parametrize("name", GRAPHS)
def test_the_k_best_are_ranked_by_the_tokens_alone(name):
    dist = law(*models(name), known=torch.tensor([False, True, False, False]))
    everything = table(dist).sort(descending=True)
    assert torch.equal(Mode().draw(dist, ~dist.known), dist.mode)
    logs, tokens = k_best(dist, 600)
    places = (tokens[0] * 3 ** torch.arange(3, -1, -1)).sum(-1)
    real = logs[0] > -torch.inf
    assert len(set(places[real].tolist())) == int(real.sum()) == 27  # every sequence once
    assert torch.allclose(logs[0][real].exp(), everything.values[:27], atol=1e-9)
    assert torch.equal(KBest(600).draw(dist, ~dist.known), tokens[:, 0])
    best = [float(dist.log_prob(KBest(k).draw(dist, ~dist.known)).detach()) for k in (1, 2, 4, 600)]
    assert best == sorted(best) and best[-1] == pytest.approx(float(everything.values[0].log()))
    # of a set of sites: by their own marginal
    sites = torch.tensor([[True, False, False, False]])
    logs, tokens = k_best(dist, 600, sites)
    assert int((logs > -torch.inf).sum()) == 3
    assert torch.allclose(logs[0, :3].exp(), dist.marginals[0, 0].sort(descending=True).values)


def test_at_temperature_1_a_latent_draw_is_the_joint_one():
    denoiser, coupling = models()
    drawn = [
        Sampler(denoiser, coupling, "random_order", steps=2, drawing=draw)
        .generate(torch.full((1, 4), 3), seeded(4))
        .tokens
        for draw in ("joint", "latent", "any_order")
    ]
    assert drawn[0].equal(drawn[1]) and drawn[0].equal(drawn[2])


def test_modes_need_no_randomness():
    denoiser, coupling = models()
    for draw in ("mode", "k_best"):
        sampler = Sampler(denoiser, coupling, "low_confidence", steps=2, drawing=draw)
        first, second = (sampler.generate(torch.full((1, 4), 3), seeded(s)).tokens for s in (0, 1))
        assert torch.equal(first, second)


def test_names_and_errors():
    assert [drawing_method(n) for n in ("joint", "latent", "any_order", "mode", "k_best")] == [
        Joint(), Latent(), AnyOrder(), Mode(), KBest()
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"any_order.*'greedy'"):
        drawing_method("greedy")
    for wrong in (Joint, 3):
        with pytest.raises(ConfigError, match="draw"):
            drawing_method(wrong)
    for make in (lambda: Latent(0.0), lambda: AnyOrder(-1.0)):
        with pytest.raises(ConfigError, match='drawing="mode"'):
            make()
    with pytest.raises(ConfigError, match="order"):
        AnyOrder(order="random")
    with pytest.raises(ConfigError, match="turns"):
        AnyOrder(turns=0)
    with pytest.raises(ConfigError, match="k:"):
        KBest(0)


@pytest.mark.parametrize("draw", ["latent", "any_order", "mode", "k_best"])
def test_a_law_that_cannot_says_so(toy, draw):
    toy = toy()
    with pytest.raises(ConfigError, match=r'TableDistribution.*drawing="joint"'):
        Sampler(toy.denoiser, toy.perfect, steps=1, drawing=draw).generate(toy.template(2))


# -- logits ------------------------------------------------------------------------------------------


def test_transforms_of_the_logits_by_hand():
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    kept = lambda transform: torch.isfinite(transform(p.log())).tolist()  # noqa: E731
    assert kept(TopK(2)) == [True, True, False, False]
    assert kept(TopK(9)) == kept(TopP(1.0)) == [True] * 4
    assert kept(TopP(0.5)) == kept(TopP(0.01)) == [True, False, False, False]
    assert kept(TopP(0.51)) == kept(TopP(0.74)) == [True, True, False, False]
    assert kept(TopP(0.91)) == [True] * 4
    assert torch.allclose(Temperature(0.5)(p.log()).softmax(-1), p**2 / (p**2).sum())
    assert torch.equal(TopP(0.6)(p.log().flip(0)), TopP(0.6)(p.log()).flip(0))
    for make, name in (
        (lambda: TopK(0), "top_k"),
        (lambda: TopP(0.0), "top_p"),
        (lambda: Temperature(0.0), "mode"),
    ):
        with pytest.raises(ConfigError, match=name):
            make()


def test_the_sampler_couples_transformed_logits():
    denoiser, coupling = models()
    sampler = Sampler(denoiser, coupling, steps=1, logits=[Temperature(0.7), TopK(2)])
    tokens = sampler.generate(torch.full((8_000, 4), 3), seeded(4)).tokens
    sharp = Constant(TopK(2)(denoiser.logits / 0.7))
    expected = table(law(sharp, coupling))
    assert (expected == 0).any()
    assert chi_square_p_value(counts(tokens), expected) > 1e-3
    assert chi_square_p_value(counts(tokens), table(law(denoiser, coupling))) < 1e-6
    with pytest.raises(ConfigError, match="logits"):
        Sampler(denoiser, coupling, logits=[TopK])
    with pytest.raises(ConfigError, match="logits"):
        Sampler(denoiser, coupling, logits=0.7)


# -- activation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["joint", "latent", "any_order", "k_best", "mode"])
def test_rows_are_coupled_below_their_share_of_masks(draw):
    denoiser, coupling = models()
    template = torch.full((8_000, 4), 3)
    template[4_000:, 1:3] = 1
    sampler = Sampler(denoiser, coupling, steps=1, active_below=0.5, drawing=draw)
    tokens = sampler.generate(template, seeded(5)).tokens
    q = denoiser.logits.softmax(-1)
    alone = torch.einsum("a,b,c,d->abcd", *q).flatten()
    known = torch.tensor([False, True, True, False])
    tokens_known = torch.tensor([[0, 1, 1, 0]])
    with torch.no_grad():
        half = coupling(denoiser.logits[None], tokens=tokens_known, known=known[None])
    pairs = table(half).reshape(3, 3, 3, 3)[:, 1, 1].flatten()
    if draw in ("k_best", "mode"):
        assert (tokens[:4_000] == q.argmax(-1)).all()
        assert draw == "mode" or (counts(tokens[4_000:, [0, 3]]).argmax() == pairs.argmax()).all()
        return
    assert chi_square_p_value(counts(tokens[:4_000]), alone) > 1e-3
    assert chi_square_p_value(counts(tokens[4_000:, [0, 3]]), pairs) > 1e-3
    assert chi_square_p_value(counts(tokens[:4_000]), table(law(denoiser, coupling))) < 1e-6


def test_a_coupling_that_is_off_is_not_called():
    denoiser, coupling = models()
    calls = []
    coupling.register_forward_hook(lambda *_: calls.append(1))
    Sampler(denoiser, coupling, "low_confidence", steps=4, active_below=0.5).generate(
        torch.full((2, 4), 3), seeded(0)
    )
    assert len(calls) == 2  # with 2 and 1 of 4 masked
    warm = Sampler(denoiser, coupling, "low_confidence", steps=4, active_below=0.5, warm_start=True)
    assert warm.generate(torch.tensor([[3, 3, 3, 3], [3, 1, 3, 1]]), seeded(0)).nfe == 4
    for gamma in (-0.1, 1.1, True):
        with pytest.raises(ConfigError, match="active_below"):
            ActivatedCoupling(coupling, gamma)
