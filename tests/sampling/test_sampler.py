"""The sampler against enumeration: its law, its counts, its seeds and its errors."""

import itertools
import math

import pytest
import torch
from torch import nn

from codd_ppl import CouplingLayer, topologies
from codd_ppl.denoisers import DenoiserOutput
from codd_ppl.diffusion.schedules import CosineSchedule, LinearSchedule
from codd_ppl.errors import ConfigError, ShapeError, TokenError
from codd_ppl.sampling import LowConfidence, Sampler
from codd_ppl.testing import chi_square_p_value, enumerate_sequences

POLICIES = ["random", "random_order", "low_confidence", "margin", "entropy"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def counts(tokens, vocab):
    place = vocab ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return (tokens * place).sum(-1).bincount(minlength=vocab ** tokens.shape[1])


def law(toy, coupling, steps, revealed_sets, template):
    """Exact distribution over sequences of the reverse process, state by state.

    ``revealed_sets(xt, step)`` lists (set of sites, chance).
    """
    toy.denoiser.eval()
    states = enumerate_sequences(toy.denoiser.vocab_size, toy.joint.ndim).tolist()
    chances = {tuple(template): 1.0}
    for step in range(steps):
        after: dict[tuple[int, ...], float] = {}
        for xt, chance in chances.items():
            now = torch.tensor([xt])
            known = now != toy.mask
            with torch.no_grad():
                row = coupling(toy.denoiser(now).logits, tokens=now, known=known).probabilities[0].tolist()
            for sites, share in revealed_sets(xt, step):
                for x, p in zip(states, row, strict=True):
                    following = tuple(x[i] if i in sites else xt[i] for i in range(len(xt)))
                    after[following] = after.get(following, 0.0) + chance * share * p
        chances = after
    return torch.tensor([chances.get(tuple(x), 0.0) for x in states])


def random_sets(toy, steps, schedule):
    rates = schedule.reveal_rates(steps, dtype=torch.float64).tolist()

    def sets(xt, step):
        rate = rates[steps - 1 - step]
        masked = [i for i, token in enumerate(xt) if token == toy.mask]
        for size in range(len(masked) + 1):
            for chosen in itertools.combinations(masked, size):
                yield set(chosen), rate**size * (1 - rate) ** (len(masked) - size)

    return sets


def test_one_step_is_an_exact_draw_of_the_joint(toy):
    toy = toy()
    generation = Sampler(toy.denoiser, toy.perfect, steps=1).generate(toy.template(20_000), seeded(0))
    assert generation.nfe == 1
    assert (generation.history == 0).all()
    assert chi_square_p_value(counts(generation.tokens, 3), toy.joint.flatten()) > 1e-3


def test_one_factorised_step_is_the_product_of_the_marginals(toy):
    toy = toy()
    a, b, c = (toy.joint.sum([j for j in range(3) if j != i]) for i in range(3))
    product = a[:, None, None] * b[None, :, None] * c
    tokens = Sampler(toy.denoiser, toy.factorised, steps=1).generate(toy.template(20_000), seeded(1)).tokens
    assert chi_square_p_value(counts(tokens, 3), product.flatten()) > 1e-3
    # and not the joint: the factorization barrier is there
    assert chi_square_p_value(counts(tokens, 3), toy.joint.flatten()) < 1e-6


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()])
@pytest.mark.parametrize("steps", [2, 3])
def test_random_steps_have_the_law_of_the_reverse_process(toy, steps, schedule):
    toy = toy(vocab=2)
    sampler = Sampler(toy.denoiser, toy.factorised, "random", steps, schedule)
    tokens = sampler.generate(toy.template(20_000), seeded(2)).tokens
    expected = law(toy, toy.factorised, steps, random_sets(toy, steps, schedule), 3 * [toy.mask])
    assert expected.sum().item() == pytest.approx(1.0)
    assert chi_square_p_value(counts(tokens, 2), expected) > 1e-3


def test_a_perfect_joint_keeps_its_law_under_every_policy_that_ignores_the_values(toy):
    toy = toy(vocab=2)

    class LeftToRight:
        def reveal(self, state):
            return state.masked & (torch.arange(3) == state.step)

    for policy in ("random", "random_order", LeftToRight()):
        sampler = Sampler(toy.denoiser, toy.perfect, policy, steps=3)
        tokens = sampler.generate(toy.template(20_000), seeded(3)).tokens
        assert chi_square_p_value(counts(tokens, 2), toy.joint.flatten()) > 1e-3


def test_confident_steps_have_their_enumerated_law(toy):
    toy = toy(vocab=2)

    def most_confident(xt, step):
        masked = [i for i, token in enumerate(xt) if token == toy.mask]
        number = {0: 1, 1: 2}[step]  # 3 sites in 2 steps: ceil(3/2) = 2 stay masked
        now = torch.tensor([xt])
        top = toy.perfect(None, tokens=now, known=now != toy.mask).marginals[0].amax(-1)
        yield set(sorted(masked, key=lambda i: -top[i])[:number]), 1.0

    sampler = Sampler(toy.denoiser, toy.factorised, LowConfidence(), steps=2)
    tokens = sampler.generate(toy.template(20_000), seeded(4)).tokens
    expected = law(toy, toy.factorised, 2, most_confident, 3 * [toy.mask])
    assert chi_square_p_value(counts(tokens, 2), expected) > 1e-3


def test_infilling_draws_from_the_conditional(toy):
    toy = toy()
    template = toy.template(20_000)
    template[:, 1] = 2
    tokens = Sampler(toy.denoiser, toy.perfect, steps=2).generate(template, seeded(5)).tokens
    conditional = toy.joint[:, 2] / toy.joint[:, 2].sum()
    assert (tokens[:, 1] == 2).all()
    assert chi_square_p_value(counts(tokens[:, [0, 2]], 3), conditional.flatten()) > 1e-3


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_rows_with_different_numbers_of_masked_sites(toy, policy, steps):
    toy = toy(sites=4, vocab=2)
    m = toy.mask
    template = torch.tensor([[m, m, m, m], [0, m, 1, m], [1, 1, 0, 0], [m, 0, 1, 1]])
    before = template.clone()
    generation = Sampler(toy.denoiser, toy.perfect, policy, steps).generate(template, seeded(6))
    masked = template == m
    assert torch.equal(template, before)
    assert generation.tokens.dtype == generation.history.dtype == torch.int64
    assert torch.equal(generation.tokens[~masked], template[~masked])
    assert ((generation.tokens >= 0) & (generation.tokens < 2)).all()
    assert (generation.history[~masked] == -1).all()
    assert ((generation.history[masked] >= 0) & (generation.history[masked] < steps)).all()
    assert generation.nfe == len(toy.denoiser.seen) == toy.perfect.calls
    assert generation.nfe == len(generation.history[masked].unique())


@pytest.mark.parametrize("policy", POLICIES[1:])
@pytest.mark.parametrize(
    ("schedule", "sites"), [(LinearSchedule(), 8), (CosineSchedule(), 8), (LinearSchedule(), 5)]
)
def test_policies_that_count_follow_the_schedule_exactly(toy, policy, schedule, sites):
    toy = toy(sites=sites, vocab=2)
    for steps in (1, 2, 4, 5):
        sampler = Sampler(toy.denoiser, toy.perfect, policy, steps, schedule)
        history = sampler.generate(toy.template(3), seeded(7)).history
        alphas = schedule.grid(steps, dtype=torch.float64).tolist()
        for step in range(steps):
            left = math.ceil(sites * (1 - alphas[steps - 1 - step]) - 1e-9)
            assert ((history > step).sum(-1) == left).all()


@pytest.mark.parametrize("sites", [7, 49])
def test_a_random_order_of_as_many_steps_as_sites_writes_one_token_at_a_time(sites):
    class Uniform:
        vocab_size, mask_token_id, hidden_size = 2, 2, 1

        def __call__(self, xt):
            return DenoiserOutput(torch.zeros(*xt.shape, 2), torch.zeros(*xt.shape, 1))

    sampler = Sampler(Uniform(), CouplingLayer(topologies.independent(sites, 2), 2), "random_order", sites)
    history = sampler.generate(torch.full((5, sites), 2), seeded(7)).history
    assert torch.equal(history.sort(-1).values, torch.arange(sites).expand(5, -1))
    assert len(history.unique(dim=0)) == 5


def test_what_is_known_at_a_step_is_what_history_says(toy):
    toy = toy(sites=4, vocab=2)
    generation = Sampler(toy.denoiser, toy.perfect, "entropy", steps=4).generate(toy.template(5), seeded(8))
    for step, xt in enumerate(toy.denoiser.seen):
        shown = generation.history < step
        assert torch.equal(xt, torch.where(shown, generation.tokens, toy.mask))


@pytest.mark.parametrize("policy", POLICIES)
def test_seeds(toy, policy):
    toy = toy()
    sampler = Sampler(toy.denoiser, toy.perfect, policy, steps=2)
    first, again, other = (sampler.generate(toy.template(50), seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.history, again.history)
    assert not torch.equal(first.tokens, other.tokens)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        globally = sampler.generate(toy.template(50)).tokens
        torch.manual_seed(3)
        assert torch.equal(sampler.generate(toy.template(50)).tokens, globally)


def test_a_generator_leaves_the_global_stream_alone(toy):
    toy = toy()
    before = torch.get_rng_state()
    Sampler(toy.denoiser, toy.perfect, steps=3).generate(toy.template(5), seeded(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_to_write_costs_nothing(toy, policy):
    toy = toy()
    sampler = Sampler(toy.denoiser, toy.perfect, policy)
    for template in (torch.tensor([[0, 1, 2], [2, 2, 2]]), toy.template(0)):
        generation = sampler.generate(template, seeded(0))
        assert generation.nfe == 0
        assert torch.equal(generation.tokens, template)
        assert (generation.history == -1).all()
        assert generation.history.shape == template.shape
    assert toy.denoiser.seen == []


@pytest.mark.parametrize("policy", POLICIES)
def test_length_one_and_a_template_without_batch(toy, policy):
    toy = toy(sites=1)
    generation = Sampler(toy.denoiser, toy.perfect, policy, steps=4).generate(toy.template(1)[0], seeded(0))
    assert generation.tokens.shape == generation.history.shape == (1,)
    assert generation.nfe == 1
    assert 0 <= generation.tokens[0] < 3


def test_modes_of_all_submodules_are_restored_also_after_an_error(toy):
    toy = toy()
    toy.denoiser.train()
    toy.denoiser.perfect.eval()
    toy.perfect.eval()

    class Interrupt:
        def reveal(self, state):
            raise KeyboardInterrupt

    Sampler(toy.denoiser, toy.perfect).generate(toy.template(2), seeded(0))
    with pytest.raises(KeyboardInterrupt):
        Sampler(toy.denoiser, toy.perfect, Interrupt()).generate(toy.template(2), progress=True)
    assert toy.denoiser.training
    assert not toy.denoiser.perfect.training
    assert not toy.perfect.training


def test_progress_goes_to_standard_error_and_changes_nothing(toy, capsys):
    toy = toy()
    sampler = Sampler(toy.denoiser, toy.perfect)
    quiet = sampler.generate(toy.template(4), seeded(0))
    assert capsys.readouterr().err == ""
    loud = sampler.generate(toy.template(4), seeded(0), progress=True)
    assert torch.equal(quiet.tokens, loud.tokens)
    captured = capsys.readouterr()
    assert captured.out == ""


def test_errors_name_the_remedy(toy):
    toy, longer = toy(), toy(sites=2)
    sampler = Sampler(toy.denoiser, toy.perfect)
    with pytest.raises(ShapeError, match="blocks of 3"):
        sampler.generate(longer.template(2))
    with pytest.raises(ShapeError, match=r"\.long\(\)"):
        sampler.generate(toy.template(2).float())
    with pytest.raises(ShapeError, match=r"\(batch, sites\)"):
        sampler.generate(toy.template(2)[None])
    for wrong in (-1, 4):
        with pytest.raises(TokenError, match=rf"found {wrong} at \[0, 1\]"):
            sampler.generate(torch.tensor([[0, wrong, 3]]))
    for steps in (0, -2, 1.5, True):
        with pytest.raises(ConfigError, match="steps"):
            Sampler(toy.denoiser, toy.perfect, steps=steps)
    with pytest.raises(ConfigError, match="low_confidence"):
        Sampler(toy.denoiser, toy.perfect, "greedy")


def test_vocabularies_must_agree(toy):
    with pytest.raises(ConfigError, match="vocab_size=3"):
        Sampler(toy(vocab=3).denoiser, toy(vocab=2).perfect)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda state: torch.ones_like(state.masked), ConfigError),
        (lambda state: state.masked.long(), ShapeError),
        (lambda state: state.masked[:1], ShapeError),
    ],
)
def test_policies_are_held_to_their_contract(toy, answer, error):
    toy = toy()

    class Own:
        def reveal(self, state):
            return answer(state)

    template = toy.template(2)
    template[0, 0] = 1
    with pytest.raises(error, match=r"Own\.reveal"):
        Sampler(toy.denoiser, toy.perfect, Own(), steps=2).generate(template)


def test_a_lazy_policy_still_finishes_in_the_last_step(toy):
    toy = toy()

    class Never:
        def reveal(self, state):
            return torch.zeros_like(state.masked)

    generation = Sampler(toy.denoiser, toy.perfect, Never(), steps=5).generate(toy.template(2), seeded(0))
    assert generation.nfe == 1
    assert (generation.history == 4).all()


def test_a_network_that_writes_its_own_mask_token_is_found_out(toy):
    toy = toy()
    toy.denoiser.eval()

    class MaskInside(nn.Module):
        vocab_size, mask_token_id, hidden_size = 3, 2, 1

        def forward(self, xt):
            return toy.denoiser(torch.where(xt == 2, toy.mask, xt))

    with pytest.raises(TokenError, match="-inf"):
        Sampler(MaskInside(), toy.perfect, steps=1).generate(torch.full((50, 3), 2), seeded(0))
