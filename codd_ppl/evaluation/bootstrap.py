"""Bootstrap intervals of a statistic of several means over the same blocks of text."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from codd_ppl.errors import ConfigError
from codd_ppl.typing import Float, Tensor

__all__ = ["Interval", "paired_bootstrap"]

MAX_DRAWN = 2_000_000
"""Numbers held at a time; more resamples are drawn in several portions."""


@dataclass(frozen=True)
class Interval:
    """An estimate with a bootstrap percentile interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_bootstrap(
    values: Float[Tensor, "rows blocks"],
    statistic: Callable[[Tensor], Tensor],
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of ``statistic`` under resampling of blocks (Efron 1979).

    All rows are averaged over the same resampled blocks, so that what the blocks have in common cancels.
    The interval is (-inf, inf) where the statistic is undefined (nan) for the data or for any resample.

    Args:
        values: (rows, blocks), what was measured on each block.
        statistic: means (rows, resamples) -> (resamples,).
        resamples: how many sets of blocks to draw.
        level: share of the resamples inside the interval.
        seed: of the resampling.

    Raises:
        ConfigError: resamples < 1, or level outside (0, 1).
    """
    if resamples < 1 or not 0.0 < level < 1.0:
        raise ConfigError(
            f"expected resamples >= 1 and 0 < level < 1, found {resamples} and {level}; "
            "pass e.g. resamples=2000, level=0.95"
        )
    rows, blocks = values.shape
    generator = torch.Generator().manual_seed(seed)
    portion = max(1, MAX_DRAWN // (blocks * rows))
    means = []
    for done in range(0, resamples, portion):
        drawn = torch.randint(blocks, (min(portion, resamples - done), blocks), generator=generator)
        means.append(values[:, drawn].mean(-1))
    value = float(statistic(values.mean(-1, keepdim=True)))
    spread = statistic(torch.cat(means, dim=1))
    if math.isnan(value) or bool(spread.isnan().any()):
        return Interval(value, -math.inf, math.inf)
    tail = (1.0 - level) / 2.0
    ends = torch.tensor([tail, 1.0 - tail], dtype=spread.dtype)
    # nearest: interpolating between infinite values would give nan
    low, high = torch.quantile(spread, ends, interpolation="nearest").tolist()
    return Interval(value, low, high)
