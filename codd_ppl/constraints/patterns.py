"""Regular expressions as automata: the seam to ``interegular``, which parses Python's syntax.

The only file that imports it.
"""

from __future__ import annotations

import re

import interegular
import numpy as np
from interegular.fsm import anything_else

from codd_ppl.constraints.automaton import Automaton
from codd_ppl.errors import ConfigError

__all__ = ["from_pattern"]

_ESCAPED = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_CLASS = re.compile(r"\[\^?\]?[^\]]*\]")
_LOOK = re.compile(r"\(\?<?[=!]|\(\?\(|\(\?>|[*+?}]\+")


def from_pattern(pattern: str) -> Automaton:
    """The texts that a regular expression matches as a whole, as ``re.fullmatch(pattern, text, re.ASCII)``.

    Raises:
        ConfigError: a syntax error, or something that is no regular language or not supported: references, look-around,
            word boundaries, flags other than i and s, anchors inside.
    """
    try:
        re.compile(pattern, re.ASCII)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"regex: expected a regular expression, but {pattern!r}: {error}; correct it"
        ) from None
    plain = _ESCAPED.sub(_unescaped, _unanchored(pattern))
    look = _LOOK.search(_CLASS.sub("C", re.sub(r"\\.", "E", plain, flags=re.DOTALL)))
    if look is not None:
        raise _unsupported(pattern, f"{look[0]!r} (look-around, conditions, atomic and possessive groups)")
    try:
        machine = interegular.parse_pattern(plain).to_fsm()
    except Exception as error:  # it has no common base class
        raise _unsupported(pattern, f"{type(error).__name__}: {error}") from error
    symbols = {symbol: key for key, group in machine.alphabet.by_transition.items() for symbol in group}
    rest = symbols.pop(anything_else, None)
    points = np.array(sorted(ord(symbol) for symbol in symbols), np.int64)
    starts = np.unique(np.concatenate(([0], points, points + 1)))
    present = set(points.tolist())
    keys = [symbols[chr(s)] if s in present else rest for s in starts.tolist()]
    states = [machine.initial, *(s for s in machine.states if s != machine.initial)]
    place, sink = {state: i for i, state in enumerate(states)}, len(states)
    columns = {key: np.full(sink + 1, sink) for key in {*keys}}
    for state, row in machine.map.items():
        for key, target in row.items():
            if key in columns:
                columns[key][place[state]] = place[target]
    accepting = np.array([*(state in machine.finals for state in states), False])
    return Automaton(starts, np.stack([columns[key] for key in keys], 1), accepting).minimized()


def _unanchored(pattern: str) -> str:
    """Without ^ at the beginning and $ at the end: the whole text is matched anyway."""
    pattern = pattern.removeprefix("^").removeprefix(r"\A")
    for end in (r"\Z", "$"):
        if pattern.endswith(end):
            head = pattern[: -len(end)]
            if (len(head) - len(head.rstrip("\\"))) % 2 == 0:
                return head
    return pattern


def _unescaped(match: re.Match[str]) -> str:
    """Code point escapes as the characters that they mean, all others as they are."""
    body = match[1]
    if len(body) == 1:
        return match[0]
    character = chr(int(body[1:], 16))
    return "\\" + character if not character.isalnum() and not character.isspace() else character


def _unsupported(pattern: str, found: str) -> ConfigError:
    return ConfigError(
        f"regex: {pattern!r} has what a finite automaton can't follow or is not supported: {found}. Expected "
        "characters, classes, groups, |, repetitions and the flags (?i), (?s); say the rest with contains, forbids, "
        "length and &, |, ~"
    )
