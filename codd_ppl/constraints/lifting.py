"""From bytes to tokens: token ids grouped by what they do to the automaton's state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codd_ppl.constraints.utf8 import DEAD, ByteAutomaton
from codd_ppl.errors import ConfigError

__all__ = ["TokenAutomaton", "lift"]


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """A deterministic automaton over token ids, in classes; it starts in state 0.

    Two tokens are of one class when they lead from every state to the same one. So the table is (classes x states),
    whatever the vocabulary.

    Attributes:
        class_of: (vocab,) class of each token.
        following: (classes, states) next state, -1 where the token is impossible.
        accepting: (states,).
    """

    class_of: NDArray[np.int64]
    following: NDArray[np.int64]
    accepting: NDArray[np.bool_]


def lift(automaton: ByteAutomaton, tokens: Sequence[bytes | None], end: int | None = None) -> TokenAutomaton:
    """The automaton that reads the bytes of each token at once (Willard and Louf 2023, arXiv:2307.09702, section 4).

    All tokens are read in step, byte by byte, and those that did the same so far are followed as one.

    Args:
        automaton: over bytes.
        tokens: the bytes of each id; None: it is no text, and impossible.
        end: an id that ends the text: possible where the automaton accepts, and only the same id may follow.

    Raises:
        ConfigError: an ``end`` outside the vocabulary.
    """
    if end is not None and not 0 <= end < len(tokens):
        raise ConfigError(f"end: expected a token id from 0 to {len(tokens) - 1}, found {end}")
    states = len(automaton.table)
    table = np.concatenate((automaton.table, np.full((1, 256), DEAD)))  # -1 reads the last row: it stays dead
    functions = [np.arange(states), np.full(states, DEAD)]
    known = {f.tobytes(): i for i, f in enumerate(functions)}
    text = [b"" if t is None else t for t in tokens]
    lengths = np.array([len(t) for t in text])
    current = np.array([int(t is None) for t in tokens], np.int64)
    for place in range(int(lengths.max(initial=0))):
        active = (lengths > place).nonzero()[0]
        byte = np.fromiter((text[i][place] for i in active.tolist()), np.int64, len(active))
        pairs, which = np.unique(current[active] * 256 + byte, return_inverse=True)
        new = np.empty(len(pairs), np.int64)
        for k, pair in enumerate(pairs.tolist()):
            function = table[functions[pair // 256], pair % 256]
            new[k] = known.setdefault(function.tobytes(), len(functions))
            if new[k] == len(functions):
                functions.append(function)
        current[active] = new[which.reshape(-1)]
    following = np.stack(functions)
    accepting = automaton.accepting
    if end is not None:  # one more state: the text is over
        following = np.concatenate((following, np.full((len(following), 1), DEAD)), 1)
        over = np.where(np.append(accepting, True), states, DEAD)
        following, accepting = np.concatenate((following, over[None])), np.append(accepting, True)
        current[end] = len(functions)
    used, class_of = np.unique(current, return_inverse=True)
    return TokenAutomaton(class_of.reshape(-1), following[used], accepting)
