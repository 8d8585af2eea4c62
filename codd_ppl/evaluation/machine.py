"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from codd_ppl.errors import ConfigError

__all__ = ["describe_device", "found_device", "free_bytes", "processor"]


def processor() -> str:
    """The model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_device(device: torch.device) -> str:
    """Such as "CPU, Intel Xeon Gold, 1 thread, 2 cores", or "CUDA, NVIDIA H100" with the same of its host."""
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} cores, {threads} thread" + "s" * (threads != 1)
    if device.type == "cuda":
        return f"CUDA, {torch.cuda.get_device_name(device)}; host {processor()}, {cores}"
    return f"{device.type.upper()}, {processor()}, {cores}"


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had there: of the GPU, or of the host without paging."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def found_device(name: str, setting: str) -> torch.device:
    """The device of that name.

    Args:
        name: such as "cuda".
        setting: what asks for it, for the message.

    Raises:
        ConfigError: it isn't there.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{setting} {name}: expected a device of this machine, but {str(error).splitlines()[0]}; try cpu"
        ) from error
    return device
