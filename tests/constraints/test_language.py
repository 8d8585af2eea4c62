"""Languages against Python's own re and str, on all short texts over a small alphabet."""

import itertools
import random
import re

import pytest

from codd_ppl import constraints
from codd_ppl.constraints.automaton import Automaton, containing, of_length, one_of
from codd_ppl.constraints.patterns import from_pattern
from codd_ppl.constraints.utf8 import byte_automaton
from codd_ppl.errors import ConfigError

TEXTS = ["".join(t) for n in range(5) for t in itertools.product("ab1 \né", repeat=n)]

PATTERNS = [
    r"", r"a", r"a*", r"(a|b)+", r"[ab]{2,3}", r"a{,2}b?", r".*", r"(?s).*", r"[^a]*", r"[^\n]+", r"\d+", r"\D*",
    r"\w\W", r"\s\S*", r"(?:ab|1)*", r"(?P<x>a)b", r"a|b|", r"(a*)*b", r"(?i:A)b*", r"\x61\u00e9?", r"[\x61-\x62]+",
    r"^a+$", r"\Aab\Z", r"a\$", r"[]a]+", r"[^]a]+", r"[a\-b]*", r"(?:a|ab)(?:b|)", r"a*?b+?", r"(?s)a.b",
    r"\é+", r"[\w\s]{4}", r"[^]\]a]{2}", r"(?:a{1}){2}?",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_means_what_python_says(pattern: str) -> None:
    automaton = from_pattern(pattern)
    wrong = [t for t in TEXTS if automaton.accepts(t) != bool(re.fullmatch(pattern, t, re.ASCII))]
    assert not wrong, wrong[:5]


@pytest.mark.parametrize(
    ("constraint", "truth"),
    [
        (constraints.contains("aba"), lambda t: "aba" in t),
        (constraints.contains(["ab", "ba"]), lambda t: "ab" in t and "ba" in t),
        (constraints.forbids(["aa", "1"]), lambda t: "aa" not in t and "1" not in t),
        (constraints.one_of(["a", "ab", "ab1", ""]), lambda t: t in ("a", "ab", "ab1", "")),
        (constraints.length(2, 3), lambda t: 2 <= len(t) <= 3),
        (constraints.length(2), lambda t: len(t) >= 2),
        (constraints.length(0, 0), lambda t: t == ""),
        (~constraints.length(1, 2), lambda t: not 1 <= len(t) <= 2),
        (
            constraints.regex("a.*") & constraints.contains("b"),
            lambda t: bool(re.fullmatch("a.*b.*|a.*b", t)),
        ),
        (constraints.regex("a+") | constraints.regex("b+"), lambda t: bool(re.fullmatch("a+|b+", t))),
        (~(constraints.contains("a") | constraints.contains("é")), lambda t: "a" not in t and "é" not in t),
    ],
    ids=lambda value: str(value) if isinstance(value, constraints.Constraint) else "",
)
def test_words_lengths_and_set_operations(constraint: constraints.Constraint, truth) -> None:  # type: ignore[no-untyped-def]
    wrong = [t for t in TEXTS if constraint.accepts(t) != truth(t)]
    assert not wrong, wrong[:5]


@pytest.mark.slow
@pytest.mark.ci
def test_a_pattern_that_is_slow_in_python_is_read_all_the_same() -> None:
    constraint = constraints.regex(r"((?:(1{2,}|\D{,2}){,2}){1,2}|){2,}")
    assert constraint.accepts("11a") and not constraint.accepts("1")


def test_automata_are_minimal() -> None:
    assert containing("abab").states == 5
    assert of_length(2, 4).minimized().states == 6
    assert of_length(3, None).minimized().states == 4
    assert one_of(["ab", "cb"]).states == 4  # start, one character read, both read, sink
    assert from_pattern("(a|b)*abb").states == 5  # the dragon book's four, and a sink
    same = from_pattern("(ab)*").union(from_pattern("(ab)+"))
    assert same.states == from_pattern("(ab)*").states


def test_accepted_bytes_are_the_encoding_of_accepted_texts() -> None:
    """Edges of every length of UTF-8; nothing overlong, no surrogate, nothing beyond Unicode, nothing cut off."""
    automaton = from_pattern("[^a\u00e9-\u0fff]*x?")
    machine = byte_automaton(automaton)

    def accepts(text: bytes) -> bool:
        state = 0
        for byte in text:
            state = int(machine.table[state, byte])
            if state < 0:
                return False
        return bool(machine.accepting[state])

    edges = "ax\x7f\x80\u00e8\u00e9\u07ff\u0800\u0fff\u1000\ud7ff\ue000\uffff\U00010000\U0010ffff"
    for text in itertools.product(edges, repeat=2):
        assert accepts("".join(text).encode()) == automaton.accepts("".join(text)), ascii(text)
    chooser = random.Random(0)
    parts = [0x41, 0x80, 0xBF, 0xC1, 0xC2, 0xE0, 0x9F, 0xA0, 0xED, 0xEF, 0xF0, 0x90, 0x8F, 0xF4, 0xF5]
    machine, seen = byte_automaton(from_pattern("(?s).*")), set[bool]()
    for _ in range(20_000):
        raw = bytes(chooser.choices(parts, k=chooser.randint(0, 4)))
        try:
            raw.decode()
            valid = True
        except UnicodeDecodeError:
            valid = False
        seen.add(valid)
        assert accepts(raw) == valid, raw
    assert seen == {True, False}


@pytest.mark.parametrize(
    "pattern",
    [r"a(?=b)", r"(?<!a)b", r"(a)\1", r"\bab\b", r"a^b", r"(?>a)b", r"a*+", r"(a)?(?(1)b|a)", r"(?m)a"],
)
def test_what_is_no_regular_language_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"automaton can't follow.*Expected characters"):
        constraints.regex(pattern)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: constraints.regex("(a"), "correct it"),
        (lambda: constraints.contains([]), "at least one character"),
        (lambda: constraints.forbids(["a", ""]), "at least one character"),
        (lambda: constraints.one_of("yes"), "expected a list"),
        (lambda: constraints.length(3, 2), "minimum <= maximum"),
        (lambda: constraints.regex("a", span=(0, 2)) | constraints.regex("b"), "the same span"),
        (lambda: ~(constraints.regex("a", span=(0, 2)) & constraints.regex("b")), "over one span"),
    ],
)
def test_errors_teach(make, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=said):
        make()


def test_a_message_names_the_constraint() -> None:
    both = constraints.regex("a+", span=(0, 3)) & constraints.forbids("b") & constraints.length(1, 2)
    assert str(both) == "regex('a+', span=(0, 3)) & forbids(['b']) & length(1, 2)"
    assert len(both.clauses) == 2 and isinstance(both.clauses[0].automaton, Automaton)
