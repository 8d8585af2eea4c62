"""Documents from text files: plain or compressed .txt and .jsonl, or a data set of the Hugging Face hub.

A document is one line of a .jsonl file, one row of a data set, or a stretch of a .txt file between blank
lines. Files are read line by line, so that ``limit`` stops early. What can be wrong with a file is said
with its name and the line or byte.
"""

import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codd_ppl.errors import DataError

__all__ = [
    "HUB_PREFIX",
    "PathLike",
    "iterate_documents",
    "iterate_rows",
    "join_fields",
    "read_documents",
    "split_documents",
]

HUB_PREFIX = "hf:"
"""A source that starts with this is a data set of the hub: ``hf:owner/name[:configuration][@split]``."""

PathLike = str | os.PathLike[str]

_OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    ".gz": gzip.open,
    ".xz": lzma.open,
}


def read_documents(
    source: PathLike | Sequence[PathLike],
    fields: str | Sequence[str] = "text",
    document_separator: str | None = None,
    limit: int | None = None,
) -> list[str]:
    """All documents of one source or of several, in their order; empty ones are left out.

    Args:
        source: paths that end in .txt or .jsonl, or in either with .gz or .xz; or ``hf:owner/name``.
        fields: which fields of a .jsonl line or a data set row make up the text, joined by line ends.
        document_separator: what stands between two documents of a .txt file. None: blank lines.
            "": nothing, each file is one document.
        limit: stop after this many characters in all; the last document is cut there.

    Raises:
        DataError: a source is missing, a folder, of an unknown kind, damaged, not UTF-8 (with the byte
            offset), lacks a field (with the line number) or holds no text; ``datasets`` isn't installed.
    """
    documents: list[str] = []
    left = limit
    for document in iterate_documents(source, fields, document_separator, streaming=limit is not None):
        documents.append(document[:left])
        if left is not None:
            left -= len(documents[-1])
            if left <= 0:
                break
    return documents


def iterate_documents(
    source: PathLike | Sequence[PathLike],
    fields: str | Sequence[str] = "text",
    document_separator: str | None = None,
    streaming: bool = True,
) -> Iterator[str]:
    """The same, one after another: only one of them lies in memory. Arguments and errors of :func:`read_documents`.

    With ``streaming=False`` a data set of the hub is downloaded first, and kept.
    """
    names = (fields,) if isinstance(fields, str) else tuple(fields)
    for item in _sources(source):
        found = False
        for where, row in _rows_of(item, document_separator, streaming):
            document = row if isinstance(row, str) else join_fields(row, names, where)
            if document.strip():
                found = True
                yield document
        if not found:
            raise DataError(f"expected text in {os.fspath(item)}, found none; the file is empty or blank")


def iterate_rows(source: PathLike | Sequence[PathLike]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of .jsonl files or rows of data sets, each with words that say where it stands.

    Raises:
        DataError: as :func:`read_documents`; a .txt file, or a line that isn't an object.
    """
    for item in _sources(source):
        found = False
        for where, row in _rows_of(item, "", True):
            if not isinstance(row, Mapping):
                raise DataError(
                    f"{where}: expected a JSON object with fields, found {type(row).__name__}; give a .jsonl file, one "
                    "object per line"
                )
            found = True
            yield where, row
        if not found:
            raise DataError(f"expected rows in {os.fspath(item)}, found none; the file is empty")


def _sources(source: PathLike | Sequence[PathLike]) -> list[PathLike]:
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not sources:
        raise DataError("expected at least one text file, found an empty list; pass a path")
    return sources


def split_documents(
    documents: Sequence[str], valid_fraction: float, seed: int
) -> tuple[list[str], list[str]]:
    """Training and validation documents, each in the order of ``documents``.

    Whole documents are drawn with ``seed`` until they hold ``valid_fraction`` of the characters; at least
    one goes to each side. A single document is cut instead: its end is for validation.
    """
    if len(documents) == 1:
        cut = round(len(documents[0]) * (1 - valid_fraction))
        return [documents[0][:cut]], [documents[0][cut:]]
    wanted = valid_fraction * sum(map(len, documents))
    chosen: set[int] = set()
    for index in np.random.default_rng(seed).permutation(len(documents))[1:]:  # one stays for training
        if wanted <= 0:
            break
        chosen.add(int(index))
        wanted -= len(documents[index])
    train = [document for index, document in enumerate(documents) if index not in chosen]
    return train, [documents[index] for index in sorted(chosen)]


def _rows_of(source: PathLike, separator: str | None, streaming: bool) -> Iterator[tuple[str, Any]]:
    """Where each stands, and a JSON value or, in .txt files, a text."""
    name = os.fspath(source)
    if name.startswith(HUB_PREFIX):
        yield from _from_hub(name, streaming)
        return
    path = Path(source)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _OPENERS else ""
    kind = suffixes[-1] if suffixes else ""
    if path.is_dir():
        found = [p.name for p in sorted(path.iterdir()) if {".txt", ".jsonl"} & set(p.suffixes)][:3]
        raise DataError(
            f"expected a text file, found a folder: {path}; pass the files in it as a list"
            + (f", for example {', '.join(found)}" if found else "")
        )
    if not path.exists():
        raise DataError(
            f"expected a text file, found nothing at {path} (from {Path.cwd()}); correct the path"
        )
    if kind not in (".txt", ".jsonl"):
        raise DataError(
            f"expected a name that ends in .txt or .jsonl (or one of these and .gz or .xz), found {path.name}; "
            f"rename the file or convert it to one of these"
        )
    lines = _lines(path, packed)
    if kind == ".jsonl":
        yield from _from_json_lines(path, lines)
    else:
        for text in _from_text(lines, separator):
            yield str(path), text


def _lines(path: Path, packed: str) -> Iterator[str]:
    """The lines of a file, with their ends, decoded; CR LF becomes LF and a byte order mark goes."""
    offset = 0
    try:
        with _OPENERS[packed](path) as stream:
            for raw in stream:
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"expected UTF-8 text in {path}, found byte 0x{raw[error.start]:02x} at byte offset "
                        f"{offset + error.start}{' of the unpacked file' if packed else ''} ({error.reason}); "
                        f"convert it, for example: iconv -f latin1 -t utf-8"
                    ) from error
                yield (line if offset else line.removeprefix("\ufeff")).replace("\r\n", "\n")
                offset += len(raw)
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise DataError(f"expected a whole {packed} file, found a damaged one: {path} ({error})") from error


def _from_text(lines: Iterator[str], separator: str | None) -> Iterator[str]:
    if separator is not None:
        text = "".join(lines)
        yield from (part.strip("\n") for part in text.split(separator)) if separator else [text]
        return
    document: list[str] = []
    for line in lines:
        if line.strip():
            document.append(line)
        elif document:
            yield "".join(document).rstrip("\n")
            document = []
    yield "".join(document).rstrip("\n")


def _from_json_lines(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"expected one JSON object per line in {path}, found on line {number}: {error}; "
                f"repair the line or rename the file to .txt"
            ) from error
        if isinstance(row, str):  # a text is what .txt files hold
            raise DataError(f"{path}, line {number}: expected a JSON object, found str; one object per line")
        yield f"{path}, line {number}", row


def join_fields(row: Any, fields: Sequence[str], where: str) -> str:
    """The text of a row: its fields, joined by line ends.

    Raises:
        DataError: no such fields, or no text in them.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}; one object per line")
    for field in fields:
        if field not in row:
            raise DataError(
                f"{where}: expected a field {field!r}, found {', '.join(map(repr, row)) or 'no field'}; "
                f"name the fields to read with fields=(...)"
            )
        if not isinstance(row[field], str):
            raise DataError(
                f"{where}: expected text in field {field!r}, found {type(row[field]).__name__}; "
                f"choose text fields with fields=(...)"
            )
    text = "\n".join(row[field] for field in fields)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: expected Unicode text, found half a surrogate pair, {text[error.start]!r}; remove it"
        ) from error
    return text


def _from_hub(name: str, streaming: bool) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(
            f"{name} needs the package `datasets`, which isn't installed; run pip install 'codd-ppl[hf]', or "
            f"pass a .txt or .jsonl file"
        ) from error
    address, _, split = name.removeprefix(HUB_PREFIX).partition("@")
    dataset, _, configuration = address.partition(":")
    rows = datasets.load_dataset(dataset, configuration or None, split=split or "train", streaming=streaming)
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row
