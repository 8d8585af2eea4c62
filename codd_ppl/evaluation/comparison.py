"""Where one curve over the number of steps meets another: equal bounds, and equal times."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from codd_ppl.evaluation.bootstrap import paired_bootstrap
from codd_ppl.typing import Float, Tensor

__all__ = ["EquivalentSteps", "equivalent_steps", "in_the_same_time"]


@dataclass(frozen=True)
class EquivalentSteps:
    """Number of factorised steps with the same bound; ``relation`` says whether that is known or only bounded.

    ``=``: interpolated. ``>=``: better than the factorised model at its largest number of steps in the table,
    which is ``steps``. ``<=``: no better than at its smallest. ``low`` and ``high`` are bootstrap percentiles,
    clamped to the steps in the table.
    """

    steps: float
    relation: str
    low: float
    high: float

    def __str__(self) -> str:
        sign = "" if self.relation == "=" else f"{self.relation} "
        return f"{sign}{self.steps:.3g} [{self.low:.3g}, {self.high:.3g}]"


def equivalent_steps(
    target: Float[Tensor, " blocks"],
    curve: Float[Tensor, "grid blocks"],
    grid: list[int],
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> EquivalentSteps:
    """The first N at which the mean of ``curve`` falls to the mean of ``target``, with a paired bootstrap.

    Linear interpolation in log2 N between the ascending steps of ``grid``, whose values are the rows of ``curve``.
    """
    logs = torch.tensor(grid, dtype=torch.float64).log2()

    def crossing(means: Tensor) -> Tensor:
        goal, values = means[0], means[1:]
        reached = values <= goal
        first = reached.long().argmax(0)
        right = first.clamp(min(1, len(grid) - 1))
        left = (right - 1).clamp_min(0)
        high, low = values.gather(0, left[None])[0], values.gather(0, right[None])[0]
        share = ((high - goal) / (high - low).clamp_min(torch.finfo(high.dtype).tiny)).clamp(0, 1)
        inside = logs[left] + share * (logs[right] - logs[left])
        return torch.where(reached[0], logs[0], torch.where(reached.any(0), inside, logs[-1]))

    interval = paired_bootstrap(torch.cat([target[None], curve]), crossing, resamples, level, seed)
    goal, values = float(target.mean()), curve.mean(-1).tolist()
    relation = "<=" if goal > values[0] else "=" if min(values) <= goal else ">="
    return EquivalentSteps(2**interval.value, relation, 2**interval.low, 2**interval.high)


def in_the_same_time(
    seconds: Mapping[int, float], bounds: Mapping[int, float], budget: float
) -> tuple[float, float]:
    """How many steps fit into ``budget`` seconds, and the bound at that number; (nan, nan) if nothing was measured.

    Seconds are interpolated linearly in the number of steps, the bound in its logarithm; both are clamped to the
    steps that have both.
    """
    grid = sorted(seconds.keys() & bounds.keys())
    if not grid or math.isnan(budget):
        return math.nan, math.nan
    for left, right in pairwise(grid):
        if seconds[left] <= budget < seconds[right]:
            steps = left + (right - left) * (budget - seconds[left]) / (seconds[right] - seconds[left])
            share = math.log(steps / left) / math.log(right / left)
            return steps, (1 - share) * bounds[left] + share * bounds[right]
    end = grid[0] if budget < seconds[grid[0]] else grid[-1]
    return float(end), bounds[end]
