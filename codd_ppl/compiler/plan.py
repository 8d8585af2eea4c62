"""The compiled object: a frozen, hashable, printable list of contractions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from types import MappingProxyType

from codd_ppl.compiler.approximation import LoopyBeliefPropagation
from codd_ppl.compiler.junction import CliqueTree
from codd_ppl.graphs import Factor, Variable
from codd_ppl.graphs.factor_graph import reading_order

__all__ = ["ContractionPlan", "Message", "Run", "Step"]


@dataclass(frozen=True)
class Message:
    """A factor's message to its parent variable, made from the beliefs of its child variables."""

    factor: str
    parent: str
    children: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """Messages of one level that have the same table shape and orientation: one batched contraction.

    Attributes:
        messages: independent of each other; all their children were finished by earlier steps.
        parent_axis: the table dimension that belongs to the parent.
        shape: cardinalities of the table.
        tie: name of the table that all messages share, or None when each has its own.
        equation: the contraction in einsum letters; b = batch, g = message, p = parent, others = children.
        path: opt_einsum's contraction path for it.
        flops: floating-point operations per batch element.
    """

    messages: tuple[Message, ...]
    parent_axis: int
    shape: tuple[int, ...]
    tie: str | None
    equation: str
    path: tuple[tuple[int, ...], ...]
    flops: int

    @property
    def kind(self) -> str:
        """The product that runs this step."""
        if len(self.shape) > 2:
            return "einsum (opt_einsum path)"
        if self.tie is not None:
            return "one matrix product" if len(self.messages) > 1 else "matrix product"
        return "batched matrix product" if len(self.messages) > 1 else "matrix product"

    def bytes_per_element(self, itemsize: int = 4) -> int:
        """Bytes of the messages read and written for one batch element."""
        return itemsize * len(self.messages) * sum(self.shape)

    def table_bytes(self, itemsize: int = 4) -> int:
        """Bytes of the tables, when they have no batch dimension."""
        return itemsize * prod(self.shape) * (1 if self.tie is not None else len(self.messages))


@dataclass(frozen=True)
class Run:
    """Consecutive steps that form a path: each sends one message, from the variable that the step before it reached.

    Attributes:
        start, stop: the steps, as in ``range(start, stop)``.
        variables: the children of the steps in turn, then the last parent; all of one cardinality.
    """

    start: int
    stop: int
    variables: tuple[str, ...]


@dataclass(frozen=True)
class ContractionPlan:
    """What :func:`codd_ppl.compile` returns: everything about the order of work and nothing about numbers.

    Hashable and equal by structure, free of parameters; the same plan serves any batch shape, dtype and device.

    Attributes:
        variables, factors: the graph, as declared.
        roots: one variable per connected component; every message flows towards it.
        steps: the upward contractions, leaves first. The downward pass is the same list reversed.
        route: "independent" (nothing to contract), "tree sweep", "chain scan" (torch-struct), "clique contraction"
            (loops, exactly), or "loopy belief propagation" (an approximation, only when asked for).
        reason: why this route was chosen.
        junction: the clique tree of the route "clique contraction"; then there are no steps.
        approximation: the settings of the route "loopy belief propagation"; then there are no steps.
    """

    variables: tuple[Variable, ...]
    factors: tuple[Factor, ...]
    roots: tuple[str, ...]
    steps: tuple[Step, ...]
    route: str
    reason: str
    junction: CliqueTree | None = None
    approximation: LoopyBeliefPropagation | None = None

    # The hash of a plan with thousands of variables is asked for often; it is computed once.
    @cached_property
    def _hash(self) -> int:
        return hash((self.variables, self.factors, self.roots, self.route))

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles: the fields, without what was computed from them (hashes hold in one process only)."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def variable(self) -> Mapping[str, Variable]:
        """Variables by name."""
        return MappingProxyType({v.name: v for v in self.variables})

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The variables that are not latent, in reading order."""
        return reading_order(v.name for v in self.variables if not v.latent)

    @cached_property
    def factor(self) -> Mapping[str, Factor]:
        """Factors by name."""
        return MappingProxyType({f.name: f for f in self.factors})

    @cached_property
    def ties(self) -> Mapping[str, tuple[str, ...]]:
        """Tie -> names of the factors that share its table."""
        result: dict[str, list[str]] = {}
        for f in self.factors:
            if f.tie is not None:
                result.setdefault(f.tie, []).append(f.name)
        return MappingProxyType({tie: tuple(names) for tie, names in result.items()})

    @cached_property
    def unary(self) -> Mapping[str, tuple[Factor, ...]]:
        """Variable -> its factors of order one."""
        result: dict[str, tuple[Factor, ...]] = {}
        for f in self.factors:
            if f.order == 1:
                result[f.scope[0]] = (*result.get(f.scope[0], ()), f)
        return MappingProxyType(result)

    @cached_property
    def below(self) -> Mapping[str, tuple[tuple[int, int], ...]]:
        """Variable -> (step, position in it) of the messages it receives from its child factors."""
        result: dict[str, list[tuple[int, int]]] = {v.name: [] for v in self.variables}
        for s, step in enumerate(self.steps):
            for g, message in enumerate(step.messages):
                result[message.parent].append((s, g))
        return MappingProxyType({name: tuple(where) for name, where in result.items()})

    @cached_property
    def above(self) -> Mapping[str, tuple[int, int, int]]:
        """Variable -> (step, position, child index) of its parent factor; roots are missing."""
        return MappingProxyType(
            {
                child: (s, g, c)
                for s, step in enumerate(self.steps)
                for g, message in enumerate(step.messages)
                for c, child in enumerate(message.children)
            }
        )

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The paths of at least three steps; a scan runs each of them without leaving linear space."""
        found, start = [], 0
        while start < len(self.steps):
            stop = start + 1
            while stop < len(self.steps) and _continues(self.steps[stop - 1], self.steps[stop]):
                stop += 1
            if stop - start >= 3:
                steps = self.steps[start:stop]
                names = (*(s.messages[0].children[0] for s in steps), steps[-1].messages[0].parent)
                found.append(Run(start, stop, names))
            start = stop
        return tuple(found)

    @cached_property
    def run_of(self) -> Mapping[int, tuple[int, int]]:
        """Step of a run -> (first step of the run, place in it)."""
        return MappingProxyType(
            {i: (r.start, i - r.start) for r in self.runs for i in range(r.start, r.stop)}
        )

    @cached_property
    def step_of(self) -> Mapping[str, tuple[int, int]]:
        """Factor of order two or more -> (step, position in it)."""
        return MappingProxyType(
            {m.factor: (s, g) for s, step in enumerate(self.steps) for g, m in enumerate(step.messages)}
        )

    @cached_property
    def run_factors(self) -> Mapping[int, frozenset[str]]:
        """First step of a run -> names of the run's factors."""
        return MappingProxyType(
            {
                r.start: frozenset(m.factor for step in self.steps[r.start : r.stop] for m in step.messages)
                for r in self.runs
            }
        )

    @cached_property
    def by_cardinality(self) -> tuple[tuple[str, ...], ...]:
        """The variables, those of one cardinality together."""
        groups: dict[int, list[str]] = {}
        for v in self.variables:
            groups.setdefault(v.cardinality, []).append(v.name)
        return tuple(tuple(names) for names in groups.values())

    @cached_property
    def isolated(self) -> tuple[str, ...]:
        """Variables without a factor of order two or more."""
        coupled = {v for f in self.factors if f.order > 1 for v in f.scope}
        return tuple(v.name for v in self.variables if v.name not in coupled)

    @property
    def flops(self) -> int:
        """Floating-point operations of one upward pass per batch element."""
        cliques = 0 if self.junction is None else self.junction.flops
        return cliques + sum(step.flops for step in self.steps)

    def explain(self, batch: int | None = None) -> str:
        """Root, order, the contraction of each step, FLOPs and bytes as a function of batch.

        Args:
            batch: print totals for this many batch elements as well.
        """
        latent = sum(v.latent for v in self.variables)
        roots = ", ".join(self.roots[:6]) + (
            f", ... ({len(self.roots)} components)" if len(self.roots) > 6 else ""
        )
        lines = [
            f"ContractionPlan: {len(self.variables)} variables ({latent} latent), {len(self.factors)} factors, "
            + (
                f"{len(self.steps)} steps"
                if self.junction is None
                else f"{len(self.junction.cliques)} cliques"
            ),
            f"route: {self.route}: {self.reason}",
            f"root: {roots or 'none'}",
        ]
        if self.junction is not None:
            return "\n".join([*lines, *self.junction.explain(), *self._totals(batch)])
        if self.approximation is not None:
            return "\n".join([*lines, *self.approximation.explain(self.variables, self.factors)])
        lines.append("order (leaves first; the downward pass runs it backwards):")
        shown: list[tuple[str, int, int]] = []  # runs of alike steps are folded into one line
        for i, step in enumerate(self.steps):
            names = [m.factor for m in step.messages]
            what = f"tie {step.tie!r}" if step.tie is not None else "own tables"
            text = (
                f"{step.kind}, {what}, table {' x '.join(map(str, step.shape))}, {step.equation}, "
                f"{len(names)} message{'s' * (len(names) > 1)} ({names[0]}{', ...' if len(names) > 1 else ''}), "
                f"{step.flops:,} FLOPs and {step.bytes_per_element():,} bytes x batch + {step.table_bytes():,} bytes"
            )
            key = text.replace(names[0], "") if len(names) == 1 else text
            if shown and shown[-1][0] == key:
                shown[-1] = (key, shown[-1][1], i)
            else:
                shown.append((key, i, i))
                lines.append(text)
        head = len(lines) - len(shown)
        for j, (_, first, last) in enumerate(shown):
            number = f"{first + 1}" if first == last else f"{first + 1}-{last + 1}"
            again = "" if first == last else f"; the same for each of {last - first + 1} steps"
            lines[head + j] = f"  {number:>9}  {lines[head + j]}{again}"
        if not self.steps:
            lines.append("  nothing: every variable stands alone")
        if self.runs:
            some = ", ".join(f"{run.start + 1}-{run.stop}" for run in self.runs[:4])
            more = "" if len(self.runs) <= 4 else f", ... ({len(self.runs)} paths)"
            lines.append(
                f"paths: steps {some}{more}, each one loop in linear space, compiled on a CPU where that pays"
            )
        return "\n".join([*lines, *self._totals(batch)])

    def _totals(self, batch: int | None) -> list[str]:
        per, fixed = sum(s.bytes_per_element() for s in self.steps), self._table_bytes
        per += 0 if self.junction is None else self.junction.message_bytes()
        total = f"total, one upward pass, float32: {self.flops:,} FLOPs x batch, {per:,} bytes x batch + {fixed:,}"
        if batch is None:
            return [total]
        return [total, f"at batch {batch}: {self.flops * batch:,} FLOPs, {per * batch + fixed:,} bytes"]

    @property
    def _table_bytes(self) -> int:
        if self.junction is not None:
            tables = {f.tie or f.name: f.scope for f in self.factors if f.order > 1}
            return 4 * sum(prod(self.variable[v].cardinality for v in scope) for scope in tables.values())
        tied = {step.tie: step.table_bytes() for step in self.steps if step.tie is not None}
        return sum(tied.values()) + sum(step.table_bytes() for step in self.steps if step.tie is None)

    def __str__(self) -> str:
        return self.explain()

    def __repr__(self) -> str:
        return (
            f"ContractionPlan({len(self.variables)} variables, {len(self.factors)} factors, "
            + (
                f"{len(self.steps)} steps, "
                if self.junction is None
                else f"{len(self.junction.cliques)} cliques, "
            )
            + f"route={self.route!r})"
        )


def _continues(before: Step, after: Step) -> bool:
    """Whether two steps follow each other on a path, with tables of one size, orientation and tie."""
    if len(before.messages) > 1 or len(after.messages) > 1 or len(before.shape) != 2:
        return False
    same = (before.shape, before.parent_axis, before.tie) == (after.shape, after.parent_axis, after.tie)
    square = before.shape[0] == before.shape[1]
    return same and square and after.messages[0].children == (before.messages[0].parent,)
