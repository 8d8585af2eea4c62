"""What a call does apart from taking time: multiplications, operations, memory.

On a GPU a call of many small operations takes about as long as it takes to start them, a few microseconds each, and
one that asks for a number (``bool(x.any())``) waits until the network before it is done; both can be counted anywhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Footprint", "footprint"]

WAITING = ("_local_scalar_dense", "nonzero", "equal", "bincount", "masked_select", "unique")
"""Operations whose result the host waits for, or whose shape it does."""

EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "set_", "_unsafe_view")
"""Operations that compute nothing and aren't views by name."""


@dataclass(frozen=True)
class Footprint:
    """Of one call.

    Attributes:
        flops: of matrix products and attention, as PyTorch's own counter has it: two for each multiplication. It sees
            neither compiled loops nor elementwise work, nor products of a matrix with a single vector.
        operations: that PyTorch ran, views and empty memory left out: about the kernels that a GPU would start.
        waits: operations among these at which the host waits for a device, at least.
        peak_bytes: most bytes in tensors at a time beyond those before the call.
        kept_bytes: those still there after it, the result let go.
        measured: how bytes were counted.
    """

    flops: int
    operations: int
    waits: int
    peak_bytes: int
    kept_bytes: int
    measured: str


def footprint(call: Callable[[], object], device: torch.device) -> Footprint:
    """Run a call once and look.

    On CUDA bytes are those of its allocator. Elsewhere every new tensor is counted for as long as it lives, which
    leaves out what an operation needs inside.
    """
    watch, flops = _Watch(), FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _product})
    cuda = device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with flops, watch:
        call()
    peak, kept, measured = watch.peak, watch.now, "tensors while they live"
    if cuda:
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        kept, measured = torch.cuda.memory_allocated(device) - before, "torch.cuda.max_memory_allocated"
    return Footprint(flops.get_total_flops(), watch.operations, watch.waits, peak, kept, measured)


def _product(_: Any, one: tuple[int, ...], other: tuple[int, ...], **__: Any) -> int:
    """Of ``addmm_``, which PyTorch's counter leaves out, from the shapes."""
    return 2 * one[0] * one[1] * other[1]


class _Watch(TorchDispatchMode):
    """Counts operations, and bytes of storages from their first sight on until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {_key(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in EMPTY:
            self.operations += 1
            self.waits += name in WAITING or (name == "index" and _by_mask(args))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in given:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._seen.get(key)
        if known is None or known() is None:
            self._seen[key] = weakref.ref(storage, partial(self._gone, key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int, ref: weakref.ref[torch.UntypedStorage]) -> None:
        self.now -= size
        if self._seen.get(key) is ref:
            del self._seen[key]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _by_mask(args: tuple[Any, ...]) -> bool:
    """Whether an index is a mask, whose places are looked up first."""
    places = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(place, Tensor) and place.dtype == torch.bool for place in places)
