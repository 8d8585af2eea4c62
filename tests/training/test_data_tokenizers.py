"""Characters, bytes and byte pairs: vocabularies, round trips, text8, and the cache."""

import json
import random
import string
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from tokenizers import Tokenizer

from codd_ppl.errors import ConfigError, DataError
from codd_ppl.training import tokenizer as module
from codd_ppl.training.tokenizer import (
    UNKNOWN,
    build_tokenizer,
    cached_tokenizer,
    default_cache_dir,
    encode_documents,
    text8_normalizer,
)

TEXT = ["the cat sat on the mat\n", "The Cat, 2 mats & a hat: éé 日本"] * 5


def random_texts() -> list[str]:
    """A hundred texts of characters of all planes, many of them ASCII, with runs of white space."""
    draw = random.Random(0)
    ranges = [
        (0, 128),
        (0x80, 0x250),
        (0x2000, 0x2070),
        (0x4E00, 0x4E50),
        (0xFF00, 0x10000),
        (0x1F600, 0x1F650),
    ]
    alphabet = [chr(code) for low, high in ranges for code in range(low, high)] + list(" \n\t019aZ") * 60
    return ["".join(draw.choices(alphabet, k=draw.randrange(30))) for _ in range(100)]


def round_trip(tokenizer: Tokenizer, text: str) -> str:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_training_text_comes_back(kind: str) -> None:
    tokenizer = build_tokenizer(kind, TEXT, vocab_size=300 if kind == "bpe" else None)
    for document in TEXT:
        assert round_trip(tokenizer, document) == document


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_any_text_comes_back(kind: str) -> None:
    tokenizer = build_tokenizer(kind, TEXT, vocab_size=257 if kind == "bpe" else None)
    for text in random_texts():
        assert round_trip(tokenizer, text) == text


def test_one_token_per_character_or_unknown() -> None:
    tokenizer = build_tokenizer("char", TEXT)
    seen = set("".join(TEXT))
    for text in random_texts():
        assert len(tokenizer.encode(text).ids) == len(text)
        assert round_trip(tokenizer, text) == "".join(c if c in seen else UNKNOWN for c in text)


def test_characters_are_in_the_order_of_their_code_points() -> None:
    vocabulary = build_tokenizer("char", ["cab", f"{UNKNOWN} é"]).get_vocab()
    assert vocabulary == {UNKNOWN: 0, "\n": 1, " ": 2, "a": 3, "b": 4, "c": 5, "é": 6}


def test_rare_characters_become_unknown() -> None:
    tokenizer = build_tokenizer("char", ["aaaabbbc\nd\n\n\n"], vocab_size=4)
    assert set(tokenizer.get_vocab()) == {UNKNOWN, "\n", "a", "b"}
    assert round_trip(tokenizer, "abcd") == f"ab{UNKNOWN}{UNKNOWN}"


def test_256_characters_by_default() -> None:
    documents = ["".join(chr(0x4E00 + index) for index in range(400)) + string.ascii_lowercase * 2]
    vocabulary = build_tokenizer("char", documents).get_vocab()
    assert len(vocabulary) == 256 and set(string.ascii_lowercase) < set(vocabulary)


def test_byte_ids_are_bytes() -> None:
    tokenizer = build_tokenizer("byte", [])
    assert tokenizer.get_vocab_size() == 256
    for text in random_texts():
        assert tokenizer.encode(text).ids == list(text.encode())


def test_byte_pairs_shorten_the_text() -> None:
    tokenizer = build_tokenizer("bpe", TEXT, vocab_size=280)
    assert tokenizer.get_vocab_size() == 280
    assert len(tokenizer.encode("the cat").ids) < len("the cat")
    assert build_tokenizer("bpe", TEXT, vocab_size=280).to_str() == tokenizer.to_str()


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_tokenizer_json_is_complete(kind: str) -> None:
    tokenizer = build_tokenizer(kind, TEXT, normalize="text8")
    again = Tokenizer.from_str(tokenizer.to_str())
    assert round_trip(again, "It's 5!") == "it s five "


# --- text8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World", "hello world"),
        ("a\n\n b\t\tc", "a b c"),
        ("in 1984", "in one nine eight four "),
        ("3rd–4th", " three rd four th"),
        ("naïve", "na ve"),
    ],
)
def test_text8(text: str, expected: str) -> None:
    assert text8_normalizer().normalize_str(text) == expected


def test_text8_has_27_symbols_and_single_spaces() -> None:
    normalizer = text8_normalizer()
    for text in random_texts():
        normal = normalizer.normalize_str(text)
        assert set(normal) <= set(string.ascii_lowercase + " ") and "  " not in normal
        assert normalizer.normalize_str(normal) == normal


def test_text8_characters_are_a_fixed_vocabulary() -> None:
    tokenizer = build_tokenizer("char", ["abc"], normalize="text8")
    assert tokenizer.get_vocab() == {c: i for i, c in enumerate(" " + string.ascii_lowercase)}


# --- settings that make no tokenizer ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "vocab_size", "normalize", "least"),
    [("char", 1, None, 2), ("char", 26, "text8", 27), ("bpe", 256, None, 257)],
)
def test_vocabulary_too_small(kind: str, vocab_size: int, normalize: str | None, least: int) -> None:
    message = f"vocabulary too small: expected vocab_size >= {least} for {kind}.* found {vocab_size}"
    with pytest.raises(DataError, match=message):
        build_tokenizer(kind, TEXT, vocab_size, normalize)
    assert build_tokenizer(kind, TEXT, vocab_size + 1, normalize).get_vocab_size() == least


@pytest.mark.parametrize(
    ("kind", "vocab_size", "normalize", "message"),
    [
        ("word", None, None, '"char", "byte" or "bpe".*found \'word\''),
        ("byte", 100, None, "256 or None for bytes, found 100"),
        ("char", None, "lower", "None or \"text8\", found 'lower'"),
    ],
)
def test_unknown_settings(kind: str, vocab_size: int | None, normalize: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(kind, TEXT, vocab_size, normalize)


# --- documents in a row -------------------------------------------------------------------------------


def test_documents_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 3)  # several chunks
    tokens = encode_documents(build_tokenizer("byte", []), ["ab", "", "cdef", "é"], "\n\n")
    assert tokens.dtype == torch.int64
    assert bytes(tokens.tolist()).decode() == "ab\n\n\n\ncdef\n\né\n\n"
    assert encode_documents(build_tokenizer("byte", []), [], "\n").shape == (0,)


# --- the cache ----------------------------------------------------------------------------------------


def test_cache_is_read(tmp_path: Path) -> None:
    first = cached_tokenizer(tmp_path, "bpe", TEXT, 280)
    (file,) = tmp_path.glob("*/tokenizer.json")
    assert Tokenizer.from_file(str(file)).to_str() == first.to_str()
    marked = json.loads(file.read_text(encoding="utf-8")) | {"normalizer": {"type": "Lowercase"}}
    file.write_text(json.dumps(marked), encoding="utf-8")
    assert round_trip(cached_tokenizer(tmp_path, "bpe", TEXT, 280), "ABC") == "abc"


def test_cache_key_covers_text_and_settings(tmp_path: Path) -> None:
    settings = [
        ("bpe", TEXT, 280, None),
        ("bpe", TEXT, 281, None),
        ("bpe", TEXT, 280, "text8"),
        ("char", TEXT, 280, None),
        ("bpe", [*TEXT[:-1], "other"], 280, None),
        ("bpe", ["ab", "c"], 280, None),
        ("bpe", ["a", "bc"], 280, None),
    ]
    for setting in settings:
        cached_tokenizer(tmp_path, *setting)
    assert len(list(tmp_path.glob("*/tokenizer.json"))) == len(settings)


def test_cache_stands_a_race(tmp_path: Path) -> None:
    """Eight at once: the same tokenizer for all, one whole file, nothing left over."""
    barrier = Barrier(8)

    def work(_: int) -> str:
        barrier.wait()
        return cached_tokenizer(tmp_path, "bpe", TEXT, 280).to_str()

    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(work, range(8)))
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert made == {Tokenizer.from_file(str(file)).to_str()}


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "codd_ppl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "codd_ppl"
