"""Whether tokens, and sets of sites, fit a distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.errors import ShapeError, TokenError

__all__ = ["check_tokens", "chosen_tokens"]


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Whether all ids are in the vocabulary.

    Raises:
        TokenError: one isn't.
    """
    if not tokens.numel():
        return
    low, high = (int(v) for v in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise TokenError(
            f"expected token ids from 0 to {vocab_size - 1}, found {low if low < 0 else high}; masks are "
            "not values: leave them out with known= or sites="
        )


def chosen_tokens(
    value: Tensor, sites: Tensor | None, shape: torch.Size, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Tokens and chosen sites, broadcast with the batch; 0 where not chosen.

    Args:
        value: (*sample, *batch, sites) ids.
        sites: bool, the chosen ones; None: all.
        shape: (*batch, sites) of the distribution.
        vocab_size: of its tokens.

    Raises:
        ShapeError: dtypes or shapes that don't fit.
        TokenError: ids outside the vocabulary at chosen sites.
    """
    if value.is_floating_point() or value.dtype == torch.bool:
        raise ShapeError(f"expected token ids (int64), found {value.dtype}")
    if sites is not None and sites.dtype != torch.bool:
        raise ShapeError(f"expected sites as a bool mask (*batch, {shape[-1]}), found {sites.dtype}")
    chosen = torch.ones(1, dtype=torch.bool, device=value.device) if sites is None else sites
    try:
        whole = torch.broadcast_shapes(value.shape, chosen.shape, shape)
    except RuntimeError:
        whole = torch.Size()
    if not whole or whole[-1] != shape[-1] or value.shape[-1:] != whole[-1:]:
        raise ShapeError(
            f"expected tokens of shape (*sample, {', '.join(map(str, shape))}), "
            f"found {tuple(value.shape)}" + ("" if sites is None else f" and sites {tuple(sites.shape)}")
        )
    value, chosen = value.expand(whole), chosen.expand(whole)
    value = torch.where(chosen, value, 0)
    check_tokens(value, vocab_size)
    return value, chosen
