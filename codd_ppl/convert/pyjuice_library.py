"""The one door to PyJuice, for circuits in memory and for files that are to be loaded by PyJuice itself."""

from __future__ import annotations

import os
from typing import Any

from codd_ppl.convert.jpc_file import CircuitNodes, nodes_of
from codd_ppl.errors import ConfigError, DataError

__all__ = ["load_trusted", "nodes_in_memory"]


def nodes_in_memory(circuit: Any) -> list[CircuitNodes]:
    """The nodes of a circuit, as a file of it would hold them.

    Args:
        circuit: ``pyjuice.TensorCircuit``, or the root ``CircuitNodes``.

    Raises:
        ConfigError: PyJuice isn't installed, or it is something else.
        DataError: a circuit that can't be saved.
    """
    juice = _library()
    from pyjuice.io.serialization import serialize_nodes
    from pyjuice.nodes import CircuitNodes as Root

    if isinstance(circuit, juice.TensorCircuit):
        circuit.update_parameters()
        circuit = circuit.root_ns
    if not isinstance(circuit, Root):
        raise ConfigError(
            f"expected the path of a .jpc file, or a circuit of PyJuice, found {type(circuit).__name__}"
        )
    try:
        return nodes_of(serialize_nodes(circuit))
    except Exception as error:  # distributions that can't be pickled say so in many ways
        raise DataError(
            f"expected a circuit as pyjuice.save can write it, but {type(error).__name__}: {error}"
        ) from error


def load_trusted(path: str | os.PathLike[str]) -> list[CircuitNodes]:
    """The nodes of a file that PyJuice loads: **whatever its pickle calls is run**.

    Raises:
        ConfigError: PyJuice isn't installed.
        DataError: PyJuice can't read it.
    """
    juice = _library()
    try:
        circuit = juice.load(os.fspath(path))
    except Exception as error:  # it unpickles
        raise DataError(f"{path}: expected a .jpc file, but {type(error).__name__}: {error}") from error
    return nodes_in_memory(circuit)


def _library() -> Any:
    try:
        import pyjuice
    except ImportError as error:
        raise ConfigError(
            f"circuits in memory and trust_pickle=True (--trust-pickle) need PyJuice ({error}): install it with `pip "
            "install pyjuice`, on Linux as it needs triton; other .jpc files are read without it"
        ) from error
    return pyjuice
