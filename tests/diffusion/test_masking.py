import pytest
import torch
from scipy.stats import binomtest, kstest

from codd_ppl.diffusion.masking import mask_tokens, reveal, stratified_times
from codd_ppl.errors import ConfigError, ShapeError, TokenError

MASK = 9


def test_mask_tokens_keeps_all_or_none_at_the_ends(generator):
    x0 = torch.arange(8).repeat(500, 1)
    assert torch.equal(mask_tokens(x0, 1.0, MASK, generator), x0)
    assert bool((mask_tokens(x0, 0.0, MASK, generator) == MASK).all())


def test_mask_tokens_frequency_per_sequence(generator):
    x0 = torch.zeros(3, 20_000, dtype=torch.long)
    alpha = torch.tensor([0.1, 0.5, 0.85])
    kept = (mask_tokens(x0, alpha, MASK, generator) == 0).sum(-1)
    for count, p in zip(kept.tolist(), alpha.tolist(), strict=True):
        assert binomtest(count, 20_000, p).pvalue > 1e-4


def test_sites_are_masked_independently(generator):
    x0 = torch.zeros(20_000, 2, dtype=torch.long)
    masked = mask_tokens(x0, 0.3, MASK, generator) == MASK
    assert binomtest(int(masked.all(-1).sum()), 20_000, 0.49).pvalue > 1e-4


def test_inputs_are_not_edited(generator):
    x0, alpha = torch.arange(6).reshape(2, 3), torch.tensor([0.5, 0.5])
    masked, rate = torch.tensor([[True, False, True]] * 2), torch.tensor([1.0, 0.5])
    copies = [tensor.clone() for tensor in (x0, alpha, masked, rate)]
    xt, revealed = mask_tokens(x0, alpha, MASK, generator), reveal(masked, rate, generator)
    xt.fill_(7)
    revealed.fill_(True)
    assert all(torch.equal(*pair) for pair in zip((x0, alpha, masked, rate), copies, strict=True))


def test_reveal_stays_inside_the_masked_sites(generator):
    masked = torch.rand(200, 50, generator=generator) < 0.5
    assert torch.equal(reveal(masked, 1.0, generator), masked)
    assert not reveal(masked, 0.0, generator).any()
    some = reveal(masked, torch.full((200,), 0.25), generator)
    assert not (some & ~masked).any()
    assert binomtest(int(some.sum()), int(masked.sum()), 0.25).pvalue > 1e-4


def test_generators_make_it_repeatable():
    x0, masked = torch.zeros(4, 32, dtype=torch.long), torch.ones(4, 32, dtype=torch.bool)

    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        return mask_tokens(x0, 0.5, MASK, g), reveal(masked, 0.5, g), stratified_times(5, g)

    before = torch.random.get_rng_state()
    assert all(torch.equal(*pair) for pair in zip(draw(3), draw(3), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(draw(3), draw(4), strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_stratified_times_fill_every_stratum_once(n, generator):
    for _ in range(20):
        t = stratified_times(n, generator)
        assert t.shape == (n,) and bool(((t >= 0) & (t < 1)).all())
        assert torch.equal((t * n).floor().long().sort().values, torch.arange(n))


def test_each_stratified_time_alone_is_uniform(generator):
    draws = torch.stack([stratified_times(5, generator) for _ in range(4000)])
    for column in draws.T:
        assert kstest(column.numpy(), "uniform").pvalue > 1e-4


def test_no_times_for_no_sequences():
    assert stratified_times(0).shape == (0,)
    with pytest.raises(ConfigError, match="n >= 0"):
        stratified_times(-1)


def test_errors_name_what_was_wrong():
    x0 = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(TokenError, match="mask token"):
        mask_tokens(torch.tensor([[0, MASK]]), 0.5, MASK)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="alpha"):
            mask_tokens(x0, bad, MASK)
        with pytest.raises(ConfigError, match="rate"):
            reveal(x0 == 0, bad)
    for shape in ((3,), (2, 1), (1,)):
        with pytest.raises(ShapeError, match=r"\(2,\)"):
            mask_tokens(x0, torch.full(shape, 0.5), MASK)
