"""What the records of all commands have in common."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from codd_ppl import __version__
from codd_ppl.errors import ConfigError
from codd_ppl.evaluation.machine import describe_device

__all__ = ["check_file", "made_by"]


def check_file(path: Path | None, example: str) -> None:
    """Whether an output may go there; None is fine.

    Raises:
        ConfigError: a folder.
    """
    if path is not None and path.is_dir():
        raise ConfigError(f"{path} is a folder; give the name of a file to write, e.g. {path / example}")


def made_by(words: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Command, date, device (with the threads of now) and versions, as JSON values."""
    return {
        "command": "codd " + shlex.join(words),
        "date": date.today().isoformat(),
        "device": describe_device(device),
        "versions": {"codd_ppl": __version__, "torch": str(torch.__version__)},
    }
