"""What this machine can do at best, and how much of it a query needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from codd_ppl.evaluation.benchmark.cases import Case
from codd_ppl.evaluation.benchmark.rounds import Clock

__all__ = ["Limits", "measure_limits"]


@dataclass(frozen=True)
class Limits:
    """Measured rates of one machine with the threads that torch was given.

    Attributes:
        gemm: float32 operations per second of a (1024, 1024) matrix product.
        copy: bytes per second, read and written together, of a 64 MiB copy into a buffer that is there already.
        exp: float32 exponentials per second, in cache.
        op: seconds for one operation on 64 numbers.
    """

    gemm: float
    copy: float
    exp: float
    op: float

    def seconds(self, query: str, case: Case) -> float:
        """The least time for a query: operations or bytes, whichever take longer, and the exponentials.

        Overhead of operations is not in it. A max-product is counted at the rate of a matrix product, which it can't
        reach. With "tokens", exponentials of the emission table are not counted (they can be kept).
        """
        B, N, C, V = case.batch, case.sites, case.states, case.vocab
        inner = 2.0 * B * N * C * C
        exps = B * N * C + C * C if case.layout == "shared" else B * (N - 1) * C * C
        read = float(case.bytes)
        if case.layout == "tokens":
            inner, exps = inner + 2.0 * B * N * C * V, B * N * V
        if query in ("gradient", "marginals"):
            inner, read = 3 * inner, 2 * read
        if query == "mode":
            exps = 0
        return max(inner / self.gemm, read / self.copy) + exps / self.exp

    def to_dict(self) -> dict[str, float]:
        """For JSON; SI units."""
        return asdict(self)


def measure_limits(seconds: float = 0.3, clock: Clock = time.perf_counter) -> Limits:
    """The fastest of the calls made in about ``seconds`` for each figure: a limit is what an idle machine can do."""
    square = torch.randn(1024, 1024)
    product, many, out = torch.empty_like(square), torch.randn(1 << 16), torch.empty(1 << 16)
    source, target, few = torch.zeros(1 << 24), torch.zeros(1 << 24), torch.zeros(64)
    return Limits(
        gemm=2.0 * 1024**3 / _fastest(lambda: torch.mm(square, square, out=product), seconds, clock),
        copy=2.0 * 4 * (1 << 24) / _fastest(lambda: target.copy_(source), seconds, clock),
        exp=(1 << 16) / _fastest(lambda: torch.exp(many, out=out), seconds, clock),
        op=_fastest(lambda: few + few, seconds / 10, clock),
    )


def _fastest(call: Callable[[], object], seconds: float, clock: Clock) -> float:
    call()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = clock()
        call()
        taken.append(clock() - start)
    return min(taken)
