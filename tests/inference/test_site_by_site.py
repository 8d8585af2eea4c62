"""Draws of one site after the other: their law by enumeration, and the fast route against full queries."""

import pytest
import torch

from codd_ppl import CouplingLayer, topologies
from codd_ppl.distributions import coupled_categorical, decoding
from codd_ppl.errors import ConfigError, InfeasibleError, ShapeError
from codd_ppl.inference import log_score, native
from codd_ppl.inference.cursor import Visits
from codd_ppl.inference.site_by_site import draw_along_path
from codd_ppl.testing import chi_square_p_value, enumerate_sequences

GRAPHS = {
    "hidden_markov": lambda sites, vocab: topologies.hidden_markov(sites, vocab, 3),
    "latent_tree": lambda sites, vocab: topologies.latent_tree(sites, vocab, 3),
    "chain": topologies.chain,
    "independent": topologies.independent,
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def law(graph, vocab, batch=1, known=0.0, dtype=torch.float64, seed=0, scale=1.5):
    generator = seeded(seed)
    coupling = CouplingLayer(graph, vocab).to(dtype)
    for parameter in coupling.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    shape = (batch, coupling.sites)
    tokens = torch.randint(vocab, shape, generator=generator)
    logits = torch.randn(*shape, vocab, generator=generator, dtype=dtype)
    return coupling(logits, tokens=tokens, known=torch.rand(shape, generator=generator) < known)


def counts(tokens, vocab):
    place = vocab ** torch.arange(tokens.shape[-1] - 1, -1, -1)
    return (tokens * place).sum(-1).bincount(minlength=vocab ** tokens.shape[-1])


def enumerated(joint, turns, temperature):
    """Law of all sequences, from the table of the joint one (vocab, ..), site by site."""
    sites = [
        i
        for t in range(max(turns) + 1)
        for i in range(len(turns))[:: 1 if t % 2 == 0 else -1]
        if turns[i] == t
    ]
    result, before = torch.ones_like(joint), []
    for site in sites:
        rest = [i for i in range(joint.ndim) if i not in (*before, site)]
        marginal = joint.sum(rest, keepdim=True) if rest else joint
        power = marginal ** (1 / temperature)
        result = result * power / power.sum(site, keepdim=True)
        before.append(site)
    return result.flatten()


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_the_law_is_the_enumerated_one(name, temperature):
    dist, turns = law(GRAPHS[name](4, 3), 3), [1, 0, 2, 0]
    joint = dist.log_prob(enumerate_sequences(3, 4)[:, None]).exp().detach().reshape(3, 3, 3, 3)
    drawn = dist.expand((8_000,)).sample_in_turns(
        torch.tensor(turns).expand(8_000, 4), temperature, seeded(1)
    )
    assert chi_square_p_value(counts(drawn, 3), enumerated(joint, turns, temperature)) > 1e-3
    if temperature == 1:
        assert torch.allclose(enumerated(joint, turns, 1.0), joint.flatten())
    else:
        assert chi_square_p_value(counts(drawn, 3), joint.flatten()) < 1e-6


def test_the_order_matters_and_is_the_one_asked_for():
    dist = law(topologies.chain(3, 3), 3, scale=3.0)
    joint = dist.log_prob(enumerate_sequences(3, 3)[:, None]).exp().detach().reshape(3, 3, 3)
    drawn = counts(
        dist.expand((8_000,)).sample_in_turns(torch.tensor([2, 0, 1]).expand(8_000, 3), 0.4, seeded(1)), 3
    )
    assert chi_square_p_value(drawn, enumerated(joint, [2, 0, 1], 0.4)) > 1e-3
    assert chi_square_p_value(drawn, enumerated(joint, [0, 1, 2], 0.4)) < 1e-6


@pytest.mark.parametrize("compiled", ["1", "0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_the_cursor_draws_what_full_queries_draw_from_the_same_numbers(
    monkeypatch, compiled, dtype, temperature
):
    if compiled == "0":
        monkeypatch.setattr(native, "usable", lambda *_: False)
    dist = law(topologies.hidden_markov(9, 5, 4), 5, batch=6, known=0.3, dtype=dtype)
    for turns in (torch.randint(-1, 4, (6, 9), generator=seeded(2)), torch.arange(9).flip(0).expand(6, 9)):
        tokens, uniform = (dist._evidence, dist.tokens, dist.known), torch.rand(6, 9, dtype=torch.float64)
        given = (dist.plan, dist._potentials, *tokens, dist._leaves, turns, uniform, temperature)
        assert draw_along_path(*given) is not None
        fast = dist.sample_in_turns(turns, temperature, seeded(3))
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "draw_along_path", lambda *_: None)
            slow = dist.sample_in_turns(turns, temperature, seeded(3))
        assert torch.equal(fast, slow)
        assert torch.equal(fast[dist.known], dist.tokens[dist.known])
        assert (fast[(turns < 0) & ~dist.known] == 0).all()


@pytest.mark.skipif(native.library() is None, reason="no compiled loops here")
def test_the_leaves_are_not_made_where_the_path_serves():
    dist = law(topologies.hidden_markov(9, 5, 4), 5, batch=6, known=0.3)
    dist.sample_in_turns(torch.arange(9).expand(6, 9), 0.7, seeded(0))
    assert dist._path is not None and "_leaves" not in dist.__dict__


def test_turns_may_be_read_off_the_marginals():
    dist = law(topologies.hidden_markov(7, 5, 4), 5, batch=3, known=0.3)
    seen = []

    def turns(marginals):
        seen.append(marginals)
        return marginals.amax(-1).argsort(-1, descending=True).argsort(-1)

    drawn = dist.sample_in_turns(turns, generator=seeded(0))
    assert torch.allclose(seen[0][~dist.known], dist.marginals[~dist.known])  # which caches them
    assert torch.equal(drawn, dist.sample_in_turns(turns, generator=seeded(0)))
    assert torch.equal(seen[1], dist.marginals)


def test_what_underflows_is_drawn_by_full_queries():
    # Half of the states are e^-120 times less likely; the last token is possible in these states alone.
    dist = law(topologies.hidden_markov(6, 4, 4), 4, batch=2, dtype=torch.float32)
    sharp = {key: 60 * t for key, t in dist._potentials.items()}
    dist = coupled_categorical.CoupledCategorical(dist.plan, sharp, dist._evidence)
    turns = torch.arange(6).expand(2, 6)
    drawn = dist.sample_in_turns(turns, generator=seeded(0))
    exact = coupled_categorical.CoupledCategorical(
        dist.plan, {k: t.double() for k, t in sharp.items()}, dist._evidence.double()
    )
    with torch.no_grad():
        assert (exact.log_prob(drawn) > -torch.inf).all()
        assert torch.equal(drawn, exact.sample_in_turns(turns, generator=seeded(0)))


def test_visits_go_forth_and_back():
    turns = torch.tensor([[0, 1, 0, 1], [-1, 1, 1, 0]])
    assert [(site, rows.tolist()) for site, rows in Visits.of(turns)] == [
        (0, [0]), (2, [0]), (3, [1]), (3, [0]), (2, [1]), (1, [0, 1])
    ]  # fmt: skip
    assert list(Visits.of(torch.full((2, 3), -1))) == []
    assert list(Visits.of(torch.zeros(0, 3, dtype=torch.int64))) == []
    assert list(Visits.of(torch.full((2, 3), -5))) == []


def test_turns_are_numbers_of_any_size_and_width():
    dist, turns = law(topologies.hidden_markov(150, 3, 2), 3), torch.arange(150)[None] % 4 - 1
    expected = dist.sample_in_turns(turns, 0.5, seeded(0))
    for dtype in (torch.int8, torch.int16):  # 2 * 150 has no room in the first
        assert dist.sample_in_turns(turns.to(dtype), 0.5, seeded(0)).equal(expected)
    large = torch.where(
        turns > 0, turns + 10**9, turns
    )  # no room for each turn and site; turns keep their parity
    assert dist.sample_in_turns(large, 0.5, seeded(0)).equal(expected)
    assert not dist.sample_in_turns(turns - 9, 0.5, seeded(0)).any()
    for bad in (turns.float(), turns > 0, turns[:, :9], turns + 2**62):
        for given in (bad, lambda _, bad=bad: bad):
            with pytest.raises(ShapeError, match="turns: expected"):
                dist.sample_in_turns(given, 0.5, seeded(0))


def test_sharpened_draws_have_their_enumerated_law():
    dist = law(topologies.hidden_markov(3, 3, 2), 3)
    states, values = enumerate_sequences(2, 3), enumerate_sequences(3, 3)
    named = {f"z{i}": states[:, None, i, None] for i in range(3)} | {
        f"x{i}": values[None, :, i, None] for i in range(3)
    }
    named = {name: v.expand(8, 27, 1) for name, v in named.items()}
    joint = log_score(dist.plan, dist.log_potentials, named)[..., 0].detach().softmax(-1)  # p(x | z)
    weight = (
        log_score(dist.plan, dist.log_potentials, named)[..., 0].detach().logsumexp(-1).softmax(-1)
    )  # p(z)
    for temperature in (1.0, 0.4):
        power = joint ** (1 / temperature)
        expected = (weight[:, None] * power / power.sum(-1, keepdim=True)).sum(0)
        for fast in (True, False):
            many = dist.expand((8_000,))
            if not fast:  # by conditioning and powers, as for graphs whose tokens are not leaves
                many.__dict__["_leaves"] = None
            drawn = many.sample_sharpened(temperature, seeded(5))
            assert chi_square_p_value(counts(drawn, 3), expected) > 1e-3
    assert chi_square_p_value(counts(drawn, 3), dist.log_prob(values[:, None]).exp().detach()[:, 0]) < 1e-6


def test_without_latents_sharpening_is_the_power_of_the_joint():
    dist = law(topologies.chain(3, 3), 3)
    expected = (dist.log_prob(enumerate_sequences(3, 3)[:, None]).detach()[:, 0] / 0.5).softmax(0)
    drawn = dist.expand((8_000,)).sample_sharpened(0.5, seeded(6))
    assert chi_square_p_value(counts(drawn, 3), expected) > 1e-3


def test_errors():
    dist = law(topologies.hidden_markov(4, 3, 2), 3)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="temperature"):
            dist.sample_sharpened(bad)
        with pytest.raises(ConfigError, match="temperature"):
            dist.sample_in_turns(torch.zeros(1, 4, dtype=torch.int64), bad)
    with pytest.raises(ShapeError, match="turns"):
        dist.sample_in_turns(torch.zeros(4, dtype=torch.int64))
    evidence = dist._evidence.clone()
    evidence[0, 2] = -torch.inf
    impossible = coupled_categorical.CoupledCategorical(dist.plan, dist._potentials, evidence)
    with pytest.raises(InfeasibleError):
        impossible.sample_in_turns(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(InfeasibleError):
        impossible.sample_sharpened(0.5)
