"""The optimiser of a run and its learning rates over the steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

__all__ = ["adamw", "warmup_and_cosine"]

BETAS = (0.9, 0.98)
FLOOR = 0.1
"""The cosine ends at this part of the rate."""


def adamw(
    denoiser: nn.Module,
    coupling: nn.Module,
    learning_rate: float,
    potentials_learning_rate: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over all that is not frozen.

    Args:
        denoiser, coupling: what to train; parameters without ``requires_grad`` are left out.
        learning_rate: of the network.
        potentials_learning_rate: of the coupling, which has no weight decay.
        weight_decay: of the network's matrices (not its biases and scales).
    """
    network = [p for p in denoiser.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in network if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in network if p.dim() <= 1]},
        {"params": [p for p in coupling.parameters() if p.requires_grad], "lr": potentials_learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0, betas=BETAS)


def warmup_and_cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up (at most half of the run), then a cosine to a tenth at ``total_steps``; step it every batch."""
    warmup = max(1, min(warmup_steps, total_steps // 2))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
