"""The device that a command line names."""

import torch

from codd_ppl.evaluation.machine import found_device

__all__ = ["named_device"]


def named_device(name: str) -> torch.device:
    """The device of ``--device``.

    Raises:
        ConfigError: it isn't there.
    """
    return found_device(name, "--device")
