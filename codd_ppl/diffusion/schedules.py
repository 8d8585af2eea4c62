"""Noise schedules: the chance alpha_t that a token is still unmasked at time t.

Time runs from t = 0 (clean) to t = 1 (all masked), so alpha falls from 1 to 0. A schedule is one
formula; the grid of T steps and the rates of the reverse process follow from it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from codd_ppl.errors import ConfigError
from codd_ppl.typing import Float, Tensor

__all__ = ["CosineSchedule", "LinearSchedule", "Schedule", "check_steps"]


def check_steps(steps: int) -> int:
    """Return ``steps`` if it is a whole number of at least 1, else raise `ConfigError`."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"expected steps to be a whole number >= 1, found {steps!r}; pass steps=1 or more")
    return steps


class Schedule(ABC):
    """A decreasing function alpha on [0, 1] with alpha(0) = 1 and alpha(1) = 0.

    A schedule of your own is a subclass with one method, `alpha`.
    """

    @abstractmethod
    def alpha(self, t: Float[Tensor, "*batch"] | float) -> Float[Tensor, "*batch"]:
        """Chance that a token is still unmasked at time ``t``, the same shape as ``t``."""

    def grid(self, steps: int, dtype: torch.dtype | None = None) -> Float[Tensor, "steps_plus_1"]:
        """Alphas at t_0 = 0 < t_1 < ... < t_T = 1, equal steps in t; entry k is alpha_k.

        Entry 0 is exactly 1 and entry T exactly 0. Computed in float64, returned in ``dtype``
        (PyTorch's default if None).

        Raises:
            ConfigError: ``steps`` < 1, or a schedule that doesn't fall from 1 to 0.
        """
        t = torch.arange(check_steps(steps) + 1, dtype=torch.float64) / steps
        alphas = self.alpha(t)
        ends = (float(alphas[0]), float(alphas[-1]))
        if abs(ends[0] - 1) > 1e-6 or abs(ends[1]) > 1e-6:
            raise ConfigError(
                f"expected {self!r} to have alpha(0) = 1 and alpha(1) = 0, found {ends[0]:.6g} and "
                f"{ends[1]:.6g}; rescale its alpha, so that t = 1 means all masked"
            )
        alphas = torch.cat([alphas.new_ones(1), alphas[1:-1], alphas.new_zeros(1)])
        if not bool((alphas[1:] <= alphas[:-1]).all()) or not bool((alphas[1:] < 1).all()):
            raise ConfigError(
                f"expected {self!r} to decrease on its grid of {steps} steps, found alphas "
                f"{alphas.tolist()}; make alpha fall from t = 0 on"
            )
        return alphas.to(dtype or torch.get_default_dtype())

    def reveal_rates(self, steps: int, dtype: torch.dtype | None = None) -> Float[Tensor, "steps"]:
        """Chance that step k reveals a masked site: r_k = (alpha_{k-1} - alpha_k) / (1 - alpha_k).

        Entry k - 1 belongs to step k = 1..T. Step T comes first in the reverse process; step 1 comes
        last and has rate exactly 1. Linear schedule: r_k = 1/k.

        Raises:
            ConfigError: see `grid`.
        """
        alphas = self.grid(steps, dtype=torch.float64)
        rates = (alphas[:-1] - alphas[1:]) / (1 - alphas[1:])
        return rates.to(dtype or torch.get_default_dtype())


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """alpha_t = 1 - t: every step reveals the same expected number of tokens (MDLM, arXiv:2406.07524)."""

    def alpha(self, t: Float[Tensor, "*batch"] | float) -> Float[Tensor, "*batch"]:
        """1 - t."""
        return 1 - torch.as_tensor(t)


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """alpha_t = 1 - cos(pi/2 (1 - t)): few tokens in the first steps (MaskGIT, arXiv:2202.04200)."""

    def alpha(self, t: Float[Tensor, "*batch"] | float) -> Float[Tensor, "*batch"]:
        """1 - cos(pi/2 (1 - t))."""
        return 1 - torch.cos(math.pi / 2 * (1 - torch.as_tensor(t)))
