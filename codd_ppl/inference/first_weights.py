"""The weights that a projection starts from, when those of a nearby one are at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.errors import PotentialsError, ShapeError
from codd_ppl.inference.transforms import transforming
from codd_ppl.typing import Bool, Float

__all__ = ["first_weights"]


def first_weights(
    start: Float[Tensor, "*batch sites vocab"],
    log_targets: Float[Tensor, "*batch sites vocab"],
    masked: Bool[Tensor, "*batch sites"],
) -> Float[Tensor, "*batch sites vocab"]:
    """log w to start from: ``start`` at masked sites, 0 elsewhere, and what the targets rule out ruled out.

    An earlier projection may have ruled out what the targets now allow: such a token starts at log w = 0. Any positive
    start leads to the same fixed point; a zero where the target has none would be one that no sweep can see behind.

    Raises:
        ShapeError: another shape than the targets'.
        PotentialsError: NaN or +inf at a masked site.
    """
    if start.shape != log_targets.shape:
        raise ShapeError(
            f"start: expected log-weights of shape {tuple(log_targets.shape)}, as the targets, found "
            f"{tuple(start.shape)}; start only from a projection of the same batch, sites and vocabulary"
        )
    hidden = masked[..., None]
    out = log_targets == -torch.inf
    usable = hidden & ~out & (start != -torch.inf)
    first = torch.where(hidden & out, -torch.inf, torch.where(usable, start.to(log_targets.dtype), 0.0))
    if not transforming() and first.numel() and not bool(first.detach().amax() < torch.inf):
        raise PotentialsError(
            "start: expected log-weights that are finite or -inf at masked sites, found NaN or +inf; leave start out "
            "(None) to begin from w = 1"
        )
    return first
