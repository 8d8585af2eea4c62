"""Loops along a path compiled by the system's C compiler, where torch's cost per operation or its products are slow.

``native.c`` is compiled on first use (a second or two) and kept in the user's cache folder, under a name that holds
the source, the compiler and the processor; each process compiles it anew where that folder can't be written to.
Without a compiler the loops of torch operations are used, and a log message says so once. The environment variable
``CODD_NATIVE=0`` turns it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Cut", "call", "call_each", "call_in_parts", "possible", "slices", "usable"]

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-shared", "-fPIC")
SUFFIX = {torch.float32: "float", torch.float64: "double"}

STATES = 512
"""Up to so many states compiled products are the faster ones; beyond, torch's matrix products are."""

SHARED_STATES = 2048
"""The same for one table that all steps and batch elements share, if the batch gives every thread some work."""

LAID_OUT = 512
"""A shared table of more states is used as it lies: turning it over takes longer than it saves."""

WORK = 1 << 20
"""Entries of tables from which on threads are started."""


def usable(states: int, *tensors: Tensor) -> bool:
    """Whether the compiled products serve these inputs: few states, and :func:`possible`."""
    return states <= STATES and possible(*tensors)


def possible(*tensors: Tensor) -> bool:
    """Whether the compiled loops can run: on the CPU, in float32 or float64, nothing empty, with a compiler at hand."""
    first = tensors[0]
    if first.device.type != "cpu" or first.dtype not in SUFFIX:
        return False
    return all(tensor.numel() for tensor in tensors) and library() is not None


def call(name: str, *arguments: Tensor | int | None) -> float:
    """Call a function of ``native.c``; the first tensor of floating type says which precision, None is NULL.

    Returns:
        What the function does, if anything.
    """
    compiled = library()
    assert compiled is not None
    dtype = next(a.dtype for a in arguments if isinstance(a, Tensor) and a.dtype in SUFFIX)
    function = getattr(compiled, f"{name}_{SUFFIX[dtype]}")
    if function.argtypes is None:
        function.argtypes = [ctypes.c_int64 if isinstance(a, int) else ctypes.c_void_p for a in arguments]
        function.restype = ctypes.c_double
    return function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


def slices(batch: int, work: int) -> list[tuple[int, int]]:
    """Parts of a batch, (from, to), for torch's number of threads; a single one where that doesn't pay.

    Args:
        batch: its size.
        work: entries of tables to look at for each batch element.
    """
    threads = min(torch.get_num_threads(), batch)
    if threads < 2 or batch * work < WORK:
        return [(0, batch)]
    bounds = [batch * i // threads for i in range(threads + 1)]
    return list(pairwise(bounds))


def call_each(name: str, calls: Sequence[Sequence[Tensor | int | None]]) -> list[float]:
    """Several calls at once, each in a thread of its own."""
    if len(calls) == 1:
        return [call(name, *calls[0])]
    with ThreadPoolExecutor(len(calls)) as pool:  # a lasting one would not survive a fork
        return [done.result() for done in [pool.submit(call, name, *arguments) for arguments in calls]]


Cut = Callable[[Tensor], Tensor]
"""Takes a part of a tensor whose first dimension is the batch."""


def call_in_parts(
    name: str, batch: int, work: int, part: Callable[[Cut], Sequence[Tensor | int | None]]
) -> float:
    """A call for each of the :func:`slices` of a batch, at once; the smallest of what they return.

    Args:
        name: of the function.
        batch, work: as in :func:`slices`.
        part: the arguments for a part.
    """
    bounds = slices(batch, work)
    if len(bounds) == 1:
        return call(name, *part(lambda whole: whole))
    return min(call_each(name, [part(itemgetter(slice(*some))) for some in bounds]))


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None where they can't be had."""
    if os.environ.get("CODD_NATIVE", "1") == "0":
        return None
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    try:
        if compiler is None:
            raise OSError("no C compiler (cc, gcc or clang) on the path")
        return _loaded(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        logging.getLogger("codd_ppl").warning(
            "paths of few states run as torch operations, several times slower than compiled: %s", error
        )
        return None


def _loaded(compiler: str) -> ctypes.CDLL:
    """The shared library, compiled unless it is in the cache already.

    Its file's name ends with a digest of what is in it, as loading a damaged one can end the process.
    """
    source = SOURCE.read_text(encoding="utf-8")
    whole = "".join(
        f"#define REAL {real}\n#define SUFFIX {real}\n#define WIDE {int(real == 'double')}\n{source}\n"
        "#undef REAL\n#undef SUFFIX\n#undef WIDE\n"
        for real in SUFFIX.values()
    )
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=True).stdout
    key = hashlib.sha256(repr((whole, FLAGS, version, _processor())).encode()).hexdigest()[:20]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codd_ppl"
        for known in sorted(folder.glob(f"native-{key}-*.so")):
            if known.stem.endswith(_digest(known)):
                return ctypes.CDLL(str(known))
        folder.mkdir(parents=True, exist_ok=True)
        draft = tempfile.TemporaryDirectory(dir=folder)
    except (OSError, RuntimeError):  # no home, or not to be written to
        with tempfile.TemporaryDirectory(prefix="codd_ppl-", ignore_cleanup_errors=True) as alone:
            return ctypes.CDLL(str(_compiled(compiler, whole, Path(alone))))
    with draft:
        result = _compiled(compiler, whole, Path(draft.name))
        target = folder / f"native-{key}-{_digest(result)}.so"
        os.replace(result, target)
    return ctypes.CDLL(str(target))


def _compiled(compiler: str, source: str, folder: Path) -> Path:
    code, result = folder / "native.c", folder / "native.so"
    code.write_text(source, encoding="utf-8")
    command = [compiler, *FLAGS, "-o", str(result), str(code)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command[:3])} .. failed: {done.stderr.strip()[-300:]}")
    return result


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:20]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "".join(
            sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))})
        )
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
