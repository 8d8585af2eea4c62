"""Bounds under shared noise: against enumeration, against a naive estimator, and against themselves."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from codd_ppl.denoisers import DenoiserOutput
from codd_ppl.diffusion.closed_forms import (
    best_factorised_log_prob,
    best_factorised_nelbo,
    entropy,
    perfect_log_prob,
)
from codd_ppl.diffusion.enumeration import nelbo_exact
from codd_ppl.diffusion.masking import mask_tokens, reveal
from codd_ppl.diffusion.schedules import CosineSchedule, LinearSchedule
from codd_ppl.errors import ConfigError, ShapeError, TokenError
from codd_ppl.evaluation import nelbo_table
from codd_ppl.testing import enumerate_sequences

SITES, VOCAB, MASK = 3, 2, 2
BITS = SITES * math.log(2)


def random_joint(seed=0):
    generator = torch.Generator().manual_seed(seed)
    joint = torch.rand((VOCAB,) * SITES, generator=generator, dtype=torch.float64) ** 3
    return joint / joint.sum()


JOINT = random_joint()
STATES = enumerate_sequences(VOCAB, SITES)


class BestFactorised(nn.Module):
    """Exact conditional marginals of the joint as logits; notes how often it is called."""

    vocab_size, mask_token_id, hidden_size = VOCAB, MASK, 1

    def __init__(self, joint=JOINT):
        super().__init__()
        self.log_prob_fn = perfect_log_prob(joint, MASK)
        self.calls = 0

    def forward(self, xt):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        logits = torch.zeros(*xt.shape, VOCAB, dtype=torch.float64)
        for i in range(SITES):
            site = (torch.arange(SITES) == i).expand_as(xt)
            for v in range(VOCAB):
                # a known site is asked for as if it were masked: what is said there is never used
                x0 = torch.where(site, v, xt.clamp_max(VOCAB - 1))
                logits[:, i, v] = self.log_prob_fn(x0, torch.where(site, MASK, xt), site)
        return DenoiserOutput(logits=logits, hidden=logits[..., :1])


class JointCoupling(nn.Module):
    """The conditional of a joint table, whatever the logits."""

    sites, vocab_size = SITES, VOCAB

    def __init__(self, joint=JOINT):
        super().__init__()
        self.log_prob_fn = perfect_log_prob(joint, MASK)

    def forward(self, logits, hidden=None, tokens=None, known=None):
        xt = torch.where(known, tokens, MASK)
        return SimpleNamespace(log_prob=lambda x0, sites: self.log_prob_fn(x0, xt, sites))


class NoCoupling(nn.Module):
    """Independent tokens, through the interface of a coupling."""

    sites, vocab_size = SITES, VOCAB

    def forward(self, logits, hidden=None, tokens=None, known=None):
        log_probs = logits.log_softmax(-1)

        def log_prob(x0, sites):
            return torch.where(sites & ~known, log_probs.gather(-1, x0[..., None])[..., 0], 0).sum(-1)

        return SimpleNamespace(log_prob=log_prob)


@dataclass
class Models:
    network: BestFactorised
    models: dict


@pytest.fixture
def toy():
    network = BestFactorised()
    other = JointCoupling(random_joint(1))  # a coupling with the wrong dependence: bounds, not equalities
    models = {"factorised": (network, None), "perfect": (network, JointCoupling()), "wrong": (network, other)}
    return Models(network, models)


def exact(model, T, schedule):
    """Bits per token for each of the sequences in STATES."""
    functions = {
        "factorised": best_factorised_log_prob(JOINT, MASK),
        "perfect": perfect_log_prob(JOINT, MASK),
        "wrong": perfect_log_prob(random_joint(1), MASK),
    }
    return nelbo_exact(STATES, T, schedule, functions[model], MASK) / BITS


def test_one_step_has_no_noise(toy):
    one, two = (nelbo_table(toy.models, STATES, steps=(1,), seed=seed, draws=3) for seed in (0, 1))
    for model in toy.models:
        assert torch.equal(one.per_block(model, 1), two.per_block(model, 1))
        torch.testing.assert_close(one.per_block(model, 1), exact(model, 1, LinearSchedule()))


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()])
def test_unbiased_for_every_block_against_enumeration(toy, schedule):
    repeats = 3000
    blocks = STATES.repeat(repeats, 1)
    table = nelbo_table(toy.models, blocks, steps=(2, 3), schedule=schedule, batch_size=8192)
    for model in toy.models:
        for T in (2, 3):
            values = table.per_block(model, T).reshape(repeats, len(STATES))
            error = values.std(0) / math.sqrt(repeats)
            assert ((values.mean(0) - exact(model, T, schedule)).abs() < 4.5 * error + 1e-9).all()


def test_known_truths_of_the_joint(toy):
    """Weighted with the joint: the perfect model has H(x0) at every T, the best factorised H(x0) + gap."""
    weights = JOINT.flatten()
    table = nelbo_table(toy.models, STATES, steps=(1, 2, 3), draws=6000, batch_size=8192)
    for T in (1, 2, 3):
        gap = float(best_factorised_nelbo(JOINT, T) - entropy(JOINT)) / BITS
        perfect = float(weights @ table.per_block("perfect", T))
        factorised = float(weights @ table.per_block("factorised", T))
        assert perfect == pytest.approx(float(entropy(JOINT)) / BITS, abs=0.02)
        assert factorised - perfect == pytest.approx(gap, abs=0.01)


def test_gap_closed_against_enumeration(toy):
    generator = torch.Generator().manual_seed(0)
    blocks = STATES[torch.multinomial(JOINT.flatten(), 12_000, True, generator=generator)]
    table = nelbo_table(toy.models, blocks, batch_size=8192)
    assert table.steps == (1, 2, 3)  # by default: the powers of two, and the sites
    f = {T: float(best_factorised_nelbo(JOINT, T)) for T in (1, 2, 3)}
    h = float(entropy(JOINT))
    for T in (1, 2):
        found = table.gap_closed("perfect", "factorised", T, resamples=500, level=0.999)
        expected = (f[T] - h) / (f[T] - f[3])  # above 1: a factorised model at T = sites still has a gap
        assert found.low < expected < found.high
        assert T > 1 or found.high - found.low < 2
    assert str(table.equivalent_steps("perfect", "factorised", 1)).startswith(">= 3")


def naive_bits(joint, blocks, T, schedule, generator):
    """-log p of the revealed set itself, one independent uniform step per block."""
    step = torch.randint(1, T + 1, (len(blocks),), generator=generator)
    xt = mask_tokens(blocks, schedule.grid(T)[step], MASK, generator)
    revealed = reveal(xt == MASK, schedule.reveal_rates(T)[step - 1], generator)
    factorised = best_factorised_log_prob(joint, MASK)(blocks, xt, revealed)
    perfect = perfect_log_prob(joint, MASK)(blocks, xt, revealed)
    return -T * factorised / BITS, -T * perfect / BITS


def test_far_less_noise_than_the_naive_estimator(toy):
    """Variance of the mean over a set of blocks, over many seeds: the noise of masking alone."""
    schedule, T = LinearSchedule(), 8
    blocks = STATES.repeat(4, 1)
    ours, naive = [], []
    for seed in range(100):
        table = nelbo_table(toy.models, blocks, (T,), seed=seed)
        f, c = table.mean("factorised", T), table.mean("perfect", T)
        ours.append((f, c, c - f))
        one, two = (
            naive_bits(JOINT, blocks, T, schedule, torch.Generator().manual_seed(2 * seed + i))
            for i in range(2)
        )  # an unpaired comparison: each model with noise of its own
        f, c = float(one[0].mean()), float(two[1].mean())
        naive.append((f, c, c - f))
    ratio = torch.tensor(naive, dtype=torch.float64).var(0) / torch.tensor(ours, dtype=torch.float64).var(0)
    assert ratio[0] > 2, ratio  # the exact expectation over the revealed set, stratified steps
    assert ratio[1] > 1.5, ratio
    assert ratio[2] > 20, ratio  # the paired difference


def test_the_same_noise_for_all_models_and_one_network_call_for_all(toy):
    twin = dict(toy.models, again=(BestFactorised(), toy.models["wrong"][1]))
    toy.network.calls = 0
    table = nelbo_table(twin, STATES, steps=(1, 2), batch_size=4)
    assert toy.network.calls == 4  # 2 values of T, 2 batches; three models
    for T in (1, 2):
        assert torch.equal(table.per_block("wrong", T), table.per_block("again", T))


def test_independent_coupling_is_the_factorised_model(toy):
    table = nelbo_table({"none": (toy.network, None), "layer": (toy.network, NoCoupling())}, STATES, draws=5)
    for T in table.steps:
        torch.testing.assert_close(table.per_block("none", T), table.per_block("layer", T))


def test_noise_depends_on_the_seed_and_on_nothing_else(toy):
    reference = nelbo_table(toy.models, STATES, steps=(2, 3), seed=5, draws=3)
    batched = nelbo_table(toy.models, STATES, steps=(3,), seed=5, draws=3, batch_size=5)
    torch.testing.assert_close(reference.per_block("wrong", 3), batched.per_block("wrong", 3))
    other = nelbo_table(toy.models, STATES, steps=(3,), seed=6, draws=3)
    assert not torch.equal(reference.per_block("wrong", 3), other.per_block("wrong", 3))
    before = torch.get_rng_state()
    nelbo_table(toy.models, STATES)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_draws_spread_over_the_steps_of_each_block(toy):
    """With a multiple of T draws every block sees every step equally often."""
    table = nelbo_table({"f": (toy.network, None)}, STATES, steps=(2,), draws=64, batch_size=64)
    truth = exact("factorised", 2, LinearSchedule())
    single = nelbo_table({"f": (toy.network, None)}, STATES, steps=(2,), draws=1)
    many, one = ((t.per_block("f", 2) - truth).abs().mean() for t in (table, single))
    assert many < 0.25 * one


def test_a_mask_token_inside_the_vocabulary(toy):
    class Inside(BestFactorised):
        vocab_size, mask_token_id = 2, 0

        def forward(self, xt):
            assert (xt == 0).any()
            return DenoiserOutput(logits=torch.zeros(*xt.shape, 2), hidden=torch.zeros(*xt.shape, 1))

    table = nelbo_table({"uniform": (Inside(), None)}, STATES, steps=(1,))
    torch.testing.assert_close(table.per_block("uniform", 1), torch.ones(8, dtype=torch.float64))


def test_impossible_text_has_an_infinite_bound(toy):
    joint = JOINT.clone()
    joint[0, 0, 0] = 0
    coupling = JointCoupling(joint / joint.sum())
    table = nelbo_table({"f": (toy.network, None), "c": (toy.network, coupling)}, STATES, steps=(1, 3))
    assert table.mean("c", 1) == math.inf
    gain = table.relative_gain("c", "f", 1)
    assert gain.value == gain.low == -math.inf


def test_text_that_the_network_rules_out_has_an_infinite_bound():
    """Not NaN, for the blocks that hold it alone, and without touching the noise of the others."""

    class RulesOut(BestFactorised):
        def forward(self, xt):
            logits = super().forward(xt).logits
            logits[:, 0, 1] = -math.inf
            return DenoiserOutput(logits, logits[..., :1])

    network = RulesOut()
    table = nelbo_table({"f": (network, None), "c": (network, NoCoupling())}, STATES, steps=(1, 3), draws=4)
    for model in ("f", "c"):
        assert torch.equal(table.per_block(model, 1) == math.inf, STATES[:, 0] == 1)
        assert table.per_block(model, 3)[STATES[:, 0] == 0].isfinite().all()
        assert not table.per_block(model, 3).isnan().any()


def test_modes_and_progress(toy, capsys):
    toy.network.train()
    toy.models["wrong"][1].eval()
    nelbo_table(toy.models, STATES, progress=True)
    assert capsys.readouterr().out == ""
    assert toy.network.training
    assert not toy.models["wrong"][1].training


def test_errors_name_the_remedy(toy):
    with pytest.raises(ConfigError, match="at least one"):
        nelbo_table({}, STATES)
    with pytest.raises(ShapeError, match="blocks of 3"):
        nelbo_table(toy.models, STATES[:, :2])
    for wrong in (STATES.float(), STATES[0], STATES[:0]):
        with pytest.raises(ShapeError, match="at least one block"):
            nelbo_table(toy.models, wrong)
    for shift in (-1, 1):
        with pytest.raises(TokenError, match=r"0\.\.1"):
            nelbo_table(toy.models, STATES + shift)
    for bad in ({"draws": 0}, {"reveals": 0}, {"batch_size": 0}, {"steps": ()}, {"steps": (0,)}):
        with pytest.raises(ConfigError):
            nelbo_table(toy.models, STATES, **bad)
    toy.models["wrong"][1].vocab_size = 5
    with pytest.raises(ConfigError, match="'wrong'"):
        nelbo_table(toy.models, STATES)
    larger = BestFactorised()
    larger.vocab_size = 5
    with pytest.raises(ConfigError, match="each tokenizer"):
        nelbo_table({"a": (toy.network, None), "b": (larger, None)}, STATES)


class Recalls(nn.Module):
    """Says of every site what the first token of the text is; the coupling sees its windows only."""

    vocab_size, mask_token_id, hidden_size = 5, 5, 1

    def forward(self, xt):
        logits = 3.0 * nn.functional.one_hot(xt[:, :1].clamp(max=4), 5).float()
        return DenoiserOutput(logits.expand(*xt.shape, 5), torch.zeros(*xt.shape, 1))


def test_the_network_reads_what_is_before_each_block():
    blocks = torch.arange(12).reshape(6, 2) % 5
    before = torch.stack((blocks[:, 1], torch.zeros(6, dtype=torch.int64)), 1)
    models = {"factorised": (Recalls(), None)}
    found = nelbo_table(models, blocks, (1, 2), draws=3, batch_size=4, contexts=before)
    same = nn.functional.log_softmax(3.0 * nn.functional.one_hot(before[:, :1], 5).double(), -1)
    expected = -same.expand(6, 2, 5).gather(-1, blocks[..., None])[..., 0].mean(-1) / math.log(2)
    torch.testing.assert_close(found.values["factorised"][1], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ShapeError, match=r"contexts: expected int64 \(6, any\)"):
        nelbo_table(models, blocks, (1,), contexts=before[:5])
    with pytest.raises(ShapeError, match="contexts"):
        nelbo_table(models, blocks, (1,), contexts=before.float())
