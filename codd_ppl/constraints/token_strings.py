"""The bytes that each token of a tokenizer stands for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from codd_ppl.errors import ConfigError

__all__ = ["token_bytes"]


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes | None]:
    """Token id -> its bytes, so that a text is the bytes of its tokens put together; None: it stands for no text.

    Args:
        tokenizer: a ``tokenizers.Tokenizer`` (or what has one as ``backend_tokenizer``, as fast tokenizers of
            transformers do) whose decoder only joins tokens: characters (Fuse), byte level, metaspace with or without
            byte fallback. Or the tokens themselves: str, bytes or None for each id. The space that some decoders take
            off the beginning of a text is kept.
        vocab_size: ids of the model; those that the tokenizer doesn't know stand for no text.

    Raises:
        ConfigError: a decoder that does more than join, or more tokens than ``vocab_size``.
    """
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(tokenizer, Tokenizer):
        found = _of_tokenizer(tokenizer)
    elif isinstance(tokenizer, Sequence) and not isinstance(tokenizer, str | bytes):
        given = (t.encode() if isinstance(t, str) else t for t in tokenizer)
        found = {i: t for i, t in enumerate(given) if t is not None}
    else:
        raise ConfigError(
            f"tokenizer: expected a tokenizers.Tokenizer or a list with the text of each token id, found "
            f"{type(tokenizer).__name__}"
        )
    if found and max(found) >= vocab_size:
        raise ConfigError(
            f"tokenizer: expected ids below {vocab_size}, the coupling's vocab_size, found {max(found)}; give the "
            "tokenizer that the model was trained with"
        )
    return [found.get(i) for i in range(vocab_size)]


def _of_tokenizer(tokenizer: Tokenizer) -> dict[int, bytes]:
    description = json.loads(tokenizer.to_str())
    decoder = description.get("decoder")
    kinds = _kinds(decoder)
    special = {t["id"] for t in description.get("added_tokens", ()) if t.get("special")}
    added = {t["id"] for t in description.get("added_tokens", ())}
    if "ByteLevel" in kinds:
        spell = _byte_level()
    elif kinds and kinds <= {"Fuse", "ByteFallback", "Strip", "Metaspace", "Replace"}:
        spaces = _spaces(decoder)
        fallback = "ByteFallback" in kinds

        def spell(token: str) -> bytes:
            if fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            for old, new in spaces:
                token = token.replace(old, new)
            return token.encode()
    else:
        name = "no decoder, which puts spaces between tokens" if decoder is None else sorted(kinds)
        raise ConfigError(
            f"tokenizer: expected a decoder that joins tokens (Fuse, ByteLevel, Metaspace, ByteFallback), found "
            f"{name}; give a list with the text of each token id instead"
        )
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return {i: token.encode() if i in added else spell(token) for token, i in ids.items() if i not in special}


def _kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return {part["type"] for part in parts}


def _spaces(decoder: dict[str, Any]) -> list[tuple[str, str]]:
    """What the decoder replaces within a token."""
    result = []
    for part in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        if part["type"] == "Metaspace":
            result.append((part.get("replacement", "\u2581"), " "))
        elif part["type"] == "Replace":
            if "String" not in part["pattern"]:
                raise ConfigError(
                    f"tokenizer: expected a decoder that replaces strings, found the pattern {part['pattern']}; give a "
                    "list with the text of each token id instead"
                )
            result.append((part["pattern"]["String"], part["content"]))
    return result


def _byte_level() -> Any:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in own]
    table = {chr(b): b for b in own} | {chr(0x100 + k): b for k, b in enumerate(others)}
    return lambda token: bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
