"""A network of a given shape with weights that mean nothing, for its time, memory and operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from codd_ppl.denoisers.protocol import DenoiserOutput
from codd_ppl.errors import ConfigError
from codd_ppl.evaluation.backbone_shape import BackboneShape
from codd_ppl.typing import Float, Int, Tensor

__all__ = ["ShapeNetwork"]

BASE = 500_000.0
"""Of the rotary positions."""

PERIOD = 1_000_003
"""Weights repeat after so many, a prime, so that no two rows of a matrix are equal."""

SCALE = 0.02
"""Standard deviation of the weights."""


class ShapeNetwork(nn.Module):
    """Logits of a block of sites after a prompt, by a transformer of some shape; a denoiser like any other.

    Every token sees every other. The head reads the block alone: networks that compute the logits of the prompt as
    well, as LLaDA's own code does, take longer, and what comes on top of them is a smaller share. The mask's own logit
    is -inf, as :class:`codd_ppl.denoisers.pretrained.PretrainedDenoiser` gives it.

    The weights are laid out on the device at once and filled by copies of one row of normal numbers: no time is spent
    on them and no value is NaN. What the network says is noise, nearly the same for every token.

    Args:
        shape: the sizes.
        layers: number of blocks, perhaps fewer than the shape's.
        prompt: tokens before the block.
        device, dtype: of the weights; on the device "meta" there are none.

    Raises:
        ConfigError: layers < 1 or prompt < 0.
    """

    def __init__(
        self,
        shape: BackboneShape,
        layers: int,
        prompt: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        if layers < 1 or prompt < 0:
            raise ConfigError(f"expected layers >= 1 and prompt >= 0, found {layers} and {prompt}")
        self.shape, self.prompt, self.layers = shape, prompt, layers
        self.vocab_size, self.mask_token_id = shape.vocab_size, shape.mask_token_id
        self.hidden_size = shape.hidden_size
        row = SCALE * torch.randn(PERIOD, generator=torch.Generator().manual_seed(0))
        row = row.to(device, dtype)

        def weight(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(_filled(row, rows, columns), requires_grad=False)

        self.embedding = weight(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(_Block(shape, weight, row) for _ in range(layers))
        self.norm = _norm(shape, row)
        self.head = weight(shape.vocab_size, shape.hidden_size)
        self.requires_grad_(False)

    def forward(self, xt: Int[Tensor, "batch sites"], layers: int | None = None) -> DenoiserOutput:
        """Logits and hidden states of the block's sites; the prompt is the same token throughout.

        Args:
            xt: the block.
            layers: run only the first so many; None: all.
        """
        tokens = F.pad(xt, (self.prompt, 0))
        x = F.embedding(tokens, self.embedding)
        turn = _turns(tokens.shape[1], self.shape.head_width, x)
        for block in self.blocks[:layers]:
            x = block(x, turn)
        hidden = self.norm(x[:, self.prompt :])
        logits = F.linear(hidden, self.head)
        logits[..., self.mask_token_id] = -torch.inf
        return DenoiserOutput(logits, hidden)


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, shape: BackboneShape, weight: Callable[[int, int], nn.Parameter], like: Tensor
    ) -> None:
        super().__init__()
        self.shape = shape
        width, own = shape.hidden_size, shape.head_width
        self.before_attention, self.before_mlp = _norm(shape, like), _norm(shape, like)
        self.query, self.out = weight(width, width), weight(width, width)
        self.key, self.value = weight(shape.kv_heads * own, width), weight(shape.kv_heads * own, width)
        self.up, self.down = weight(shape.inner_size, width), weight(width, shape.inner_size)
        self.gate = weight(shape.inner_size, width) if shape.gated else None

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + F.linear(self._attended(self.before_attention(x), turn), self.out)
        y = self.before_mlp(x)
        up = F.linear(y, self.up)
        inner = F.gelu(up) if self.gate is None else F.silu(F.linear(y, self.gate)).mul_(up)
        return x + F.linear(inner, self.down)

    def _attended(self, y: Tensor, turn: tuple[Tensor, Tensor]) -> Float[Tensor, "batch sites hidden"]:
        own, groups = self.shape.head_width, self.shape.heads // self.shape.kv_heads
        query, key, value = (
            F.linear(y, table).unflatten(-1, (-1, own)).transpose(1, 2)
            for table in (self.query, self.key, self.value)
        )
        query, key = _turned(query, turn), _turned(key, turn)
        if groups > 1:  # as the networks' own code does it
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _norm(shape: BackboneShape, like: Tensor) -> nn.RMSNorm:
    return nn.RMSNorm(shape.hidden_size, eps=1e-6, device=like.device, dtype=like.dtype)


def _filled(row: Tensor, rows: int, columns: int) -> Tensor:
    """A table of this size, the row of numbers over and over."""
    table = torch.empty(rows, columns, device=row.device, dtype=row.dtype)
    flat = table.view(-1)
    for start in range(0, 0 if row.is_meta else flat.numel(), len(row)):
        part = flat[start : start + len(row)]
        part.copy_(row[: len(part)])
    return table


def _turns(count: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles (Su et al. 2021, arXiv:2104.09864), (count, width / 2)."""
    place = torch.arange(count, device=like.device, dtype=torch.float32)[:, None]
    pair = torch.arange(width // 2, device=like.device, dtype=torch.float32) * (2 / width)
    angle = place * BASE**-pair
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Each pair of channels, i and i + width / 2, turned by its place's angle."""
    (cos, sin), (a, b) = turn, x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
