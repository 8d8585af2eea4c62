"""Laws of two tokens on which the published latent-variable denoisers are compared, as exact tables.

A point of the plane, cut into cells, is two tokens: column and row. Tokens drawn independently fall between the modes.
All tables are float64 probabilities, (vocab, vocab), and sum to 1: nothing is sampled to make them.
"""

import math
from dataclasses import dataclass

import torch

from codd_ppl.errors import ConfigError
from codd_ppl.typing import Bool, Float, Int, Tensor

__all__ = [
    "QUOTED",
    "Toy",
    "draw_pairs",
    "eight_modes",
    "successor_pairs",
    "support",
    "swiss_roll",
    "toys",
]

QUOTED = {
    "8 modes": {
        "MDLM": {1: 37.7, 2: 68.1, 4: 84.2, 8: 90.9},
        "VADD": {1: 91.8, 2: 95.3, 4: 97.3, 8: 97.7},
        "E-MoE": {1: 94.4, 2: 96.6, 4: 97.7, 8: 98.3},
    },
    "swiss roll": {
        "MDLM": {1: 49.3, 2: 73.1, 4: 86.5, 8: 91.9},
        "VADD": {1: 93.8, 2: 95.9, 4: 97.1, 8: 97.6},
    },
}
"""Validity in per cent by NFE as the E-MoE paper (Ivanov et al. 2026) prints it, L = 2, V = 50."""


def eight_modes(bins: int = 50, deviation: float = 0.05, reach: float = 1.25) -> Float[Tensor, "bins bins"]:
    """Eight equal Gaussians evenly around the unit circle, on the square [-reach, reach]^2 of bins x bins cells."""
    angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    return _on_grid(angles.cos(), angles.sin(), deviation, bins, reach)


def swiss_roll(bins: int = 50, deviation: float = 0.5, reach: float = 16.0) -> Float[Tensor, "bins bins"]:
    """The spiral (u cos u, u sin u), u uniform from 1.5 pi to 4.5 pi, plus Gaussian noise; 4,096 points of u.

    The curve is that of scikit-learn's ``make_swiss_roll`` without its third coordinate.
    """
    u = 1.5 * math.pi + 3 * math.pi * (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    return _on_grid(u * u.cos(), u * u.sin(), deviation, bins, reach)


def successor_pairs(count: int = 10) -> Float[Tensor, "count count"]:
    """The pairs (k, k + 1 mod count), equally likely (VMD, arXiv:2510.23606)."""
    if count < 2:
        raise ConfigError(f"successor_pairs: expected at least 2 tokens, found {count}; VMD takes 10")
    return torch.eye(count, dtype=torch.float64).roll(1, dims=1) / count


def _on_grid(x: Tensor, y: Tensor, deviation: float, bins: int, reach: float) -> Float[Tensor, "bins bins"]:
    """Mixture of round Gaussians at (x, y), integrated over each cell exactly, cut off at the square."""
    if bins < 2 or deviation <= 0 or reach <= 0:
        raise ConfigError(
            f"expected bins >= 2, deviation > 0 and reach > 0, found bins={bins}, deviation={deviation}, reach={reach}"
        )
    edges = torch.linspace(-reach, reach, bins + 1, dtype=torch.float64)
    mass = [torch.special.ndtr((edges - c[:, None]) / deviation).diff(dim=-1) for c in (x, y)]
    joint = mass[0].T @ mass[1]
    return joint / joint.sum()


def support(joint: Float[Tensor, "vocab vocab"], mass: float = 0.99) -> Bool[Tensor, "vocab vocab"]:
    """The cells that count as valid: the fewest that hold ``mass`` of the law, the likeliest first.

    The data's own validity is their mass, so just above ``mass``; cells of probability zero are never valid.

    Raises:
        ConfigError: ``mass`` outside (0, 1].
    """
    if not 0 < mass <= 1:
        raise ConfigError(f"support: expected 0 < mass <= 1, found {mass}; pass e.g. 0.99")
    values, order = joint.flatten().sort(descending=True, stable=True)
    before = values.cumsum(0) - values
    chosen = (before < mass * joint.sum() - 1e-12) & (values > 0)
    return torch.zeros(joint.numel(), dtype=torch.bool).index_fill(0, order[chosen], True).view_as(joint)


def draw_pairs(joint: Float[Tensor, "vocab vocab"], n: int, seed: int = 0) -> Int[Tensor, "n 2"]:
    """Independent samples of the law, int64."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.multinomial(joint.flatten(), n, replacement=True, generator=generator)
    return torch.stack((cells // joint.shape[1], cells % joint.shape[1]), -1)


@dataclass(frozen=True)
class Toy:
    """A law of two tokens and how its couplings are started.

    Attributes:
        joint: its table. law: what it is, in words. states: of the mixture.
        pseudo_count, smoothing: of the two starts; 0 where what never occurs is to be impossible.
        train_steps: of the network, if not the settings'.
    """

    joint: Float[Tensor, "vocab vocab"]
    law: str
    states: int = 64
    pseudo_count: float | None = None
    smoothing: float = 1e-3
    train_steps: int | None = None


def toys() -> dict[str, Toy]:
    """The laws by name."""
    return {
        "8 modes": Toy(
            eight_modes(),
            "8 Gaussians of deviation 0.05 evenly on the unit circle, 50 x 50 cells of [-1.25, 1.25]^2.",
        ),
        "swiss roll": Toy(
            swiss_roll(),
            "(u cos u, u sin u) with u uniform from 1.5 pi to 4.5 pi, plus Gaussian noise of deviation 0.5 "
            "(scikit-learn's swiss roll without its third coordinate), 50 x 50 cells of [-16, 16]^2.",
        ),
        "successor pairs": Toy(
            successor_pairs(),
            "VMD's ten pairs (k, k + 1 mod 10), equally likely. The starts are without smoothing, so that for the "
            "table all other pairs are impossible.",
            states=32,
            pseudo_count=0.0,
            smoothing=0.0,
            train_steps=300,
        ),
    }
