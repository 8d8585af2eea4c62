"""A small bidirectional transformer, for training from scratch on one CPU or GPU.

Each block adds three branches to the residual stream, each after an RMSNorm (Zhang and Sennrich 2019,
arXiv:1910.07467): a depthwise convolution over the neighbouring sites, attention over all sites with
rotary positions (Su et al. 2021, arXiv:2104.09864), and a gated MLP (Shazeer 2020, arXiv:2002.05202).
The convolution is what makes a character model learn at once: attention has to find the neighbouring
sites before it can use them, and the convolution has them from the first step.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from codd_ppl.denoisers.protocol import DenoiserOutput
from codd_ppl.errors import ConfigError, ShapeError, TokenError
from codd_ppl.typing import Float, Int, Tensor

__all__ = ["BidirectionalTransformer", "TransformerConfig"]

_ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a :class:`BidirectionalTransformer`: all that is needed to build it again.

    Raises:
        ConfigError: a size below 1, an even ``kernel_size``, ``hidden_size`` that doesn't split into
            ``heads`` heads of even width, or a ``dropout`` outside [0, 1).
    """

    vocab_size: int
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kernel_size: int = 9
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "layers", "heads", "kernel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} >= 1, found {getattr(self, name)}; give a positive size")
        if self.hidden_size % (2 * self.heads):
            raise ConfigError(
                f"expected hidden_size to be a multiple of 2 * heads = {2 * self.heads} (rotary positions turn "
                f"pairs of channels), found {self.hidden_size}; change hidden_size or heads"
            )
        if self.kernel_size % 2 == 0:
            raise ConfigError(
                f"expected an odd kernel_size (as many sites to the left as to the right), found "
                f"{self.kernel_size}; take {self.kernel_size + 1}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"expected dropout in [0, 1), found {self.dropout}; 0 turns it off")


def _rotary(sites: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, (sites, width / 2), in the dtype and on the device of ``like``."""
    pairs = torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width
    angles = torch.arange(sites, device=like.device, dtype=torch.float32)[:, None] * _ROTARY_BASE**-pairs
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair of channels of ``x``, (..., sites, width), by the angle of its site."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class _Neighbours(nn.Module):
    """Depthwise convolution over the sites: one kernel per channel, zero beyond both ends."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size = config.kernel_size
        # two-dimensional with height 1: on CPU several times faster than the same Conv1d
        self.convolution = nn.Conv2d(
            config.hidden_size,
            config.hidden_size,
            (1, size),
            padding=(0, size // 2),
            groups=config.hidden_size,
            bias=False,
        )
        nn.init.normal_(self.convolution.weight, std=size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)


class _Attention(nn.Module):
    """Every site attends to every site."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        nn.init.normal_(self.to_qkv.weight, std=config.hidden_size**-0.5)
        nn.init.normal_(self.out.weight, std=(2 * config.layers * config.hidden_size) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, heads, sites, width) each
        rotary = _rotary(x.shape[1], query.shape[-1], query)
        mixed = F.scaled_dot_product_attention(_rotate(query, rotary), _rotate(key, rotary), value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class _GatedMLP(nn.Module):
    """silu(gate) * up, about 8/3 times as wide as the residual stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        inner = max(16, round(config.hidden_size * 8 / 3 / 16) * 16)
        self.gate_up = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.out = nn.Linear(inner, config.hidden_size, bias=False)
        nn.init.normal_(self.gate_up.weight, std=config.hidden_size**-0.5)
        nn.init.normal_(self.out.weight, std=(2 * config.layers * inner) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class _Residual(nn.Module):
    """x + dropout(branch(norm(x)))."""

    def __init__(self, branch: nn.Module, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.branch = branch
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.branch(self.norm(x)))


class BidirectionalTransformer(nn.Module):
    """Logits and hidden states of every site, from the known tokens on both sides; any sequence length.

    ``mask_token_id`` is ``vocab_size``: the embedding has one row more than the logits have columns.
    There is no time input: for absorbing diffusion the best denoiser doesn't depend on t (Ou et al.
    2024, arXiv:2406.03736). ``config`` holds the arguments, so that a checkpoint can rebuild the network.

    Raises:
        ConfigError: see :class:`TransformerConfig`.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 128,
        layers: int = 4,
        heads: int = 4,
        kernel_size: int = 9,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        config = TransformerConfig(vocab_size, hidden_size, layers, heads, kernel_size, dropout)
        self.config = config
        self.vocab_size = vocab_size
        self.mask_token_id = vocab_size
        self.hidden_size = hidden_size
        self.embedding = nn.Embedding(vocab_size + 1, hidden_size)
        self.body = nn.Sequential(
            *(
                _Residual(branch(config), config)
                for _ in range(layers)
                for branch in (_Neighbours, _Attention, _GatedMLP)
            )
        )
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.head = nn.Linear(hidden_size, vocab_size)
        # small logits at the start, but not zero: a zero head hides the body from the first gradients
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_config(cls, config: TransformerConfig) -> "BidirectionalTransformer":
        """A network of these sizes, with fresh weights."""
        return cls(**vars(config))

    @property
    def unembedding(self) -> Float[Tensor, "vocab hidden"]:
        """The head's vector of each token; shares the head's memory, without gradient."""
        return self.head.weight.detach()

    def forward(self, xt: Int[Tensor, "*batch sites"]) -> DenoiserOutput:
        """Reads partly masked tokens, (*batch, sites).

        Returns logits (*batch, sites, vocab) and hidden (*batch, sites, hidden); ``hidden`` is the
        normed last state, which the head reads.

        Raises:
            ShapeError: ``xt`` isn't an integer tensor with at least one site.
            TokenError: an id outside 0 .. vocab_size (vocab_size itself is the mask).
        """
        self._check(xt)
        x = self.embedding(xt.reshape(-1, xt.shape[-1]).long())
        hidden = self.norm(self.body(x)).reshape(*xt.shape, self.hidden_size)
        return DenoiserOutput(self.head(hidden), hidden)

    def _check(self, xt: Tensor) -> None:
        if xt.is_floating_point() or xt.is_complex() or xt.dtype == torch.bool:
            raise ShapeError(f"expected xt of an integer dtype, found {xt.dtype}; pass token ids (int64)")
        if xt.ndim == 0 or xt.shape[-1] == 0:
            raise ShapeError(f"expected xt of shape (*batch, sites) with sites >= 1, found {tuple(xt.shape)}")
        if torch.compiler.is_compiling() or xt.numel() == 0:
            return
        low, high = (int(bound) for bound in xt.aminmax())
        if low < 0 or high > self.vocab_size:
            raise TokenError(
                f"expected token ids from 0 to {self.vocab_size} in xt (vocab_size = {self.vocab_size} tokens and "
                f"the mask, id {self.mask_token_id}), found {low if low < 0 else high}; use the tokenizer this "
                f"denoiser was made for"
            )
