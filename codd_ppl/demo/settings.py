"""Sizes of the demonstration."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DemoSettings"]


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demonstration; seconds are upper bounds for each part on the machine at hand.

    Attributes:
        sites: tokens of a block. states: of the hidden Markov coupling. hidden, layers, dropout: of the network.
        train_steps: optimiser steps of the network, fewer where ``train_seconds`` would not hold them.
        epochs: passes of Baum-Welch, fewer where ``fit_seconds`` would not hold them.
        valid_blocks, draws: of the bound.
        pool_sites: masked sites that the pool is fitted to.
    """

    sites: int = 64
    states: int = 64
    hidden: int = 96
    layers: int = 2
    dropout: float = 0.0
    batch_size: int = 64
    train_steps: int = 750
    train_seconds: float = 80.0
    epochs: float = 3.0
    fit_seconds: float = 30.0
    valid_blocks: int = 192
    draws: int = 2
    timing_seconds: float = 8.0
    pool_sites: int = 8192
    seed: int = 0

    @classmethod
    def fast(cls) -> DemoSettings:
        """About a third of the time, and noisier figures."""
        return cls(
            train_steps=260,
            train_seconds=28.0,
            epochs=1.0,
            fit_seconds=9.0,
            valid_blocks=96,
            draws=1,
            timing_seconds=1.0,
            pool_sites=4096,
        )

    @classmethod
    def pretrained(cls) -> DemoSettings:
        """For the model that comes with the package: less than half a minute."""
        return cls(valid_blocks=256, timing_seconds=2.0)
