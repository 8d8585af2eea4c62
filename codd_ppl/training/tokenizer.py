"""Tokenizers: characters, bytes and byte-pair encoding, each a ``tokenizers.Tokenizer``.

All three give back the text when they decode, and need no special tokens: the mask is one id beyond the
vocabulary, which the denoiser adds. A tokenizer is complete in its ``tokenizer.json``, normalisation
included, so that the file alone is enough to encode a prompt.
"""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from codd_ppl.errors import ConfigError, DataError
from codd_ppl.typing import Int, Tensor

__all__ = [
    "UNKNOWN",
    "build_tokenizer",
    "cached_tokenizer",
    "default_cache_dir",
    "encode_documents",
    "read_tokenizer",
    "text8_normalizer",
]

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""The token of a character outside the vocabulary, and what it looks like when decoded."""

_TEXT8 = " abcdefghijklmnopqrstuvwxyz"
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CHUNK = 1_000_000  # characters that are encoded at once


def text8_normalizer() -> normalizers.Normalizer:
    """Only a to z and single spaces are left, as in text8: lower case, each digit spelled out.

    Source: Matt Mahoney, http://mattmahoney.net/dc/textdata.html
    """
    return normalizers.Sequence(
        [
            normalizers.Lowercase(),
            *(normalizers.Replace(str(digit), f" {word} ") for digit, word in enumerate(_DIGITS)),
            normalizers.Replace(Regex("[^a-z]+"), " "),
        ]
    )


def build_tokenizer(
    kind: str, documents: Sequence[str], vocab_size: int | None = None, normalize: str | None = None
) -> Tokenizer:
    """A tokenizer for these documents, which must be those of the training split.

    ``kind`` is one of

    - ``"char"``: one token per character. The vocabulary is :data:`UNKNOWN` and the ``vocab_size - 1``
      (default 255) most frequent characters, in the order of their code points; any rarer or unseen
      character becomes ``UNKNOWN``. With ``normalize="text8"`` it is the space and a to z: 27, whatever
      the text.
    - ``"byte"``: one token per UTF-8 byte, and its id is the byte: 256, whatever the text.
    - ``"bpe"``: byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) with
      ``vocab_size`` (default 1024) tokens, fewer if the text has fewer pairs to merge.

    Raises:
        ConfigError: unknown ``kind`` or ``normalize``; a ``vocab_size`` for bytes other than 256.
        DataError: ``vocab_size`` too small: char below 2 (text8: 27), bpe below 257.
    """
    if normalize not in (None, "text8"):
        raise ConfigError(f'expected normalize to be None or "text8", found {normalize!r}')
    if kind == "char":
        tokenizer = _characters(documents, vocab_size, fixed=normalize == "text8")
    elif kind == "byte":
        if vocab_size not in (None, 256):
            raise ConfigError(f"expected vocab_size 256 or None for bytes, found {vocab_size}; leave it out")
        tokenizer = _bytes()
    elif kind == "bpe":
        tokenizer = _byte_pairs(documents, 1024 if vocab_size is None else vocab_size)
    else:
        raise ConfigError(
            f'expected tokenizer "char", "byte" or "bpe", the path of a tokenizer.json, or a '
            f"tokenizers.Tokenizer, found {kind!r}"
        )
    if normalize:
        tokenizer.normalizer = text8_normalizer()
    return tokenizer


def _smallest(vocab_size: int, least: int, kind: str) -> None:
    if vocab_size < least:
        raise DataError(
            f"vocabulary too small: expected vocab_size >= {least} for {kind}, found {vocab_size}; raise vocab_size"
        )


def _characters(documents: Sequence[str], vocab_size: int | None, fixed: bool) -> Tokenizer:
    if fixed:
        _smallest(
            len(_TEXT8) if vocab_size is None else vocab_size, len(_TEXT8), 'char with normalize="text8"'
        )
        vocabulary, unknown = list(_TEXT8), " "
    else:
        vocab_size = 256 if vocab_size is None else vocab_size
        _smallest(vocab_size, 2, "char")
        counts: Counter[str] = Counter()
        for document in documents:
            counts.update(document)
        counts["\n"] += 1  # stands between documents
        del counts[UNKNOWN]
        frequent = sorted(counts, key=lambda character: (-counts[character], character))
        vocabulary, unknown = [UNKNOWN, *sorted(frequent[: vocab_size - 1])], UNKNOWN
    ids = {character: number for number, character in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _bytes() -> Tokenizer:
    # the byte-level alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and on
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(character for character in alphabet if ord(character) > 255))
    ids = {(chr(byte) if chr(byte) in alphabet else next(others)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_pairs(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    _smallest(vocab_size, 257, "bpe (256 bytes and at least one pair)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def default_cache_dir() -> Path:
    """The user's cache folder for tokenizers: ``$XDG_CACHE_HOME/codd_ppl``, else ``~/.cache/codd_ppl``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codd_ppl"


def cached_tokenizer(
    cache_dir: str | os.PathLike[str],
    kind: str,
    documents: Sequence[str],
    vocab_size: int | None = None,
    normalize: str | None = None,
) -> Tokenizer:
    """As :func:`build_tokenizer`, but kept in ``cache_dir/<key>/tokenizer.json``.

    The key is a hash of the documents, the settings and the version of ``tokenizers``. The file is
    written under another name and then renamed, so that several processes may do this at the same time.

    Raises:
        OSError: ``cache_dir`` can't be written.
    """
    key = hashlib.sha256(repr((kind, vocab_size, normalize, tokenizers.__version__)).encode())
    for document in documents:
        text = document.encode("utf-8")
        key.update(len(text).to_bytes(8, "little") + text)
    path = Path(cache_dir) / key.hexdigest()[:32] / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(str(path))
    tokenizer = build_tokenizer(kind, documents, vocab_size, normalize)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(tokenizer.to_str())
    os.replace(file.name, path)
    return tokenizer


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``.

    Raises:
        DataError: no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise DataError(f"expected a tokenizer.json, found no file at {path}; correct the path")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no other class
        raise DataError(f"{path}: expected a tokenizer.json, but {error}; give another file") from error


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str], separator: str) -> Int[Tensor, "tokens"]:
    """The ids of all documents in one row, the ids of ``separator`` after each; int64."""
    between = tokenizer.encode(separator, add_special_tokens=False).ids
    parts = [np.zeros(0, dtype=np.int64)]
    for chunk in _chunks(documents):
        for encoding in tokenizer.encode_batch_fast(chunk, add_special_tokens=False):
            parts.append(np.array(encoding.ids + between, dtype=np.int64))
    return torch.from_numpy(np.concatenate(parts))


def _chunks(documents: Sequence[str]) -> Iterator[list[str]]:
    """Runs of documents of about ``_CHUNK`` characters, so that the encodings of all never lie in memory."""
    chunk: list[str] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
