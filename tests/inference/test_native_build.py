"""Compiling the loops on first use: without a compiler, a home or a whole file, and by two processes at once."""

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.graphs import topologies
from codd_ppl.inference import log_partition, native

pytestmark = [pytest.mark.slow, pytest.mark.ci]  # each compiles the loops anew
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no compiler here")

CODE = "from codd_ppl.inference import native; print(native.library() is not None)"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A first use with a cache of its own; returns its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CODD_NATIVE", raising=False)
    native.library.cache_clear()
    yield tmp_path / "codd_ppl"
    native.library.cache_clear()


def assert_right() -> None:
    """Several queries along a path give the right result."""
    graph = topologies.chain(5, 3)
    tables = testing.random_log_potentials(graph, (2,), evidence=1.0, seed=0)
    for _ in range(2):
        torch.testing.assert_close(
            log_partition(compile(graph), tables), testing.brute_log_partition(graph, tables)
        )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def script(folder: Path, text: str) -> Path:
    """A command ``cc`` alone in a folder."""
    folder.mkdir()
    (folder / "cc").write_text(text, encoding="utf-8")
    (folder / "cc").chmod(stat.S_IRWXU)
    return folder


def assert_falls_back(caplog, *words: str) -> None:
    """Right results, and one log message that says why they come slower."""
    with caplog.at_level(logging.WARNING, "codd_ppl"):
        assert native.library() is None
        assert_right()
    (message,) = [record.getMessage() for record in caplog.records if record.name == "codd_ppl"]
    assert all(word in message for word in ("several times slower", *words)), message


def test_without_a_compiler(fresh, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert_falls_back(caplog, "no C compiler")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("#!/bin/sh\nexit 1\n", "exit status 1"),
        (
            '#!/bin/sh\n[ "$1" = --version ] && exit 0\nprintf "no disk \\377 left\\n" >&2\nexit 1\n',
            "failed: no disk",
        ),
        (
            '#!/bin/sh\n[ "$1" = --version ] && exit 0\nwhile [ "$1" != -o ]; do shift; done\necho x > "$2"\n',
            "",
        ),
    ],
    ids=["always", "says why", "writes nonsense"],
)
def test_a_compiler_that_fails(fresh, monkeypatch, tmp_path, caplog, text, word):
    monkeypatch.setenv("PATH", str(script(tmp_path / "bin", text)))
    monkeypatch.delenv("CC", raising=False)
    assert_falls_back(caplog, word)


@needs_compiler
def test_compiled_once(fresh, caplog):
    assert native.library() is not None
    (name,) = files(fresh)
    before = (fresh / name).stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert files(fresh) == [name] and (fresh / name).stat().st_mtime_ns == before
    assert_right()
    assert not caplog.records


@needs_compiler
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
@pytest.mark.slow
@pytest.mark.ci
def test_a_damaged_file_is_compiled_again(fresh, monkeypatch, tmp_path, part):
    """Cut off, as by a full disk: the operating system ends a process that loads such a file."""
    assert native.library() is not None
    (name,) = files(fresh)
    whole = (fresh / name).read_bytes()
    other = tmp_path / "other" / "codd_ppl"
    other.mkdir(parents=True)
    (other / name).write_bytes(whole[: int(part * len(whole))])
    monkeypatch.setenv("XDG_CACHE_HOME", str(other.parent))
    native.library.cache_clear()
    assert native.library() is not None
    assert_right()
    assert (other / name).read_bytes() == whole and files(other) == [name]


@needs_compiler
@pytest.mark.parametrize("where", ["a file", "no home", "read-only"])
@pytest.mark.slow
@pytest.mark.ci
def test_a_cache_that_can_not_be_written(fresh, monkeypatch, tmp_path, where, caplog):
    if where == "a file":
        fresh.write_text("not a folder", encoding="utf-8")
    elif where == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(
            Path, "home", classmethod(lambda _: (_ for _ in ()).throw(RuntimeError("no home")))
        )
    else:
        right = native.tempfile.TemporaryDirectory

        def denied(*given, dir=None, **options):
            if dir == fresh:
                raise PermissionError(13, "Permission denied", str(dir))
            return right(*given, dir=dir, **options)

        monkeypatch.setattr(native.tempfile, "TemporaryDirectory", denied)
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert native.library() is not None
    assert_right()
    assert not files(tmp_path / "temporary") and not caplog.records


@needs_compiler
@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_at_once(fresh):
    command = [sys.executable, "-W", "error", "-c", CODE]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate(timeout=100) for process in both] == [("True\n", "")] * 2
    (name,) = files(fresh)
    assert name.startswith("native-") and name.endswith(".so")


def test_turned_off(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CODD_NATIVE", "0")
    assert native.library() is None
    assert_right()
    assert not fresh.exists() and not caplog.records and os.environ["CODD_NATIVE"] == "0"
