"""Folders written as a whole: whatever goes wrong, and whenever, the one that was there is there."""

import os
from pathlib import Path
from typing import Any

import pytest

from codd_ppl.errors import ConfigError
from codd_ppl.folders import check_target, whole_file, whole_folder


def write(path: Path, text: str) -> None:
    with whole_folder(path, "mark") as draft:
        (draft / "mark").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_new_one_and_another_in_its_place(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write(tmp_path / "deep" / "x", text)
        assert (tmp_path / "deep" / "x" / "mark").read_text() == text
    assert names(tmp_path / "deep") == ["x"]


def test_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("")
    with pytest.raises(ConfigError, match="which has mark"):
        write(tmp_path / "x", "one")
    with pytest.raises(ConfigError, match="nothing was written"):
        check_target(tmp_path / "x", "mark")
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["mine"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_while_it_is_written(error: type[BaseException], tmp_path: Path) -> None:
    write(tmp_path / "x", "one")
    with pytest.raises(error), whole_folder(tmp_path / "x", "mark") as draft:
        (draft / "mark").write_text("half")
        raise error
    assert names(tmp_path) == ["x"] and (tmp_path / "x" / "mark").read_text() == "one"


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_while_they_change_places(
    failing: int, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x", "one")
    calls, replace = [], os.replace

    def broken(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(error):
        write(tmp_path / "x", "two")
    assert names(tmp_path) == ["x"] and (tmp_path / "x" / "mark").read_text() == "one"


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with whole_file(path) as draft:
        draft.write_text("one")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "one" and [p.name for p in path.parent.iterdir()] == ["file"]
