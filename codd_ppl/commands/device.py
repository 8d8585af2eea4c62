"""The device that a command line names."""

import torch

from codd_ppl.errors import ConfigError

__all__ = ["named_device"]


def named_device(name: str) -> torch.device:
    """The device of ``--device``.

    Raises:
        ConfigError: it isn't there.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise ConfigError(
            f"--device {name}: expected a device of this machine, but {said}; try cpu"
        ) from error
    return device
