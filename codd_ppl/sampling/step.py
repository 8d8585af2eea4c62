"""What a sampler tells its caller after every reverse step: for streaming, scoring and debugging."""

from collections.abc import Callable
from dataclasses import dataclass

from codd_ppl.sampling.protocol import JointDistribution
from codd_ppl.typing import Bool, Int, Tensor

__all__ = ["OnStep", "Step"]


@dataclass(frozen=True)
class Step:
    """One reverse step, after its draw. Tensors are the sampler's own: read them, don't write.

    Attributes:
        index: of this step in the order of generation, 0 .. steps - 1.
        steps: number of reverse steps T.
        tokens: (batch, sites) int64 after the step; sites still to be written hold the mask token.
        revealed: (batch, sites) bool, the sites S that this step wrote.
        history: (batch, sites) int64, as in :class:`codd_ppl.sampling.Generation`; ``steps`` where not written yet.
        dist: the law that the revealed sites were drawn from, p(x_S | xt) of xt *before* the step:
            ``dist.log_prob(tokens, sites=revealed)`` is what the step adds to the log-probability of the path. None
            where the step revealed nothing.
        rows: which of the caller's texts the rows are; None: all of them, in order.
        start: place of the first site in the caller's text.
    """

    index: int
    steps: int
    tokens: Int[Tensor, "batch sites"]
    revealed: Bool[Tensor, "batch sites"]
    history: Int[Tensor, "batch sites"]
    dist: JointDistribution | None = None
    rows: tuple[int, ...] | None = None
    start: int = 0


OnStep = Callable[[Step], None]
"""Called after every reverse step; an exception that it raises ends the generation."""
