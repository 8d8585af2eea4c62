"""Folders and files that are written as a whole: there is never half of one, and never none where one was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codd_ppl.errors import ConfigError

__all__ = ["check_target", "whole_file", "whole_folder"]


def check_target(path: str | os.PathLike[str], marker: str) -> None:
    """Whether a folder of a kind may be written to ``path``.

    Args:
        path: a folder to write or to replace.
        marker: the file by which a folder of this kind is known.

    Raises:
        ConfigError: something is there that isn't such a folder.
    """
    if Path(path).exists() and not (Path(path) / marker).is_file():
        raise ConfigError(
            f"{path} exists and is no model folder, which has {marker}; choose another path, nothing was written"
        )


@contextmanager
def whole_folder(path: Path, marker: str) -> Iterator[Path]:
    """An empty folder beside ``path``, which takes its place when the block ends without an error.

    Args:
        path: where the folder goes; one of this kind that is there already is replaced.
        marker: the file by which a folder of this kind is known.

    Raises:
        ConfigError: something is there that isn't such a folder; nothing is written.
    """
    check_target(path, marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, old = (path.with_name(f".{path.name}.{os.getpid()}.{word}") for word in ("tmp", "old"))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        if not path.exists():
            os.replace(draft, path)
            return
        try:
            os.replace(path, old)
            os.replace(draft, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside ``path`` to write to; the file takes its place when the block ends without an error.

    Args:
        path: where the file goes; folders are made, and a file that is there is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
