"""From characters to bytes: the automaton that reads the UTF-8 encoding of a text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codd_ppl.constraints.automaton import Automaton

__all__ = ["ByteAutomaton", "byte_automaton"]

DEAD = -1
Pieces = tuple[tuple[int, int], ...]
"""A function of the code points that begin with the same bytes: (offset from which it holds, next state)."""


@dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """A deterministic automaton over bytes; it starts in state 0.

    Attributes:
        table: (states, 256) next state, -1 where no text of the language goes on like that.
        accepting: (states,); never within a character.
    """

    table: NDArray[np.int64]
    accepting: NDArray[np.bool_]


def byte_automaton(automaton: Automaton) -> ByteAutomaton:
    """The same language, byte by byte: only complete, well-formed UTF-8 (RFC 3629) is accepted.

    A state within a character is the map from the code points that its bytes still allow to the state behind the
    character; equal maps are one state, so that the automaton grows with the classes of characters, not with Unicode.
    """
    live = automaton.live
    targets = np.where(live[automaton.table], automaton.table, DEAD)
    starts = automaton.starts.tolist()
    states, found = automaton.states, dict[tuple[int, Pieces], int]()
    rows = [np.full(256, DEAD) for _ in range(states)]
    queue = list[tuple[int, int, Pieces]]()

    def cut(pieces: Pieces, low: int, high: int) -> Pieces:
        """The function on [low, high), seen from low, without pieces that change nothing."""
        result = list[tuple[int, int]]()
        for i, (start, target) in enumerate(pieces):
            stop = pieces[i + 1][0] if i + 1 < len(pieces) else high
            if stop > low and start < high and (not result or result[-1][1] != target):
                result.append((max(start, low) - low, target))
        return tuple(result)

    def node(left: int, pieces: Pieces) -> int:
        """The state that has ``left`` more bytes of a character to read."""
        if left == 0 or all(target == DEAD for _, target in pieces):
            return pieces[0][1]
        if (left, pieces) not in found:
            found[left, pieces] = len(rows)
            rows.append(np.full(256, DEAD))
            queue.append((found[left, pieces], left, pieces))
        return found[left, pieces]

    for state in range(states):
        if not live[state]:
            continue
        pieces = tuple(zip(starts, targets[state].tolist(), strict=True))
        for byte in range(0x80):
            rows[state][byte] = cut(pieces, byte, byte + 1)[0][1]
        for byte in range(0xC2, 0xF5):
            left = 1 if byte < 0xE0 else 2 if byte < 0xF0 else 3
            low = (byte - (0xC0, 0xE0, 0xF0)[left - 1]) << (6 * left)
            high = low + (1 << (6 * left))
            first, last = max(low, (0x80, 0x800, 0x10000)[left - 1]), min(high, 0x110000)
            allowed = [(0, DEAD), *((first + s, t) for s, t in cut(pieces, first, last)), (last, DEAD)]
            if byte == 0xED:  # surrogates are no characters
                allowed = [*((s, t) for s, t in allowed if s < 0xD800), (0xD800, DEAD)]
            rows[state][byte] = node(left, cut(tuple(allowed), low, high))
    while queue:
        state, left, pieces = queue.pop()
        width = 1 << (6 * (left - 1))
        for k in range(64):
            rows[state][0x80 + k] = node(left - 1, cut(pieces, k * width, (k + 1) * width))
    accepting = np.zeros(len(rows), bool)
    accepting[:states] = automaton.accepting
    return ByteAutomaton(np.stack(rows), accepting)
