"""Values computed from large tensors, kept as long as these live and don't change.

The exponentials of an emission table of 1,024 states and 32,768 tokens take longer than the matrix product they are
for with a few sites, and stay the same from call to call while the caller's tensor does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from codd_ppl.inference.transforms import transforming

__all__ = ["LARGE", "MEMORY", "Memory", "keepable"]

LARGE = 1 << 16
"""Entries of a tensor from which on it is worth it; a smaller one costs little."""

LOOKS = 16
"""About so many places along each dimension are compared as well, for edits that PyTorch doesn't count."""

T = TypeVar("T", Tensor, tuple[Tensor, Tensor])


def keepable(tensor: Tensor) -> bool:
    """Whether what is computed from a tensor may be kept: it is large, its edits are counted, no graph is recorded."""
    return (
        tensor.numel() >= LARGE
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and not tensor.is_inference()
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and not transforming()
    )


@dataclass(frozen=True)
class _Entry:
    alive: weakref.ref[Tensor]
    state: Hashable
    look: Tensor
    values: dict[Hashable, tuple[Any, int]]


class Memory:
    """Values by the tensor that they were computed from, of the tensors used last.

    A value is given back only for the same tensor object with the same count of edits (``Tensor._version``, which
    views share), place in memory, shape, strides, type and device, and the same numbers at a few places; and only
    if nobody edited the value. It goes when the tensor does. What isn't seen is an edit of single entries behind
    autograd's back (through ``.data`` or NumPy).

    Each access to the dictionary is one operation of it: threads may compute a value twice, no more.

    Args:
        entries: how many tensors' values are kept.
    """

    def __init__(self, entries: int = 16) -> None:
        self.entries = entries
        self._found: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._found)

    def clear(self) -> None:
        """Forget all."""
        self._found.clear()

    def get(self, tensor: Tensor, key: Hashable, make: Callable[[Tensor], T]) -> T:
        """``make(tensor)``, computed without a graph, or what it gave before.

        Args:
            tensor: for which :func:`keepable` holds.
            key: what is computed.
            make: computes it, a tensor or two that don't share the tensor's memory.
        """
        entry = self._entry(tensor)
        value, edits = entry.values.get(key, (None, 0))
        if value is None or _edits(value) != edits:
            # A tensor made in inference mode could not be used in a graph later on.
            with torch.inference_mode(False), torch.no_grad():
                value = make(tensor)
            entry.values[key] = value, _edits(value)
        return cast(T, value)

    def _entry(self, tensor: Tensor) -> _Entry:
        name, state, look = id(tensor), _state(tensor), _look(tensor)
        entry = self._found.pop(name, None)
        if (
            entry is None
            or entry.alive() is not tensor
            or entry.state != state
            or not torch.equal(entry.look, look)
        ):
            memory = weakref.ref(self)

            def gone(ref: weakref.ref[Tensor]) -> None:
                if (still := memory()) is not None:
                    still._forget(name, ref)

            entry = _Entry(weakref.ref(tensor, gone), state, look.clone(), {})
        for old in list(self._found)[: len(self._found) + 1 - self.entries]:
            self._found.pop(old, None)
        self._found[name] = entry  # the one used last comes last
        return entry

    def _forget(self, name: int, ref: weakref.ref[Tensor]) -> None:
        entry = self._found.get(name)
        if entry is not None and entry.alive is ref:
            self._found.pop(name, None)


def _state(tensor: Tensor) -> Hashable:
    place = tensor._version, tensor.data_ptr(), tensor.device
    return (*place, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_neg(), tensor.is_conj())


def _look(tensor: Tensor) -> Tensor:
    return tensor.detach()[tuple(slice(None, None, max(1, n // LOOKS)) for n in tensor.shape)]


def _edits(value: Tensor | tuple[Tensor, ...]) -> int:
    return sum(v._version for v in (value if isinstance(value, tuple) else (value,)))


MEMORY = Memory()
"""The one that all queries use."""
