"""Running modules that are not being trained: where they are, and in which mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["device_of", "evaluation_mode"]


def device_of(module: object, default: torch.device) -> torch.device:
    """Device of a module's first parameter or buffer; the default where it has neither."""
    if isinstance(module, nn.Module):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return default


@contextmanager
def evaluation_mode(*modules: object) -> Iterator[None]:
    """Put modules into eval mode and give every submodule its own mode back, errors and Ctrl-C included."""
    flags = [(part, part.training) for m in modules if isinstance(m, nn.Module) for part in m.modules()]
    try:
        for module in modules:
            if isinstance(module, nn.Module):
                module.eval()
        yield
    finally:
        for part, training in flags:
            part.training = training
