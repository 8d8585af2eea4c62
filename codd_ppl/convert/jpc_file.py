"""PyJuice's ``.jpc`` files, read without PyJuice and without running anything that is in them.

A ``.jpc`` is a pickle (``pyjuice.io.save``) of a list with a dictionary for each vector of nodes, children before
parents, the root last: its kind, sizes, children, edges and parameters, the latter as arrays of numpy; an input node
also has its variable and its distribution, which is a pickle in the pickle. Loading a pickle calls whatever functions
it names. Here the names of numpy's arrays and of PyJuice's distributions stand for classes of this file, which only
keep what they are given, and any other name is refused.

The layout is that of PyJuice 2.4.1 to 2.6.3 (github.com/Tractables/pyjuice, src/pyjuice/io/serialization.py).
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from codd_ppl.errors import DataError

__all__ = ["CircuitNodes", "nodes_of", "read_jpc"]

CODES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
"""Types of numbers that an array may have."""


@dataclass(frozen=True)
class CircuitNodes:
    """A vector of nodes of a circuit.

    Attributes:
        kind: "Input", "Product" or "Sum".
        blocks, block_size: so many blocks of so many nodes.
        children: positions in the list.
        edges: of a sum (2, edges): block, and block among the children's; of a product (blocks or nodes, children).
        parameters: of a sum (edges, block_size, children's block_size), of an input node one after another; None: tied
            to others', or never set.
        source: position of the nodes whose parameters these use; None: their own.
        scope: variables of an input node.
        distribution: of an input node, "" elsewhere.
        categories: of the distribution; 0 if it has none.
        external: whether a sum's parameters are changed by tensors from outside.
    """

    kind: str
    blocks: int
    block_size: int
    children: tuple[int, ...]
    edges: np.ndarray | None = None
    parameters: np.ndarray | None = None
    source: int | None = None
    scope: tuple[int, ...] = ()
    distribution: str = ""
    categories: int = 0
    external: bool = False

    @property
    def size(self) -> int:
        """Nodes."""
        return self.blocks * self.block_size


def read_jpc(path: str | os.PathLike[str]) -> list[CircuitNodes]:
    """The nodes of a circuit, the root last.

    Raises:
        DataError: no such file, a damaged one, or one that would call something when it is loaded.
    """
    try:
        with Path(path).open("rb") as file:
            return nodes_of(_Reader(file).load())
    except _RefusedError as error:
        raise DataError(
            f"{path}: expected a list of nodes as pyjuice.save writes it, found a pickle that calls {error}, which was "
            "not run; only if you trust the file's author, trust_pickle=True (--trust-pickle) loads it with PyJuice, "
            "which runs it"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: expected a .jpc file of PyJuice, but {error}; correct the path") from error
    except Exception as error:  # what a pickle that isn't one makes of itself has many kinds
        raise DataError(
            f"{path}: expected a .jpc file of PyJuice 2 or later, but {type(error).__name__}: {error}; files of older "
            "versions become new ones by pyjuice.save(path, pyjuice.load(old_path))"
        ) from error


def nodes_of(records: Iterable[dict[str, Any]]) -> list[CircuitNodes]:
    """What ``pyjuice.io.serialization.serialize_nodes`` gives, or the file holds, as :class:`CircuitNodes`.

    Raises:
        KeyError, TypeError, ValueError, pickle.UnpicklingError: it isn't that.
    """
    found = []
    for record in records:
        given = {
            "kind": record["type"],
            "blocks": int(record["num_node_blocks"]),
            "block_size": int(record["block_size"]),
            "children": tuple(map(int, record["chs"])),
            "edges": _array(record.get("edge_ids")),
            "parameters": _array(record.get("params")),
            "source": record.get("source_node"),
            "external": "external_params" in record,
        }
        if record["type"] == "Input":
            inner = _Reader(io.BytesIO(record["dist"])).load()
            if not isinstance(inner, _Distribution):
                raise TypeError(f"a distribution expected, found {type(inner).__name__}")
            categories = inner.__dict__.get("num_cats", inner.arguments[0] if inner.arguments else 0)
            given |= {
                "scope": tuple(map(int, record["scope"])),
                "distribution": type(inner).__name__,
                "categories": categories if isinstance(categories, int) else 0,
            }
        found.append(CircuitNodes(**given))
    if not found:
        raise ValueError("no nodes")
    return found


def _array(value: Any) -> np.ndarray | None:
    if isinstance(value, _Array):
        return value.value
    if value is None or isinstance(value, np.ndarray):
        return value
    raise TypeError(f"an array expected, found {type(value).__name__}")


class _RefusedError(pickle.UnpicklingError):
    """A name that would be called."""


class _Dtype:
    """Stands for ``numpy.dtype``."""

    order = "|"

    def __init__(self, code: str, *_: Any) -> None:
        if code not in CODES:
            raise _RefusedError(f"numpy.dtype({code!r})")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def of(self, data: bytes | bytearray, shape: tuple[int, ...], order: str) -> np.ndarray:
        """The array; a view of the bytes, which can't be written to."""
        flat = np.frombuffer(data, np.dtype(self.order + self.code))
        return flat.reshape(shape, order=cast(Literal["C", "F"], order))


class _Array:
    """Stands for ``numpy._core.multiarray._reconstruct``, which makes an empty array; then its state is set."""

    value: np.ndarray

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = dtype.of(data, shape, "F" if fortran else "C")


class _Buffer(_Array):
    """Stands for ``numpy._core.numeric._frombuffer`` (protocol 5 of pickle)."""

    def __init__(
        self, data: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: str, *_: Any
    ) -> None:
        super().__init__()
        if order not in ("C", "F"):
            raise _RefusedError(f"an array of order {order!r}")
        self.value = dtype.of(data, shape, order)


class _Distribution:
    """Stands for any distribution of PyJuice: its name is the class's, its settings what it was made or filled with."""

    arguments: tuple[Any, ...] = ()

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class _Ndarray:
    """Stands for ``numpy.ndarray``, which is an argument of the function above."""


STAND_INS: dict[str, type] = {
    "numpy.ndarray": _Ndarray,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.core.numeric._frombuffer": _Buffer,
    "numpy._core.numeric._frombuffer": _Buffer,
}


class _Reader(pickle.Unpickler):
    """Knows no other names, and gives a class of its own each time, so that nothing outlives a load."""

    def find_class(self, module: str, name: str) -> Any:
        kind = STAND_INS.get(f"{module}.{name}")
        if kind is None and module.startswith("pyjuice.nodes.distributions."):
            kind = _Distribution
        if kind is None:
            raise _RefusedError(f"{module}.{name}")
        return type(name, (kind,), {})
