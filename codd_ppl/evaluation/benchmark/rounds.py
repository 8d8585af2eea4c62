"""Interleaved rounds: each candidate is called once in turn, so that what else the machine does falls on all alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor

__all__ = ["Candidate", "Clock", "Timing", "measure"]

Clock = Callable[[], float]

ROUNDS = 25
"""At most so many timed calls of one candidate in one cell."""


@dataclass(frozen=True)
class Candidate:
    """One way to answer a query.

    Attributes:
        name: column of the table.
        kind: "ours", "plain" (straightforward torch) or "peer" (another library).
        call: answers the query, on inputs that were laid out for it before.
        reason: why there is no call.
        read: takes the answer out of what ``call`` returned, in the form that all candidates share.
    """

    name: str
    kind: str
    call: Callable[[], Any] | None = None
    reason: str = ""
    read: Callable[[Any], Tensor] = field(default=lambda result: result)


@dataclass
class Timing:
    """What became of one candidate: seconds, or the reason why there are none.

    Attributes:
        error: largest difference to the reference answer, relative to its size where that is above 1.
    """

    kind: str
    seconds: list[float] = field(default_factory=list)
    reason: str = ""
    error: float | None = None

    @property
    def median(self) -> float | None:
        """Median of the seconds; None if it did not run."""
        return median(self.seconds) if self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; times in seconds."""
        least = min(self.seconds) if self.seconds else None
        error = None if self.error is None else self.error if math.isfinite(self.error) else str(self.error)
        figures = {"median": self.median, "min": least, "calls": len(self.seconds), "error": error}
        return {"kind": self.kind, **figures, "reason": self.reason}


def measure(
    candidates: Sequence[Candidate],
    budget: float,
    compare: Callable[[Tensor], float] | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time the candidates in rounds: one call each before, not counted, then one call each in turn.

    Python's collection of garbage waits meanwhile, as in timeit: what it looks through belongs to all candidates. A
    candidate sits out once its calls took its share of the budget, but not before the third call (the first, if a
    call takes more than the share).

    Args:
        candidates: those with a reason are listed and not called. A peer's exception is shown as its reason.
        budget: seconds for all of them, the calls before not counted.
        compare: from an answer to its error.
        clock: seconds; on a machine that others use too, `time.process_time` leaves out the waiting for a processor.
    """
    found = {c.name: Timing(c.kind, reason=c.reason) for c in candidates}
    active = []
    for c in candidates:
        if c.call is None:
            continue
        try:
            answer = c.call()
        except Exception as error:
            if c.kind != "peer":
                raise
            found[
                c.name
            ].reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            continue
        if compare is not None:
            found[c.name].error = compare(c.read(answer))
        del answer
        active.append(c)
    share = budget / max(1, len(active))
    with _no_collection():
        for _ in range(ROUNDS):
            for c in tuple(active):
                assert c.call is not None
                start = clock()
                answer = c.call()
                taken = clock() - start
                del answer
                seconds = found[c.name].seconds
                seconds.append(taken)
                if sum(seconds) > share and (len(seconds) >= 3 or taken > share):
                    active.remove(c)
    return found


@contextmanager
def _no_collection() -> Iterator[None]:
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
