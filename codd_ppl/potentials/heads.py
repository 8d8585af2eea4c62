"""The networks by which hidden states modulate log-potentials: one hidden layer, an output without effect at first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from codd_ppl.errors import ShapeError
from codd_ppl.typing import Float

__all__ = ["Head", "spread"]


class Head(nn.Sequential):
    """f(h, r) = W2 GELU(W1 h + b1 + r c) + b2, with W2 = b2 = c = 0 at first.

    So a new head says 0 whatever it reads, and one that is trained without the mask ratio r and then given a c says
    what it said before.

    Args:
        inputs, width, outputs: sizes of h, of the hidden layer, and of what comes out.
        mask_ratio: whether it reads the share of masked sites, r in [0, 1], too.
    """

    def __init__(self, inputs: int, width: int, outputs: int, mask_ratio: bool = False) -> None:
        last = nn.Linear(width, outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(nn.Linear(inputs, width), nn.GELU(), last)
        self.ratio = nn.Parameter(torch.zeros(width)) if mask_ratio else None

    def forward(
        self, inputs: Float[Tensor, "*batch places inputs"], ratio: Float[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch places outputs"]:
        """The outputs; ``ratio`` has a value for each batch element and is read only by a head that was made for it."""
        first, activation, last = self.children()
        inner = first(inputs)
        if self.ratio is not None and ratio is not None:
            inner = inner + ratio[..., None, None] * self.ratio
        return last(activation(inner))


def spread(ratio: Tensor | None, hidden: Tensor) -> Tensor:
    """The mask ratio in the hidden states' type, one for each batch element.

    Raises:
        ShapeError: there is none, or it doesn't fit the batch.
    """
    batch = hidden.shape[:-2]
    if ratio is None or ratio.shape != batch:
        found = None if ratio is None else tuple(ratio.shape)
        raise ShapeError(
            f"potentials with mask_ratio=True read the share of masked sites, expected ratio of shape {tuple(batch)}, "
            f"found {found}; pass ratio=masked.float().mean(-1), as CouplingLayer does"
        )
    return ratio.to(hidden)
