"""How many threads to work with: two that share their cores with other programs are slower than one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

__all__ = ["fastest_threads"]

ROUNDS = 7


@contextmanager
def fastest_threads(work: Callable[[], object]) -> Iterator[int]:
    """Let PyTorch use one thread inside the context where that does ``work`` as fast as all, within a fifth.

    The threads of an operation wait for each other: on a busy machine, that is most of their time.
    """
    before = torch.get_num_threads()
    try:
        if before > 1:
            torch.set_num_threads(1 if _seconds(work, 1) <= 1.2 * _seconds(work, before) else before)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _seconds(work: Callable[[], object], threads: int) -> float:
    torch.set_num_threads(threads)
    work()
    found = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return median(found)
