"""Shapes and notation (DESIGN section 2), written once.

Annotations such as ``Float[Tensor, "*batch sites vocab"]`` are jaxtyping shapes; they are checked
in the tests only, so they cost nothing at run time.

=============  ============================================================
``batch``      any number of leading dimensions, none included
``sites``      token positions, in reading order
``vocab``      token values
``states``     values of a latent variable
``hidden``     width of the denoiser's hidden states
=============  ============================================================
"""

from collections.abc import Mapping

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Tensor", "LogPotentials", "Assignment"]

LogPotentials = Mapping[str | tuple[str, ...], Tensor]
"""Factor, tie or variable name (or a tuple of variable names, stacked) -> log-potentials."""

Assignment = Mapping[str, Tensor]
"""Variable name -> (*batch) int64 values."""
