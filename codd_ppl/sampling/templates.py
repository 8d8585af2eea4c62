"""Templates: text with places to write, as token ids with mask tokens."""

import re
from collections.abc import Callable

import torch

from codd_ppl.errors import ConfigError
from codd_ppl.typing import Int, Tensor

__all__ = ["encode_template", "parse_template"]

_MARK = re.compile(r"\\([\\\[_])|\[MASK(?::([^\]\[]*))?\]|_")
MOST = 1_000_000
"""Largest number of masks in one place; more is taken for a slip of the pen."""


def parse_template(text: str) -> tuple[str | int, ...]:
    r"""Text and numbers of masks, in reading order.

    ``[MASK]`` or ``_`` is one token to write, ``[MASK:12]`` twelve; ``\[``, ``\_`` and ``\\`` are the characters
    themselves, and any other backslash is a backslash. Neighbouring masks are counted together.

    >>> parse_template("The [MASK:12] sat on")
    ('The ', 12, ' sat on')

    Raises:
        ConfigError: a number of masks that isn't a whole number from 1 to a million.
    """
    pieces: list[str | int] = []
    end = 0
    for mark in _MARK.finditer(text):
        pieces += [text[end : mark.start()], mark[1] if mark[1] else _number(mark[2], mark[0])]
        end = mark.end()
    pieces = [piece for piece in (*pieces, text[end:]) if piece]
    parts: list[str | int] = []
    for piece in pieces:  # neighbours of one kind are one part
        last = parts[-1] if parts else None
        if type(piece) is type(last):
            parts[-1] = last + piece  # type: ignore[operator]
        else:
            parts.append(piece)
    return tuple(parts)


def encode_template(text: str, encode: Callable[[str], list[int]], mask_token_id: int) -> Int[Tensor, " any"]:
    """Token ids of a template, ``mask_token_id`` where to write; see :func:`parse_template`.

    The pieces of text between masks are encoded each on its own.

    Args:
        text: the template.
        encode: text -> ids, of the tokenizer, without special tokens.
        mask_token_id: of the denoiser.

    Raises:
        ConfigError: as :func:`parse_template`.
    """
    ids: list[int] = []
    for part in parse_template(text):
        ids += [mask_token_id] * part if isinstance(part, int) else encode(part)
    return torch.tensor(ids, dtype=torch.int64)


def _number(written: str | None, mark: str) -> int:
    if written is None:
        return 1
    if not written.strip().isdecimal() or not 1 <= int(written) <= MOST:
        raise ConfigError(
            f"{mark}: expected a whole number of tokens from 1 to {MOST:,}, as in [MASK:12]; write \\{mark} where the "
            "text itself says that"
        )
    return int(written)
