"""Every snippet of the README runs, and every command in it is one that exists."""

import re
import shlex
from pathlib import Path

import pytest

from codd_ppl.cli import main

CHECKOUT = Path(__file__).parents[1]
TEXT = "the cat sat on the mat and the dog sat on the log. a hat for the cat, a bone for the dog. " * 60


def blocks(language: str) -> list[str]:
    """Fenced blocks of the README."""
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def test_python_snippets_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one session, as a reader would paste them; text.txt is the reader's own text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    found = blocks("python")
    assert len(found) >= 4
    session: dict[str, object] = {}
    for snippet in found:
        exec(compile(snippet, "README.md", "exec"), session)


def test_a_topology_takes_less_than_ten_lines() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line and not line.startswith("#")]
    assert len([line for line in lines if "import" not in line]) < 10


def test_commands_exist() -> None:
    commands = [
        line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines() if "codd " in line
    ]
    assert len(commands) >= 4
    for line in commands:
        words = shlex.split(line[line.index("codd ") :], comments=True)
        with pytest.raises(SystemExit) as done:
            main([words[1], "--help"])
        assert done.value.code == 0


def test_pictures_are_there() -> None:
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures and all((CHECKOUT / path).is_file() for path in pictures)
