"""Metrics of samples by hand, and the n-gram judge against a literal recursion."""

import math
from collections import Counter

import pytest
import torch

from codd_ppl.errors import ConfigError, DataError, ShapeError, TokenError
from codd_ppl.evaluation import NGramModel, distinct_n, repetition, token_entropy, word_perplexity

SAMPLES = torch.tensor([[0, 1, 0, 1, 0, 1], [3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 4, 5], [7, 7, 7, 9, 9, 9]])


def test_token_entropy_in_bits():
    expected = torch.tensor([1.0, 0.0, math.log2(6), 1.0], dtype=torch.float64)
    torch.testing.assert_close(token_entropy(SAMPLES), expected)
    torch.testing.assert_close(token_entropy(SAMPLES.flip(1)), expected)
    assert token_entropy(SAMPLES[:0]).shape == (0,)


def test_distinct_n():
    assert distinct_n(SAMPLES, 1) == 8 / 24  # tokens 0..5, 7 and 9
    assert distinct_n(SAMPLES[:1], 2) == 2 / 5
    assert distinct_n(SAMPLES[1:2], 3) == 1 / 4
    assert distinct_n(SAMPLES[[2, 2]], 6) == 1 / 2
    assert math.isnan(distinct_n(SAMPLES[:0], 2))


def test_repetition():
    expected = torch.tensor([1 - 2 / 3, 1 - 1 / 3, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(repetition(SAMPLES, 4), expected)
    torch.testing.assert_close(repetition(SAMPLES, 1)[:2], torch.tensor([4 / 6, 5 / 6], dtype=torch.float64))
    assert repetition(SAMPLES[:0]).shape == (0,)


def test_metric_errors():
    for metric in (distinct_n, repetition):
        with pytest.raises(ShapeError, match="at least 7 sites"):
            metric(SAMPLES, 7)
        with pytest.raises(ConfigError, match="n: expected at least 1"):
            metric(SAMPLES, 0)
    for wrong in (SAMPLES.float(), SAMPLES[0], SAMPLES > 2, SAMPLES[:, :0]):
        with pytest.raises(ShapeError):
            token_entropy(wrong)


def literal_witten_bell(blocks, vocab, order, context, token):
    """The formula of the docstring, one n-gram at a time."""
    rows = [tuple(row) for row in blocks.tolist()]

    def prob(history, w):
        followers = Counter(
            row[i + len(history)]
            for row in rows
            for i in range(len(row) - len(history))
            if row[i : i + len(history)] == history
        )
        shorter = prob(history[1:], w) if history else 1 / vocab
        if not followers:
            return shorter
        return (followers[w] + len(followers) * shorter) / (followers.total() + len(followers))

    return prob(tuple(context)[-(order - 1) :] if order > 1 else (), token)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_n_gram_model_is_the_formula(order):
    generator = torch.Generator().manual_seed(0)
    blocks = (torch.rand(6, 9, generator=generator) ** 2 * 3).long()  # 3 of the 4 tokens occur
    tokens = torch.randint(4, (5, 7), generator=generator)
    model = NGramModel.fit(blocks, vocab_size=4, order=order)
    assert model.order == order
    expected = [
        [math.log(literal_witten_bell(blocks, 4, order, row[:i], row[i])) for i in range(7)]
        for row in tokens.tolist()
    ]
    torch.testing.assert_close(model.token_log_prob(tokens), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(
        model.bits_per_token(tokens), -torch.tensor(expected, dtype=torch.float64).mean(-1) / math.log(2)
    )


def test_n_gram_model_is_normalised_after_every_context():
    blocks = torch.randint(5, (20, 8), generator=torch.Generator().manual_seed(1))
    model = NGramModel.fit(blocks, vocab_size=6, order=4)
    context = torch.randint(6, (30, 5), generator=torch.Generator().manual_seed(2))
    for length in range(6):
        rows = torch.cat(
            [context[:, :length].repeat_interleave(6, 0), torch.arange(6).repeat(30)[:, None]], 1
        )
        total = model.token_log_prob(rows)[:, -1].exp().reshape(30, 6).sum(-1)
        torch.testing.assert_close(total, torch.ones(30, dtype=torch.float64))


def test_the_judge_prefers_the_language_it_learned():
    generator = torch.Generator().manual_seed(3)
    # a cycle 0 1 2 3 0 1 ... entered anywhere, with 10 % noise
    start = torch.randint(4, (200, 1), generator=generator)
    clean = (start + torch.arange(20)) % 4
    noisy = torch.where(torch.rand(200, 20, generator=generator) < 0.1, torch.randint(4, (200, 20)), clean)
    model = NGramModel.fit(noisy[:150], vocab_size=4, order=3)
    shuffled = noisy[150:][:, torch.randperm(20, generator=generator)]
    assert model.bits_per_token(noisy[150:]).mean() < 1.2 < 1.9 < model.bits_per_token(shuffled).mean()


def test_order_longer_than_the_blocks_and_a_large_vocabulary():
    blocks = torch.tensor([[49_999, 3], [49_999, 4]])
    model = NGramModel.fit(blocks, vocab_size=50_000, order=6)
    assert model.order == 2
    assert model.bits_per_token(blocks).isfinite().all()
    assert model.bits_per_token(torch.tensor([[1, 2, 3, 4, 5, 6, 7]])).isfinite().all()


def test_n_gram_errors():
    blocks = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ConfigError, match="order"):
        NGramModel.fit(blocks, 4, order=0)
    with pytest.raises(DataError, match="at least one token"):
        NGramModel.fit(blocks[:0], 4)
    with pytest.raises(ShapeError, match=r"\(batch, sites\)"):
        NGramModel.fit(blocks[0], 4)
    model = NGramModel.fit(blocks, 4)
    for wrong in (-1, 4):
        with pytest.raises(TokenError, match=r"0\.\.3"):
            model.bits_per_token(blocks + wrong)


def test_word_perplexity():
    """A uniform choice among 8 tokens, two of which make a word, is one among 64 words."""
    assert word_perplexity(3.0, 2.0) == pytest.approx(64.0)
    with pytest.raises(ConfigError, match="tokens per word"):
        word_perplexity(3.0, 0.0)
