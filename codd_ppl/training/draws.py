"""What a run draws for a batch, as functions of the seed and the place in the run alone: T, and the noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from codd_ppl.diffusion.schedules import check_steps
from codd_ppl.errors import ConfigError

__all__ = ["noise_generator", "pick_steps", "possible_steps"]


def possible_steps(steps: Any, sites: int) -> list[int]:
    """The numbers of reverse steps T that a setting allows.

    Args:
        steps: a number, several, or "any": the powers of two up to ``sites``.
        sites: length of a block.

    Raises:
        ConfigError: something else, or a number below 1.
    """
    if steps == "any":
        return [1 << k for k in range(max(1, sites.bit_length()))]
    if isinstance(steps, int):
        return [check_steps(steps)]
    if isinstance(steps, str) or not isinstance(steps, Sequence) or not steps:
        raise ConfigError(f'steps: expected a number, a list of numbers or "any", found {steps!r}')
    return [check_steps(T) for T in steps]


def pick_steps(choices: Sequence[int], seed: int, step: int) -> int:
    """T of the batch of a global step, uniform over the choices; the same in every process."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def noise_generator(seed: int, salt: int, rank: int) -> torch.Generator:
    """The source of a batch's noise: of this seed, process and ``salt``, whatever was drawn before."""
    return torch.Generator().manual_seed((seed * 1_000_003 + salt) * 65_537 + rank)
