"""WikiText's tokens as running text again, so that a model of running text can be judged on them.

WikiText-2 and WikiText-103 (Merity et al. 2016, arXiv:1609.07843) come as tokens between spaces: punctuation stands
alone, " @-@ " joins words, " @,@ " and " @.@ " are inside numbers, quotes have spaces on both sides. ``<unk>`` stays.
"""

from __future__ import annotations

import re

__all__ = ["detokenize_wikitext", "wikitext_words"]

_JOINED = re.compile(r" @([-,.])@ ")
_BEFORE = re.compile(r" ([,.;:!?)\]%°])(?=[\s\"')\],.;:!?]|$)")
_AFTER = re.compile(r"(?<![^\s(\[\"])([(\[$£]) ")
_SUFFIX = re.compile(r" '(s|t|re|ve|m|ll|d)\b")
_POSSESSIVE = re.compile(r"(?<=s) '(?=[\s,.;:!?]|$)")
_QUOTED = {mark: re.compile(rf"(?:(?<=\s)|^){mark} (.+?) {mark}(?=[\s,.;:!?)]|$)") for mark in ('"', "'")}
_SLASH = re.compile(r"(?<=\w) / (?=\w)")


def detokenize_wikitext(text: str) -> str:
    """Running text of WikiText's tokens, line by line; a heuristic where a token could stand for two things."""
    return "\n".join(_line(line) for line in text.split("\n"))


def wikitext_words(text: str) -> int:
    """Number of tokens as perplexities on WikiText are divided by: those between spaces, and one for each line's end.

    245,569 for the test split of WikiText-2 and WikiText-103.
    """
    return len(text.split()) + text.count("\n") + (not text.endswith("\n") and bool(text))


def _line(line: str) -> str:
    line = line.strip()
    line = _JOINED.sub(r"\1", line)
    line = _SUFFIX.sub(r"'\1", line)
    line = _QUOTED['"'].sub(r'"\1"', line)
    line = _POSSESSIVE.sub("'", line)
    line = _QUOTED["'"].sub(r"'\1'", line)
    line = _SLASH.sub("/", line)
    line = _AFTER.sub(r"\1", line)
    while (shorter := _BEFORE.sub(r"\1", line)) != line:  # several marks in a row
        line = shorter
    return line
