"""Where queries meet PyTorch's transforms: torch.compile, and torch.func's grad, vmap and their kin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import GraphError, PotentialsError

__all__ = ["capturing", "eager", "transforming", "unseen"]

P = ParamSpec("P")
T = TypeVar("T")


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def transforming() -> bool:
    """Whether a transform of torch.func is active, or a CUDA graph being captured.

    Then values can't be looked at, nor memory be used again: queries run in log space, which needs no check, through
    ordinary differentiable operations of fixed shapes, and skip the search for bad entries.
    """
    return bool(torch._C._are_functorch_transforms_active()) or capturing()


def unseen(value: torch.Tensor) -> bool:
    """Whether a tensor can't be looked at: it stands for many, by torch.func.vmap or is being captured."""
    if not transforming():
        return False
    return capturing() or bool(torch._C._functorch.is_batchedtensor(value))


def _check(query: str, given: tuple[object, ...]) -> None:
    if given and not isinstance(given[0], ContractionPlan):
        raise GraphError(
            f"{query}: expected a plan, found {type(given[0]).__name__}; compile the graph once, plan = compile(graph)"
        )
    if len(given) > 1 and not isinstance(given[1], Mapping):
        raise PotentialsError(
            f"{query}: expected log-potentials as a dictionary from names of factors, ties or variables to tensors, "
            f"found {type(given[1]).__name__}"
        )


def eager(query: Callable[P, T]) -> Callable[P, T]:
    """A query that ``torch.compile`` of its caller leaves alone (a graph break) instead of unrolling it.

    A plan is a list of hundreds of steps, and the fast route looks at its own result: tracing it would take minutes
    and gain nothing. Its first two arguments are a plan and a dictionary, or a named error says so.
    """
    opaque: list[Callable[P, T]] = []

    @wraps(query)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        _check(query.__name__, args)
        if torch.compiler.is_compiling():
            if not opaque:
                # Not at import: it loads the compiler, which takes seconds.
                opaque.append(torch.compiler.disable(query))
            return opaque[0](*args, **kwargs)
        return query(*args, **kwargs)

    return call
