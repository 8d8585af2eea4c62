"""Peak memory that a call allocates beyond its inputs, from the allocations that torch's profiler records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile

from codd_ppl.evaluation.benchmark.cases import Case
from codd_ppl.evaluation.benchmark.tasks import Cell

__all__ = ["peak_bytes", "peaks"]


def peak_bytes(call: Callable[[], Any]) -> int:
    """Largest sum of live CPU allocations during the call, its result included."""
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        answer = call()
    del answer
    live = top = 0
    events = record.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return top


def peaks(case: Case) -> dict[str, dict[str, float]]:
    """Query -> candidate -> peak bytes over the bytes of the input. Peers outside torch can't be seen."""
    found: dict[str, dict[str, float]] = {}
    for query in ("log_partition", "gradient", "marginals", "mode", "sample"):
        for candidate in Cell("memory", query, case).candidates()[1]:
            if candidate.call is not None and candidate.kind != "peer":
                candidate.call()
                found.setdefault(query, {})[candidate.name] = peak_bytes(candidate.call) / case.bytes
    return found


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler announces its start and stop from C++, and no setting of its log silences that."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
