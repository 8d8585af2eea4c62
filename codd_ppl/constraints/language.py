"""What a text must be: languages over stretches of sites, combined with &, | and ~."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from codd_ppl.constraints import automaton as automata
from codd_ppl.constraints.automaton import Automaton
from codd_ppl.constraints.patterns import from_pattern
from codd_ppl.errors import ConfigError

__all__ = ["Clause", "Constraint", "Span", "contains", "forbids", "length", "one_of", "regex"]

Span = tuple[int, int]
"""Sites from the first up to the second, as in ``range``; negative ones count from the end."""


@dataclass(frozen=True, eq=False)
class Clause:
    """The text of one stretch of sites is in one language.

    Attributes:
        automaton: of the language, over characters.
        span: the sites; None: all.
        name: how messages call it.
    """

    automaton: Automaton
    span: Span | None
    name: str

    def sites(self, count: int) -> Span:
        """First site and the one behind the last, among ``count``.

        Raises:
            ConfigError: the span isn't inside.
        """
        if self.span is None:
            return 0, count
        start, stop = (s + count if s < 0 else s for s in self.span)
        if not 0 <= start < stop <= count:
            raise ConfigError(
                f"{self.name}: expected span=(start, stop) with 0 <= start < stop <= {count}, the sites of the graph, "
                f"found {self.span}"
            )
        return start, stop


@dataclass(frozen=True, eq=False)
class Constraint:
    """Clauses that all hold; made by :func:`regex`, :func:`contains`, .. and by ``&``, ``|``, ``~``.

    ``a & b``: both, over any spans. ``a | b``: one of them at least, and ``~a``: not a, both for a single span.
    """

    clauses: tuple[Clause, ...]

    def __and__(self, other: Constraint) -> Constraint:
        """Both; clauses over the same sites become one automaton."""
        if not isinstance(other, Constraint):
            return NotImplemented
        clauses = list(self.clauses)
        for new in other.clauses:
            same = next((i for i, old in enumerate(clauses) if old.span == new.span), None)
            if same is None:
                clauses.append(new)
            else:
                old = clauses[same]
                both = old.automaton.intersection(new.automaton)
                clauses[same] = Clause(both, old.span, f"{old.name} & {new.name}")
        return Constraint(tuple(clauses))

    def __or__(self, other: Constraint) -> Constraint:
        """Either.

        Raises:
            ConfigError: more than one span.
        """
        if not isinstance(other, Constraint):
            return NotImplemented
        one, two = self._single("|"), other._single("|")
        if one.span != two.span:
            raise ConfigError(
                f"|: expected constraints over the same sites, found spans {one.span} and {two.span} ({one.name} and "
                f"{two.name}); give both the same span"
            )
        name = f"({one.name} | {two.name})"
        return Constraint((Clause(one.automaton.union(two.automaton), one.span, name),))

    def __invert__(self) -> Constraint:
        """Any other text.

        Raises:
            ConfigError: more than one span.
        """
        clause = self._single("~")
        return Constraint((Clause(clause.automaton.complement(), clause.span, f"~({clause.name})"),))

    def _single(self, operator: str) -> Clause:
        if len(self.clauses) != 1:
            raise ConfigError(
                f"{operator}: expected a constraint over one span, found {self}; apply {operator} to its parts first"
            )
        return self.clauses[0]

    def accepts(self, text: str) -> bool:
        """Whether a whole text satisfies the constraint.

        Raises:
            ConfigError: clauses over other spans than all sites, for which the text alone doesn't say enough.
        """
        clause = self._single("accepts")
        return clause.automaton.accepts(text)

    def __str__(self) -> str:
        return " & ".join(clause.name for clause in self.clauses)

    def __repr__(self) -> str:
        states = " + ".join(str(clause.automaton.states) for clause in self.clauses)
        return f"Constraint({self}, states={states})"


def regex(pattern: str, span: Span | None = None) -> Constraint:
    """The whole text (of the span) matches a regular expression, as ``re.fullmatch(pattern, text, re.ASCII)`` does.

    ``.*`` on both sides lets a pattern occur anywhere; ``(?s)`` makes ``.`` match line ends. With ``(?i)`` letters
    beyond ASCII lose their case, too.

    Raises:
        ConfigError: a syntax error, or what a finite automaton can't follow (references) or isn't supported
            (look-around, ``\\b``, anchors inside, possessive and atomic groups); the message says what else to write.
    """
    return _constraint(from_pattern(pattern), span, f"regex({pattern!r})")


def contains(words: str | Sequence[str], span: Span | None = None) -> Constraint:
    """Every one of the words occurs, anywhere, in any order, overlaps allowed.

    The automaton of k words has up to 2**k times their length states: a handful is fine.

    Raises:
        ConfigError: no words, or an empty one.
    """
    words = _words("contains", words)
    parts = [automata.containing(word) for word in words]
    return _constraint(reduce(Automaton.intersection, parts), span, f"contains({words!r})")


def forbids(words: str | Sequence[str], span: Span | None = None) -> Constraint:
    """None of the words occurs.

    Raises:
        ConfigError: no words, or an empty one.
    """
    words = _words("forbids", words)
    parts = [automata.containing(word).complement() for word in words]
    return _constraint(reduce(Automaton.intersection, parts), span, f"forbids({words!r})")


def one_of(texts: Sequence[str], span: Span | None = None) -> Constraint:
    """The whole text (of the span) is one of these.

    Raises:
        ConfigError: no texts.
    """
    if isinstance(texts, str) or not texts:
        raise ConfigError(f"one_of: expected a list of texts, found {texts!r}; write one_of(['yes', 'no'])")
    return _constraint(automata.one_of(texts), span, f"one_of({list(texts)!r})")


def length(minimum: int = 0, maximum: int | None = None, span: Span | None = None) -> Constraint:
    """The text (of the span) has so many characters, both bounds included; None: no upper bound.

    Where every token is one character the number of sites says that already, unless ``constrain`` is told of an
    end-of-text token, which fills the rest.

    Raises:
        ConfigError: bounds that no text keeps.
    """
    if minimum < 0 or (maximum is not None and maximum < minimum):
        raise ConfigError(f"length: expected 0 <= minimum <= maximum, found {minimum} and {maximum}")
    return _constraint(automata.of_length(minimum, maximum), span, f"length({minimum}, {maximum})")


def _constraint(automaton: Automaton, span: Span | None, name: str) -> Constraint:
    if span is not None:
        span = (int(span[0]), int(span[1]))
        name = f"{name[:-1]}, span={span})"
    return Constraint((Clause(automaton, span, name),))


def _words(what: str, words: str | Sequence[str]) -> list[str]:
    words = [words] if isinstance(words, str) else list(words)
    if not words or not all(words):
        raise ConfigError(f"{what}: expected words of at least one character, found {words!r}")
    return words
