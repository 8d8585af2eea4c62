"""Metrics of samples that need no model: entropy, distinct n-grams, repetition.

A low generative perplexity with a low entropy is repetitive text, not good text: always print these beside it.
"""

import math

import torch

from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.typing import Float, Int, Tensor

__all__ = ["distinct_n", "repetition", "token_entropy", "word_perplexity"]


def token_entropy(samples: Int[Tensor, "batch sites"]) -> Float[Tensor, " batch"]:
    """Unigram entropy of each sequence in bits: H_b = -sum_v f_b(v) log2 f_b(v), f_b(v) = share of v in row b.

    The "sample entropy" of the masked-diffusion papers (there in nats) is the mean of this over the samples.

    Raises:
        ShapeError: not an integer tensor (batch, sites) with at least one site.
    """
    _check(samples, 1)
    ordered = samples.sort(dim=-1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    kind = first.cumsum(-1) - 1
    counts = torch.zeros_like(ordered).scatter_add(-1, kind, torch.ones_like(ordered)).double()
    return torch.special.entr(counts / samples.shape[-1]).sum(-1) / math.log(2.0)


def distinct_n(samples: Int[Tensor, "batch sites"], n: int = 2) -> float:
    """Different n-grams over all samples, divided by the number of n-grams (Li et al. 2016, arXiv:1510.03055).

    It falls with the number of samples: compare sets of the same size only. nan for an empty batch.

    Raises:
        ConfigError: n < 1.
        ShapeError: not an integer tensor (batch, sites) with at least n sites.
    """
    grams = _n_grams(samples, n).flatten(0, 1)
    return len(grams.unique(dim=0)) / len(grams) if len(grams) else math.nan


def repetition(samples: Int[Tensor, "batch sites"], n: int = 4) -> Float[Tensor, " batch"]:
    """Share of the n-grams of a sequence that occurred in it before: 1 - different / all.

    The rep-n of Welleck et al. 2019, arXiv:1908.04319. 0: no n-gram occurs twice.

    Raises:
        ConfigError: n < 1.
        ShapeError: not an integer tensor (batch, sites) with at least n sites.
    """
    grams = _n_grams(samples, n)
    different = [len(row.unique(dim=0)) for row in grams]
    return 1.0 - torch.tensor(different, dtype=torch.float64) / grams.shape[1]


def _n_grams(samples: Tensor, n: int) -> Int[Tensor, "batch starts n"]:
    if n < 1:
        raise ConfigError(f"n: expected at least 1, found {n}; pass the length of the n-grams")
    _check(samples, n)
    return samples.cpu().unfold(1, n, 1)


def _check(samples: Tensor, least: int) -> None:
    integer = not (samples.is_floating_point() or samples.is_complex() or samples.dtype == torch.bool)
    if not integer or samples.dim() != 2 or samples.shape[1] < least:
        raise ShapeError(
            f"samples: expected integer token ids (batch, sites) with at least {least} sites, found {samples.dtype} "
            f"{tuple(samples.shape)}; stack the sequences, or choose a smaller n"
        )


def word_perplexity(bits_per_token: float, tokens_per_word: float) -> float:
    """Perplexity per word, 2^(bits per token * tokens per word): comparable between tokenizers on one text.

    Raises:
        ConfigError: not a positive number of tokens per word.
    """
    if not tokens_per_word > 0:
        raise ConfigError(
            f"expected tokens per word above 0, found {tokens_per_word}; count both on the same text"
        )
    return float(2.0 ** (bits_per_token * tokens_per_word))
