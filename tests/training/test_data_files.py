"""Reading documents: formats, limits, splits, and what is said about a file that can't be used."""

import gzip
import json
import lzma
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codd_ppl.data import sample_text_path
from codd_ppl.errors import DataError
from codd_ppl.training.text_files import iterate_documents, iterate_rows, read_documents, split_documents


def write(path: Path, data: str | bytes) -> Path:
    raw = data.encode() if isinstance(data, str) else data
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(raw)
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".xz"])
def test_text_is_split_at_blank_lines(tmp_path: Path, packed: str) -> None:
    path = write(tmp_path / f"a.txt{packed}", "\n\none\ntwo\n\nthree é\n \t\n\nfour")
    assert read_documents(path) == ["one\ntwo", "three é", "four"]


@pytest.mark.parametrize("packed", ["", ".gz", ".xz"])
def test_json_lines_are_documents(tmp_path: Path, packed: str) -> None:
    rows = [{"text": "one\n\ntwo", "id": 1}, {"text": "  "}, {"text": "line\u2028separator"}]
    path = write(tmp_path / f"a.jsonl{packed}", "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    assert read_documents(path) == ["one\n\ntwo", "line\u2028separator"]


def test_fields_are_joined(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "why?", "answer": "so", "n": 3}\n')
    assert read_documents(path, fields=("question", "answer")) == ["why?\nso"]
    assert read_documents(path, fields="answer") == ["so"]


@pytest.mark.parametrize(
    ("separator", "expected"),
    [("<|end|>", ["a\n\nb", "c"]), ("", ["a\n\nb<|end|>\nc\n"]), (None, ["a", "b<|end|>\nc"])],
)
def test_document_separator(tmp_path: Path, separator: str | None, expected: list[str]) -> None:
    path = write(tmp_path / "a.txt", "a\n\nb<|end|>\nc\n")
    assert read_documents(path, document_separator=separator) == expected


def test_carriage_returns_and_byte_order_marks_go(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree")
    assert read_documents(path) == ["one\ntwo", "three"]


def test_several_sources_keep_their_order(tmp_path: Path) -> None:
    paths = [write(tmp_path / "b.txt", "b"), write(tmp_path / "a.jsonl", '{"text": "a"}')]
    assert read_documents(paths) == ["b", "a"]


@pytest.mark.parametrize("limit", [1, 7, 8, 9, 12, 100])
def test_limit_counts_characters_of_documents(tmp_path: Path, limit: int) -> None:
    paths = [write(tmp_path / "a.txt", "aaaa\n\nbbbb\n\n"), write(tmp_path / "b.txt", "cccc")]
    documents = read_documents(paths, limit=limit)
    assert "".join(documents) == "aaaabbbbcccc"[:limit]


def test_limit_stops_reading(tmp_path: Path) -> None:
    """What comes after the limit isn't even decoded."""
    path = write(tmp_path / "a.txt", b"good\n\ngood\n\n\xff")
    assert read_documents(path, limit=6) == ["good", "go"]


def test_the_sample_of_the_package() -> None:
    path = sample_text_path()
    documents = read_documents(path)
    assert path.stat().st_size < 250_000 and len(documents) == 3815
    assert documents[0].startswith("First Citizen:\nBefore we proceed")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        text = file.read()
    assert len(text) == 614_905 and text.split() == "\n".join(documents).split()


# --- the split --------------------------------------------------------------------------------------


def test_split_by_document() -> None:
    documents = [f"{index}" * (1 + index % 7) for index in range(300)]
    train, valid = split_documents(documents, 0.2, seed=3)
    assert sorted(train + valid) == sorted(documents)
    assert [documents.index(d) for d in train] == sorted(documents.index(d) for d in train)
    share = sum(map(len, valid)) / sum(map(len, documents))
    assert 0.2 <= share < 0.23
    assert split_documents(documents, 0.2, seed=3) == (train, valid)
    assert split_documents(documents, 0.2, seed=4)[1] != valid


@pytest.mark.parametrize("fraction", [0.001, 0.999])
@pytest.mark.parametrize("count", [2, 3])
def test_both_sides_of_a_split_get_a_document(fraction: float, count: int) -> None:
    train, valid = split_documents(["text"] * count, fraction, seed=0)
    assert train and valid and len(train) + len(valid) == count


def test_one_document_is_cut() -> None:
    assert split_documents(["abcdefghij"], 0.3, seed=0) == (["abcdefg"], ["hij"])


# --- what can be wrong ------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found nothing at .*gone\.txt"):
        read_documents(tmp_path / "gone.txt")


def test_folder(tmp_path: Path) -> None:
    write(tmp_path / "part.txt", "text")
    with pytest.raises(DataError, match=r"found a folder: .*pass the files in it.*part\.txt"):
        read_documents(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
@pytest.mark.parametrize("text", ["", "\n \n\n"])
def test_empty_file(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError, match=rf"expected text in .*{name}, found none"):
        read_documents([write(tmp_path / "full.txt", "text"), write(tmp_path / name, text)])


def test_no_file_at_all() -> None:
    with pytest.raises(DataError, match="at least one text file"):
        read_documents([])


@pytest.mark.parametrize("packed", ["", ".gz", ".xz"])
def test_not_utf8(tmp_path: Path, packed: str) -> None:
    path = write(tmp_path / f"a.txt{packed}", "é\nabc".encode() + "dé".encode("latin1"))
    with pytest.raises(DataError, match=rf"UTF-8 text in .*a\.txt{packed}, found byte 0xe9 at byte offset 7"):
        read_documents(path)


def test_field_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"body": "b", "id": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: expected a field 'text', found 'body', 'id'"):
        read_documents(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', "line 1: expected text in field 'text', found int"),
        ("[1]", "line 1: expected a JSON object, found list"),
        ('{"text": "a"', "found on line 1: "),
        ('{"text": "\\ud800"}', "line 1: expected Unicode text, found half a surrogate pair"),
    ],
)
def test_line_that_is_no_document(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_documents(write(tmp_path / "a.jsonl", line))


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.txt.zst", "noend"])
def test_unknown_kind(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"ends in \.txt or \.jsonl .*found {name}"):
        read_documents(write(tmp_path / name, "text"))


@pytest.mark.parametrize("packed", [".gz", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "not packed"])
def test_damaged_file(tmp_path: Path, packed: str, damage: str) -> None:
    path = write(tmp_path / f"a.txt{packed}", os.urandom(5000).hex())
    path.write_bytes(path.read_bytes()[:2000] if damage == "cut" else b"plain text")
    with pytest.raises(DataError, match=rf"whole {packed} file, found a damaged one: .*a\.txt"):
        read_documents(path)


# --- the hub ----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the package `datasets`; the list of its calls."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(
        path: str, name: str | None = None, *, split: str, streaming: bool
    ) -> Iterator[dict[str, str]]:
        calls.append((path, name, split, streaming))
        return iter([{"text": "one", "title": "I"}, {"text": "two", "title": "II"}])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_data_set(hub: list[tuple[Any, ...]]) -> None:
    assert read_documents("hf:owner/name") == ["one", "two"]
    assert read_documents("hf:owner/name:small@test", fields=("title", "text"), limit=4) == ["I\non"]
    assert hub == [("owner/name", None, "train", False), ("owner/name", "small", "test", True)]


def test_hub_field_missing(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(DataError, match="hf:owner/name, row 0: expected a field 'body'"):
        read_documents("hf:owner/name", fields="body")


def test_hub_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"isn't installed; run pip install 'codd-ppl\[hf\]'"):
        read_documents("hf:owner/name")


def test_hub_folder_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    assert read_documents(f"hf:{tmp_path}") == ["one", "two"]


def test_documents_and_rows_one_after_another(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "n": 1}\n\n{"text": " "}\n{"text": "two"}\nno json')
    documents = iterate_documents(path)
    assert [next(documents), next(documents)] == ["one", "two"]  # the fifth line isn't read yet
    with pytest.raises(DataError, match="on line 5"):
        next(documents)
    rows = iterate_rows(path)
    assert next(rows) == (f"{path}, line 1", {"text": "one", "n": 1})
    for text, words in [
        ("[1]", "expected a JSON object with fields, found list"),
        ('"a"', "found str"),
        ("", "found none"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            list(iterate_rows(path))
