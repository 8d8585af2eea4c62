"""Finite automata over characters, and the set operations on their languages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Automaton", "containing", "of_length", "one_of"]

Array = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Automaton:
    """A complete deterministic automaton over code points; it starts in state 0.

    Attributes:
        starts: (ranges,) ascending, from 0: range k holds the code points from starts[k] up to the next.
        table: (states, ranges) next state.
        accepting: (states,) where a text may end.
    """

    starts: Array
    table: Array
    accepting: Flags

    @property
    def states(self) -> int:
        """Number of states, a sink included."""
        return len(self.table)

    @property
    def live(self) -> Flags:
        """(states,) from where an accepting state can be reached."""
        live = self.accepting.copy()
        while True:
            more = live | live[self.table].any(1)
            if bool((more == live).all()):
                return live
            live = more

    def following(self, state: int, character: str) -> int:
        """The state after reading a character."""
        return int(self.table[state, np.searchsorted(self.starts, ord(character), side="right") - 1])

    def accepts(self, text: str) -> bool:
        """Whether the text is in the language."""
        state = 0
        for character in text:
            state = self.following(state, character)
        return bool(self.accepting[state])

    def complement(self) -> Automaton:
        """All other texts."""
        return Automaton(self.starts, self.table, ~self.accepting)

    def intersection(self, other: Automaton) -> Automaton:
        """The texts of both."""
        return self._product(other, union=False)

    def union(self, other: Automaton) -> Automaton:
        """The texts of either."""
        return self._product(other, union=True)

    def _product(self, other: Automaton, union: bool) -> Automaton:
        starts = np.union1d(self.starts, other.starts)
        left, right = self._refined(starts), other._refined(starts)
        found, frontier, rows = np.zeros(1, np.int64), np.zeros(1, np.int64), list[Array]()
        pairs = [frontier]
        while len(frontier):
            a, b = np.divmod(frontier, other.states)
            following = left[a] * other.states + right[b]
            rows.append(following)
            frontier = np.setdiff1d(following, found)
            found = np.union1d(found, frontier)
            pairs.append(frontier)
        codes = np.concatenate(pairs)  # in the order in which they were found: the start is the first
        order = np.argsort(codes)
        table = order[np.searchsorted(codes[order], np.concatenate(rows))]
        a, b = np.divmod(codes, other.states)
        one, two = self.accepting[a], other.accepting[b]
        return Automaton(starts, table, (one | two) if union else (one & two)).minimized()

    def _refined(self, starts: Array) -> Array:
        return self.table[:, np.searchsorted(self.starts, starts, side="right") - 1]

    def minimized(self) -> Automaton:
        """The smallest automaton of the same language (Moore 1956), ranges that never differ joined."""
        reached = np.zeros(self.states, bool)
        frontier = np.zeros(1, np.int64)
        while len(frontier):
            reached[frontier] = True
            following = np.unique(self.table[frontier])
            frontier = following[~reached[following]]
        states = reached.nonzero()[0]
        place = np.cumsum(reached) - 1
        table, accepting = place[self.table[states]], self.accepting[states]
        block, first, count = accepting.astype(np.int64), states, 0
        while True:
            code = block
            for column in table.T:  # one number at a time: much faster than whole rows
                _, first, code = np.unique(
                    code * len(table) + block[column], return_index=True, return_inverse=True
                )
            block = code.reshape(-1)
            if len(first) == count:
                break
            count = len(first)
        rank = np.argsort(np.argsort(first))  # blocks in the order of their first state: the start's is 0
        block, first = rank[block], np.sort(first)
        table, accepting = block[table[first]], accepting[first]
        keep = np.concatenate(([True], (table[:, 1:] != table[:, :-1]).any(0)))
        return Automaton(self.starts[keep], table[:, keep], accepting)


def _from_rows(
    characters: Iterable[str], rows: list[dict[str, int]], other: list[int]
) -> tuple[Array, Array]:
    """Ranges and table from each state's next state by character, and that of all other characters."""
    points = sorted({ord(c) for c in characters})
    starts = np.unique(np.array([0, *points, *(p + 1 for p in points)], np.int64))
    table = np.repeat(np.array(other, np.int64)[:, None], len(starts), 1)
    column = {chr(p): int(np.searchsorted(starts, p)) for p in points}
    for state, row in enumerate(rows):
        for character, target in row.items():
            table[state, column[character]] = target
    return starts, table


def containing(word: str) -> Automaton:
    """Texts in which the word occurs (Knuth, Morris and Pratt 1977)."""
    rows = list[dict[str, int]]()
    for matched in range(len(word)):
        row = dict[str, int]()
        for character in set(word):
            seen = word[:matched] + character
            row[character] = next(k for k in range(len(seen), -1, -1) if seen.endswith(word[:k]))
        rows.append(row)
    rows.append({})
    starts, table = _from_rows(word, rows, [*[0] * len(word), len(word)])
    return Automaton(starts, table, np.arange(len(word) + 1) == len(word)).minimized()


def one_of(texts: Iterable[str]) -> Automaton:
    """These texts and no other."""
    sink = 1
    rows, ends = [dict[str, int](), dict[str, int]()], set[int]()
    for text in texts:
        state = 0
        for character in text:
            state = rows[state].setdefault(character, len(rows))
            if state == len(rows):
                rows.append({})
        ends.add(state)
    starts, table = _from_rows({c for row in rows for c in row}, rows, [sink] * len(rows))
    return Automaton(starts, table, np.isin(np.arange(len(rows)), list(ends))).minimized()


def of_length(least: int, most: int | None) -> Automaton:
    """Texts of ``least`` to ``most`` characters (None: any number)."""
    last = least if most is None else most + 1
    states = np.arange(last + 1)
    table = np.minimum(states + 1, last)[:, None]
    accepting = states >= least if most is None else (states >= least) & (states <= most)
    return Automaton(np.zeros(1, np.int64), table, accepting)
