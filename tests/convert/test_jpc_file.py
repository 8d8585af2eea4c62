"""Reading a .jpc runs nothing that is in it."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codd_ppl.convert import read_jpc
from codd_ppl.errors import DataError

HALVES = np.full(2, 0.5), np.full((2, 2), 0.5), np.full((2, 3), 1 / 3)


class Attack:
    """Pickled as a call of ``os.mkdir``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("where", ["file", "record", "distribution", "array", "external"])
def test_no_call_is_made(juice: Any, write: Callable[..., Path], tmp_path: Path, where: str) -> None:
    attack, records = Attack(tmp_path / "harm"), juice.hmm(*HALVES, 2)
    if where == "record":
        records[0]["block_size"] = attack
    elif where == "distribution":
        records[0]["dist"] = pickle.dumps(attack)
    elif where == "array":
        records[-1]["params"] = np.array([attack], dtype=object)
    elif where == "external":
        records[-1]["external_params"] = pickle.dumps(attack)
    path = write(attack if where == "file" else records)
    if where == "external":
        assert read_jpc(path)[-1].external
    else:
        found = "numpy.dtype" if where == "array" else "mkdir"
        with pytest.raises(DataError, match=rf"calls .*{found}.*not run.*--trust-pickle"):
            read_jpc(path)
    assert not (tmp_path / "harm").exists()
    if where == "file":  # the attack is one
        pickle.loads(path.read_bytes())
        assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "words",
    [
        b"cbuiltins\neval\n(S'1/0'\ntR.",
        b"(S'1/0'\nibuiltins\neval\n.",
        b"cpyjuice.io\nload\n(S'x'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"\x82\x01.",
        b"P1\n.",
    ],
    ids=["global", "instance", "pyjuice", "numpy", "extension", "persistent"],
)
def test_other_ways_to_name_something(words: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.jpc").write_bytes(words)
    with pytest.raises(DataError, match=r"model\.jpc: expected"):
        read_jpc(tmp_path / "model.jpc")


def test_a_load_leaves_nothing_behind(tmp_path: Path) -> None:
    """State set on a stand-in itself is gone with it."""
    (tmp_path / "model.jpc").write_bytes(b"cnumpy\ndtype\n(N}S'order'\nS'>'\nstb.")
    with pytest.raises(DataError):
        read_jpc(tmp_path / "model.jpc")
    from codd_ppl.convert.jpc_file import STAND_INS

    assert STAND_INS["numpy.dtype"].order == "|"


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("code", ["<f4", ">f4", "<f8", "<f2", "<i8", "|b1"])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays(juice: Any, write: Callable[..., Path], protocol: int, code: str, order: str) -> None:
    array = np.asarray(np.arange(6).reshape(2, 3), dtype=np.dtype(code), order=order)  # type: ignore[call-overload]
    records = juice.hmm(*HALVES, 2)
    records[-1]["params"] = array
    found = read_jpc(write(records, protocol))[-1].parameters
    assert found is not None and found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    "content,said",
    [
        (b"", "EOFError"),
        (b"a text", "UnpicklingError"),
        (pickle.dumps([]), "no nodes"),
        (pickle.dumps({"a": 1}), "TypeError"),
        (
            pickle.dumps([{"type": "Sum", "num_nodes": 3, "chs": ()}]),
            r"KeyError: 'num_node_blocks'.*older versions",
        ),
        (
            pickle.dumps([{"type": "Sum", "num_node_blocks": 1, "block_size": 1, "chs": (), "params": 3}]),
            "an array",
        ),
    ],
)
def test_damage_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "model.jpc").write_bytes(content)
    with pytest.raises(
        DataError, match=rf"model\.jpc: expected a \.jpc file of PyJuice 2 or later, but .*{said}"
    ):
        read_jpc(tmp_path / "model.jpc")


def test_missing_and_cut_off(juice: Any, write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such file.*correct the path"):
        read_jpc(tmp_path / "none.jpc")
    path = write(juice.hmm(*HALVES, 2))
    for length in range(0, path.stat().st_size - 1, 13):
        (tmp_path / "cut.jpc").write_bytes(path.read_bytes()[:length])
        with pytest.raises(DataError):
            read_jpc(tmp_path / "cut.jpc")
