"""Tables of bounds and times with real networks and couplings."""

import math

import pytest
import torch
from torch import nn

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers import BidirectionalTransformer, DenoiserOutput
from codd_ppl.diffusion.enumeration import log_prob_fn, nelbo_exact
from codd_ppl.diffusion.masking import mask_tokens, reveal
from codd_ppl.diffusion.schedules import CosineSchedule, LinearSchedule
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.evaluation import nelbo_table, time_sampling
from codd_ppl.graphs import topologies
from codd_ppl.testing import enumerate_sequences


def lively(graph, vocab, combine="projected"):
    """Strong random potentials."""
    coupling = CouplingLayer(graph, vocab, combine=combine)
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.copy_(1.5 * torch.randn_like(parameter))
    return coupling


def network(vocab):
    denoiser = BidirectionalTransformer(vocab, hidden_size=16, layers=1, heads=2)
    nn.init.normal_(denoiser.head.weight, std=0.3)
    return denoiser


class Neighbours(nn.Module):
    """Exact conditional marginals of a hidden Markov coupling's own prior, by conditioning it."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior
        self.vocab_size = self.mask_token_id = prior.vocab_size
        self.hidden_size = 1

    def forward(self, xt):
        known = xt != self.mask_token_id
        flat = torch.zeros(*xt.shape, self.vocab_size)
        logits = self.prior(flat, tokens=xt, known=known).marginals.clamp_min(1e-30).log()
        return DenoiserOutput(logits, logits[..., :1])


@pytest.fixture(scope="module")
def known_prior():
    """A network with the exact marginals of a hidden Markov model, that model projected, and text drawn from it."""
    torch.manual_seed(3)
    prior = lively(topologies.hidden_markov(16, 5, 4), 5, "product")
    with torch.no_grad():  # persistent states, peaked emissions: neighbours tell much of each other
        for name, shape in (("table1", (4, 5)), ("table2", (4, 4))):
            prior.potentials.tables[name].copy_(3 * torch.eye(*shape) + 0.5 * torch.randn(shape))
    coupling = CouplingLayer(prior.graph, 5)
    coupling.load_state_dict(prior.state_dict())
    blank = prior(torch.zeros(16, 5))
    blocks = blank.sample((300,), generator=torch.Generator().manual_seed(0))
    return Neighbours(prior), coupling, blocks, -blank.log_prob(blocks).detach() / (16 * math.log(2))


# ---------------------------------------------------------------------- the table


@pytest.mark.parametrize("combine", ["projected", "product"])
def test_independent_row_is_the_factorised_row_exactly(combine):
    torch.manual_seed(0)
    denoiser, alone = network(7), CouplingLayer(topologies.independent(12, 7), 7, combine=combine)
    blocks = torch.randint(7, (50, 12))
    table = nelbo_table({"factorised": (denoiser, None), "independent": (denoiser, alone)}, blocks, draws=2)
    assert table.steps == (1, 2, 4, 8, 12)
    for T in table.steps:
        assert torch.equal(table.per_block("factorised", T), table.per_block("independent", T))
        assert table.difference("independent", "factorised", T) == (0.0, 0.0)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()], ids=repr)
@pytest.mark.parametrize(
    ("topology", "combine"), [("hmm", "projected"), ("hmm", "product"), ("tree", "projected")]
)
def test_unbiased_for_every_block_against_enumeration(topology, combine, schedule):
    """Also at more steps than sites."""
    torch.manual_seed(1)
    graph = topologies.hidden_markov(3, 2, 3) if topology == "hmm" else topologies.latent_tree(3, 2, 3)
    denoiser, coupling = network(2), lively(graph, 2, combine)
    states, repeats = enumerate_sequences(2, 3), 2000
    table = nelbo_table(
        {"coupled": (denoiser, coupling)}, states.repeat(repeats, 1), (2, 7), schedule, batch_size=8192
    )
    for T in (2, 7):
        with torch.no_grad():
            exact = nelbo_exact(states, T, schedule, log_prob_fn(denoiser, coupling, 2), 2)
        values = table.per_block("coupled", T).reshape(repeats, 8) * 3 * math.log(2)
        error = values.std(0) / math.sqrt(repeats)
        assert ((values.mean(0) - exact).abs() < 4.5 * error + 1e-5).all()
        assert (error < 0.05 * exact.max()).all()


def test_a_network_with_the_prior_s_marginals_is_perfect_when_projected(known_prior):
    """The projected bound is -log p(x0) for every block and every T, with no noise but rounding."""
    denoiser, coupling, blocks, truth = known_prior
    models = {"factorised": (denoiser, None), "projected": (denoiser, coupling)}
    table = nelbo_table(models, blocks, (1, 2, 4, 16), draws=4, batch_size=300)
    assert table.mean("projected", 1) == pytest.approx(float(truth.mean()), rel=1e-4)
    torch.testing.assert_close(table.per_block("projected", 1), truth.double(), rtol=1e-3, atol=1e-4)
    for T in (2, 4, 16):
        bound, error = table.mean("projected", T), table.standard_error("projected", T)
        assert abs(bound - float(truth.mean())) < 4.5 * error
    gains = [table.relative_gain("projected", "factorised", T).value for T in (1, 2, 4)]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0.02
    for T in (1, 2, 4):
        gap = table.gap_closed("projected", "factorised", T)
        assert gap.low < gap.value < gap.high
        assert gap.value > 0.8
    found = table.equivalent_steps("projected", "factorised", 1)
    assert found.steps > 6


def test_a_projection_worsens_nothing_at_one_token_at_a_time(known_prior):
    """Many steps: single tokens are revealed, whose marginals the projection keeps; the plain product does not."""
    denoiser, coupling, blocks, _ = known_prior
    models = {"f": (denoiser, None), "projected": (denoiser, coupling), "product": (denoiser, denoiser.prior)}
    table = nelbo_table(models, blocks, (64,), draws=8, batch_size=300)
    mean, error = table.difference("projected", "f", 64)
    assert abs(mean) < 0.03 * table.mean("f", 64) + 3 * error
    mean, error = table.difference("product", "f", 64)
    assert mean > 0.05 * table.mean("f", 64) + 3 * error


def test_standard_errors_shrink_with_blocks_and_differences_are_far_less_noisy(known_prior):
    denoiser, coupling, blocks, _ = known_prior
    models = {"factorised": (denoiser, None), "projected": (denoiser, coupling)}
    few, many = (nelbo_table(models, blocks[:n], (4, 16)) for n in (50, 300))
    for T in (4, 16):
        ratio = few.standard_error("projected", T) / many.standard_error("projected", T)
        assert 1.7 < ratio < 3.5  # about sqrt(6)
        assert many.difference("projected", "factorised", T)[1] < 0.5 * many.standard_error("projected", T)


def test_more_revealed_sets_cost_no_network_call_and_less_noise(known_prior):
    denoiser, coupling, blocks, _ = known_prior
    calls = []
    denoiser.register_forward_hook(lambda *_: calls.append(1))
    models = {"factorised": (denoiser, None), "projected": (denoiser, coupling)}
    one, many_sets = (nelbo_table(models, blocks, (4,), reveals=n, batch_size=150) for n in (1, 16))
    assert len(calls) == 4  # two batches each
    assert torch.equal(one.per_block("factorised", 4), many_sets.per_block("factorised", 4))
    (few, error), (many, less) = (t.difference("projected", "factorised", 4) for t in (one, many_sets))
    assert less < 0.8 * error
    assert abs(few - many) < 4 * error


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()], ids=repr)
def test_the_number_of_masked_sites_explains_much_of_the_noise(known_prior, schedule):
    """A network that is equally unsure of every token: with the control variate no noise is left at all."""

    class Uniform(BidirectionalTransformer):
        def forward(self, xt):
            return DenoiserOutput(torch.zeros(*xt.shape, 5), torch.zeros(*xt.shape, 1))

    _, _, blocks, _ = known_prior
    table = nelbo_table({"uniform": (Uniform(5, 16, 1, 2), None)}, blocks[:240], (4, 16, 80), schedule)
    for T in (4, 16, 80):
        if isinstance(schedule, LinearSchedule):
            torch.testing.assert_close(
                table.per_block("uniform", T), torch.full((240,), math.log2(5)).double(), rtol=1e-5, atol=1e-5
            )
        else:  # its steps reveal more or fewer tokens, and are stratified
            assert table.mean("uniform", T) == pytest.approx(math.log2(5), rel=5e-3)


def test_less_noise_than_the_naive_estimator_at_as_many_steps_as_sites(known_prior):
    """Over seeds: the bound, and the difference to the factorised model, against -T log p(x_S) of one random step."""
    denoiser, coupling, blocks, _ = known_prior
    blocks, T, schedule = blocks[:64], 16, LinearSchedule()
    models = {"factorised": (denoiser, None), "projected": (denoiser, coupling)}
    alone = CouplingLayer(topologies.independent(16, 5), 5)

    def naive(model, generator):
        step = torch.randint(1, T + 1, (len(blocks),), generator=generator)
        xt = mask_tokens(blocks, schedule.grid(T)[step], 5, generator)
        shown = reveal(xt == 5, schedule.reveal_rates(T)[step - 1], generator)
        dist = model(denoiser(xt).logits, tokens=xt, known=xt != 5)
        return float(-T * dist.log_prob(blocks, sites=shown).mean()) / (16 * math.log(2))

    ours, theirs = [], []
    with torch.no_grad():
        for seed in range(20):
            table = nelbo_table(models, blocks, (T,), seed=seed)
            c, f = (table.mean(m, T) for m in ("projected", "factorised"))
            ours.append((c, c - f))
            c, f = (
                naive(m, torch.Generator().manual_seed(2 * seed + i)) for i, m in enumerate((coupling, alone))
            )
            theirs.append((c, c - f))
    ratio = torch.tensor(theirs).var(0) / torch.tensor(ours).var(0)
    assert ratio[0] > 3, ratio
    assert ratio[1] > 50, ratio


# ---------------------------------------------------------------------- wall clock


@pytest.fixture
def timed():
    torch.manual_seed(0)
    denoiser = network(5)
    return {
        "factorised": (denoiser, None),
        "coupled": (denoiser, lively(topologies.hidden_markov(8, 5, 3), 5)),
    }


def test_seconds_per_sample_of_every_model_and_step(timed):
    before = torch.get_rng_state()
    seconds = time_sampling(timed, (4, 1, 4), 8, batch_size=3, repeats=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(seconds) == ["factorised", "coupled"]
    assert all(list(rows) == [1, 4] for rows in seconds.values())
    assert all(0 < s < 10 for rows in seconds.values() for s in rows.values())
    blocks = torch.randint(5, (20, 8))
    table = nelbo_table(timed, blocks, (1, 4, 8)).with_seconds(seconds)
    assert table.seconds("coupled", 4) == seconds["coupled"][4]


def test_times_are_medians_of_interleaved_repetitions(timed, monkeypatch):
    """A clock that shows 2 s for the coupled sampler and 1 s for the other, and stalls once."""
    from codd_ppl.evaluation import timing

    calls = []

    def generate(sampler, sites, batch_size, seed):
        calls.append((sampler.coupling.plan.factors != (), sampler.steps, seed))
        stalled = (
            100.0 if len(calls) in (1, 7) else 0.0
        )  # the first call isn't counted, the median forgives one
        return batch_size * (sampler.steps * (2.0 if calls[-1][0] else 1.0) + stalled)

    monkeypatch.setattr(timing, "_generate", generate)
    seconds = time_sampling(timed, (1, 3), 8, batch_size=4, repeats=3, seed=7)
    assert seconds == {"factorised": {1: 1.0, 3: 3.0}, "coupled": {1: 2.0, 3: 6.0}}
    one_round = [(False, 1), (False, 3), (True, 1), (True, 3)]
    assert [call[:2] for call in calls] == [(False, 1), (True, 1), *3 * one_round]
    assert [call[2] for call in calls] == [7, 7, *(7 + i // 4 for i in range(12))]
    calls.clear()
    assert time_sampling(timed, (1, 3), 8, repeats=3, budget=0.0).keys() == timed.keys()
    assert [call[:2] for call in calls] == [(False, 1), (True, 1), *one_round]


def test_a_slower_network_takes_longer():
    class Slow(BidirectionalTransformer):
        def forward(self, xt):
            torch.randn(300, 300) @ torch.randn(300, 300)
            for _ in range(20):
                super().forward(xt)
            return super().forward(xt)

    torch.manual_seed(0)
    models = {
        name: (kind(5, hidden_size=16, layers=1, heads=2), None)
        for name, kind in (("fast", BidirectionalTransformer), ("slow", Slow))
    }
    seconds = time_sampling(models, (1, 4), 8, batch_size=2, repeats=3)
    assert seconds["slow"][1] > 2 * seconds["fast"][1]
    assert seconds["slow"][4] > 1.5 * seconds["slow"][1]


def test_errors_name_the_remedy(timed, capsys):
    for wrong in ({"batch_size": 0}, {"repeats": 0}, {"steps": ()}, {"models": {}}):
        with pytest.raises(ConfigError, match="at least one of each"):
            time_sampling(**{"models": timed, "steps": (1,), "sites": 8, **wrong})
    with pytest.raises(ConfigError, match="steps"):
        time_sampling(timed, (0,), 8)
    with pytest.raises(ShapeError, match="blocks of 8"):
        time_sampling(timed, (1,), 9, repeats=1)
    time_sampling(timed, (1,), 8, repeats=1, progress=True)
    assert capsys.readouterr().out == ""
