"""An n-gram model of the training text: an independent judge of samples."""

import math
from dataclasses import dataclass

import torch

from codd_ppl.errors import ConfigError, DataError, ShapeError, TokenError
from codd_ppl.typing import Float, Int, Tensor

__all__ = ["NGramModel"]


@dataclass(frozen=True)
class NGramModel:
    """Interpolated Witten-Bell n-gram model over token ids (Witten and Bell 1991).

    With h the last n - 1 tokens, h' the same without its first one, c a count in the training blocks and T(h)
    the number of different tokens seen after h,

        P(w | h) = (c(h w) + T(h) P(w | h')) / (c(h) + T(h)),     P(w | nothing at all) = 1 / vocab,

    and P(w | h) = P(w | h') after a context that never occurred. The first tokens of a block have shorter
    contexts. Counts live in a trie of sorted codes (node of the context * vocab + token), one tensor per depth.

    Build it with ``NGramModel.fit``.
    """

    vocab_size: int
    codes: tuple[Int[Tensor, " nodes"], ...]
    counts: tuple[Int[Tensor, " nodes"], ...]
    context_counts: tuple[Int[Tensor, " contexts"], ...]
    context_types: tuple[Int[Tensor, " contexts"], ...]

    @property
    def order(self) -> int:
        """Length n of the longest n-gram."""
        return len(self.codes)

    @classmethod
    def fit(cls, blocks: Int[Tensor, "n sites"], vocab_size: int, order: int = 6) -> "NGramModel":
        """Count all n-grams up to ``order`` inside the blocks; they don't run over block borders.

        Raises:
            ConfigError: order < 1.
            DataError: no tokens.
            ShapeError, TokenError: not int64 (n, sites), or ids outside the vocabulary.
        """
        if order < 1:
            raise ConfigError(f"order: expected at least 1, found {order}; pass e.g. order=6")
        _check(blocks, vocab_size, "blocks")
        if blocks.numel() == 0:
            raise DataError(
                f"blocks: expected at least one token, found shape {tuple(blocks.shape)}; pass training text"
            )
        blocks = blocks.cpu()
        # trie node of the context that starts at each position; at depth 0 the root
        node = torch.zeros_like(blocks)
        nodes = 1
        codes, counts, context_counts, context_types = [], [], [], []
        for depth in range(1, order + 1):
            starts = blocks.shape[1] - depth + 1
            if starts < 1:
                break
            code = node[:, :starts] * vocab_size + blocks[:, depth - 1 :]
            unique, node, count = code.unique(return_inverse=True, return_counts=True)
            parent = unique // vocab_size
            codes.append(unique)
            counts.append(count)
            context_counts.append(torch.zeros(nodes, dtype=torch.int64).index_add(0, parent, count))
            context_types.append(parent.bincount(minlength=nodes))
            nodes = len(unique)
        return cls(vocab_size, tuple(codes), tuple(counts), tuple(context_counts), tuple(context_types))

    def token_log_prob(self, tokens: Int[Tensor, "batch sites"]) -> Float[Tensor, "batch sites"]:
        """log P(x_i | the up to n - 1 tokens before it), nats, float64."""
        _check(tokens, self.vocab_size, "tokens")
        tokens = tokens.cpu()
        batch, sites = tokens.shape
        prob = torch.full((batch, sites), 1.0 / self.vocab_size, dtype=torch.float64)
        node = torch.zeros_like(tokens)  # -1: this context was never seen
        for depth in range(1, min(self.order, sites) + 1):
            starts = sites - depth + 1
            context, codes = node[:, :starts], self.codes[depth - 1]
            code = context * self.vocab_size + tokens[:, depth - 1 :]
            place = torch.searchsorted(codes, code).clamp_max(len(codes) - 1)
            found = (codes[place] == code) & (context >= 0)
            count = self.counts[depth - 1][place] * found
            total = self.context_counts[depth - 1][context.clamp_min(0)] * (context >= 0)
            types = self.context_types[depth - 1][context.clamp_min(0)] * (context >= 0)
            shorter = prob[:, depth - 1 :]
            mixed = torch.where(total > 0, (count + types * shorter) / (total + types).clamp_min(1), shorter)
            prob = torch.cat([prob[:, : depth - 1], mixed], dim=1)
            node = torch.where(found, place, -1)
        return prob.log()

    def bits_per_token(self, samples: Int[Tensor, "batch sites"]) -> Float[Tensor, " batch"]:
        """Mean -log2 P(x_i | context) of each sequence; take ``.mean()`` over many samples.

        Never read it alone: repetitive text is cheap. Put ``token_entropy``, ``distinct_n`` and ``repetition``
        beside it, and the same number of held-out text.
        """
        return -self.token_log_prob(samples).mean(-1) / math.log(2.0)


def _check(tokens: Tensor, vocab_size: int, name: str) -> None:
    if tokens.dtype != torch.int64 or tokens.dim() != 2:
        raise ShapeError(
            f"{name}: expected int64 (batch, sites), found {tokens.dtype} {tuple(tokens.shape)}; "
            "stack the sequences and convert with .long()"
        )
    if bool(((tokens < 0) | (tokens >= vocab_size)).any()):
        raise TokenError(
            f"{name}: expected ids in 0..{vocab_size - 1}, found {int(tokens.min())}..{int(tokens.max())}; "
            "encode the text with the tokenizer of the model, and write all masked sites first"
        )
