"""Regular expressions as automata: the seam to ``interegular``, which parses Python's syntax.

The only file that imports it.
"""

from __future__ import annotations

import random
import re
from time import perf_counter

import interegular
import numpy as np
from interegular.fsm import anything_else

from codd_ppl.constraints.automaton import Automaton
from codd_ppl.errors import ConfigError

__all__ = ["from_pattern"]

_CODE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2})")
_LOOK = re.compile(r"\(\?<?[=!]|\(\?\(|\(\?>|[*+?}]\+")
CHECKS = 200
"""So many texts are read by ``re``, too, before an automaton is trusted, short ones first."""

PATIENCE = 0.5
"""Seconds that this may take: some patterns cost ``re`` a time that is exponential in the text."""


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
    plain, skeleton = _plain(_unanchored(pattern))
    look = _LOOK.search(skeleton)
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
    automaton = Automaton(starts, np.stack([columns[key] for key in keys], 1), accepting).minimized()
    _check(pattern, automaton)
    return automaton


def _check(pattern: str, automaton: Automaton) -> None:
    """Compare with ``re`` on random texts that the automaton accepts, and on such texts with one character changed."""
    chooser, live = random.Random(0), automaton.live
    if not live[0]:
        return
    stops = [*automaton.starts[1:].tolist(), 0x110000]
    ranges = list(zip(automaton.starts.tolist(), stops, strict=True))
    readings = [re.compile(pattern, flags) for flags in (re.ASCII, re.UNICODE)]

    def character(column: int) -> str:
        low, high = ranges[column]
        point = chooser.randrange(low, min(high, low + 64))
        return chr(point) if not 0xD800 <= point < 0xE000 else chr(low - 1)

    end = perf_counter() + PATIENCE
    for check in range(CHECKS):
        if perf_counter() > end:
            return
        state, text = 0, ""
        while len(text) < 1 + 12 * check // CHECKS and not (
            automaton.accepting[state] and chooser.random() < 0.3
        ):
            columns = live[automaton.table[state]].nonzero()[0].tolist()
            if not columns:
                break
            column = chooser.choice(columns)
            text += character(column)
            state = int(automaton.table[state, column])
        place, other = chooser.randint(0, len(text)), character(chooser.randrange(len(ranges)))
        for candidate in (text, text[:place] + other + text[place + chooser.randint(0, 1) :]):
            verdict = automaton.accepts(candidate)
            if verdict not in [reading.fullmatch(candidate) is not None for reading in readings]:
                raise _unsupported(
                    pattern, f"it would {'' if verdict else 'not '}match {candidate!r}, unlike re"
                )


def _unanchored(pattern: str) -> str:
    """Without ^ at the beginning and $ at the end: the whole text is matched anyway."""
    pattern = pattern.removeprefix("^").removeprefix(r"\A")
    for end in (r"\Z", "$"):
        if pattern.endswith(end):
            head = pattern[: -len(end)]
            if (len(head) - len(head.rstrip("\\"))) % 2 == 0:
                return head
    return pattern


def _plain(pattern: str) -> tuple[str, str]:
    """The pattern with code points for their escapes and every bracket in a class escaped, and its skeleton.

    The skeleton has one letter for each class and each escape, so that what looks like syntax there is syntax.
    """
    plain, skeleton, place = "", "", 0

    def escape() -> str:
        code = _CODE.match(pattern, place)
        if code is None:
            return pattern[place : place + 2]
        return code[0]

    while place < len(pattern):
        if pattern[place] == "\\":
            plain, skeleton, place = plain + _literal(escape()), skeleton + "E", place + len(escape())
        elif pattern[place] == "[":
            start = place + (2 if pattern[place + 1 : place + 2] == "^" else 1)
            plain, skeleton, place = plain + pattern[place:start], skeleton + "C", start
            while place == start or pattern[place] != "]":
                if pattern[place] == "\\":
                    plain, place = plain + _literal(escape()), place + len(escape())
                else:
                    character = pattern[place]
                    plain, place = plain + ("\\" + character if character in "[]" else character), place + 1
            plain, place = plain + "]", place + 1
        else:
            plain, skeleton, place = plain + pattern[place], skeleton + pattern[place], place + 1
    return plain, skeleton


def _literal(escape: str) -> str:
    """The character that a code point's escape means, itself escaped where that may matter; others as they are."""
    if len(escape) == 2:
        return escape if escape.isascii() else escape[1]
    character = chr(int(escape[2:], 16))
    return (
        "\\" + character
        if character.isascii() and character.isprintable() and not character.isalnum()
        else character
    )


def _unsupported(pattern: str, found: str) -> ConfigError:
    return ConfigError(
        f"regex: {pattern!r} has what a finite automaton can't follow or is not supported: {found}. Expected "
        "characters, classes, groups, |, repetitions and the flags (?i), (?s); say the rest with contains, forbids, "
        "length and &, |, ~"
    )
