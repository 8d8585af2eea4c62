"""The clique tree: how a graph with loops is contracted exactly, at a cost that grows with its treewidth.

The interaction graph is triangulated by eliminating one variable after the other (min-fill or min-weight, Kjaerulff
1990, "Triangulation of graphs"; where these fail, in the order of declaration), the cliques of the result form a
tree in which the cliques of any variable hang together (Lauritzen and Spiegelhalter 1988, "Local computations with
probabilities on graphical structures"), and a clique sends its parent one message over the variables that they share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from opt_einsum import contract_path, get_symbol

from codd_ppl.compiler.triangulation import Bag, as_declared, bags_of, eliminate, min_fill, min_weight
from codd_ppl.errors import TreewidthError
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import find_cycle, interaction_graph

__all__ = ["Clique", "CliqueTree", "Contraction", "Term", "clique_tree"]

Term = tuple[str, str | int]
"""("factor", name) | ("evidence", variable) | ("up" | "down", clique) | ("unit", variable): a table of ones."""

FEW = 6
"""Up to so many operands opt_einsum looks for the best path of all; beyond it takes a good one."""


@dataclass(frozen=True)
class Contraction:
    """A product of tables, summed over everything but the output: one einsum along a path that opt_einsum found.

    Attributes:
        terms: the operands; "up" and "down" are the messages from a child clique, and to this clique from its parent.
        scopes: variables of each operand, in the order of its dimensions.
        output: variables of the result.
        equation: letters for the variables with more than one value; the batch letter ``a`` is added at run time.
        sizes: cardinality of each letter, as pairs.
        path: opt_einsum's contraction path.
        flops: floating-point operations per batch element.
    """

    terms: tuple[Term, ...]
    scopes: tuple[tuple[str, ...], ...]
    output: tuple[str, ...]
    equation: str
    sizes: tuple[tuple[str, int], ...]
    path: tuple[tuple[int, ...], ...]
    flops: int


@dataclass(frozen=True)
class Clique:
    """Variables that are contracted together.

    Attributes:
        variables: in the order of declaration.
        separator: those shared with the parent clique; () at a root.
        parent, children: places in :attr:`CliqueTree.cliques`; the parent of a root is -1.
        factors: factors of order two or more whose tables are multiplied in here.
        entries: joint values of the variables.
        up: message to the parent over the separator; at a root the sum over everything.
        down: message to each child.
        cavities: for each factor, then for each variable that is not in the separator, the product of everything
            else that meets here, summed to its scope. Times its own table, that is its marginal.
    """

    variables: tuple[str, ...]
    separator: tuple[str, ...]
    parent: int
    children: tuple[int, ...]
    factors: tuple[str, ...]
    entries: int
    up: Contraction
    down: tuple[Contraction, ...]
    cavities: tuple[Contraction, ...]

    @property
    def residual(self) -> tuple[str, ...]:
        """The variables that are summed out here; their unary evidence is multiplied in here."""
        return tuple(v for v in self.variables if v not in self.separator)


@dataclass(frozen=True)
class CliqueTree:
    """One tree of cliques for each connected component; children come before their parents."""

    cliques: tuple[Clique, ...]

    @property
    def treewidth(self) -> int:
        """Variables of the largest clique, less one: an upper bound of the graph's treewidth."""
        return max(len(c.variables) for c in self.cliques) - 1

    @property
    def largest(self) -> Clique:
        """The clique with the most joint values."""
        return max(self.cliques, key=lambda c: c.entries)

    @property
    def flops(self) -> int:
        """Floating-point operations of all messages to the parents, per batch element."""
        return sum(c.up.flops for c in self.cliques)

    @property
    def flops_back(self) -> int:
        """Floating-point operations of all messages back down and of all marginals, per batch element."""
        return sum(part.flops for c in self.cliques for part in (*c.down, *c.cavities))

    def message_bytes(self, itemsize: int = 4) -> int:
        """Bytes of all messages to the parents, for one batch element."""
        return itemsize * sum(_entries(c.up) for c in self.cliques)

    def explain(self) -> list[str]:
        """A line for each clique: its variables, separator, factors, contraction and cost."""
        lines = [
            f"treewidth: {self.treewidth} (of this elimination order); {len(self.cliques)} cliques, the largest with "
            f"{self.largest.entries:,} entries = {4 * self.largest.entries:,} bytes x batch in float32",
            "cliques (leaves first; the downward pass runs them backwards):",
        ]
        for i, c in enumerate(self.cliques):
            target = f"separator ({_few(c.separator)}) to {c.parent + 1}" if c.parent >= 0 else "root"
            lines.append(
                f"  {i + 1:>4}  ({_few(c.variables)}), {c.entries:,} entries, {target}, "
                f"factors: {_few(c.factors) or 'none'}; {c.up.equation}, path {_path(c.up.path)}, "
                f"{c.up.flops:,} FLOPs and {4 * _entries(c.up):,} bytes x batch"
            )
        if len(lines) > LINES:
            half = LINES // 2
            lines[half:-half] = [f"        ... {len(lines) - 2 * half} more cliques"]
        back = f"messages back down and marginals of everything: {self.flops_back:,} FLOPs x batch"
        return [*lines, back + "; in linear space where that is safe, else in log space, clique by clique"]


LINES = 40
"""So many lines of cliques are printed."""


def _entries(part: Contraction) -> int:
    """Entries of the result."""
    sizes = dict(part.sizes)
    return prod(sizes[letter] for letter in part.equation.split("->")[1])


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _path(path: tuple[tuple[int, ...], ...]) -> str:
    return " ".join("(" + ",".join(map(str, step)) + ")" for step in path[:8]) + (
        " ..." if len(path) > 8 else ""
    )


# -- building it -------------------------------------------------------------------------------------


def clique_tree(graph: FactorGraph, memory_limit: int) -> CliqueTree:
    """Triangulate and build the tree; of two elimination heuristics the one with fewer entries in all is kept.

    Where both are refused, the order of declaration is tried: it is the best one for large grids.

    Raises:
        TreewidthError: a clique takes more than ``memory_limit`` bytes per batch element in float32.
    """
    sizes = {v.name: v.cardinality for v in graph}
    primal = interaction_graph(graph)

    def entries(names: Iterable[str]) -> int:
        return prod(sizes[v] for v in names)

    found: list[tuple[int, list[Bag]]] = []
    refused: list[tuple[str, ...]] = []
    for score in (min_fill, min_weight, as_declared):
        if found and score is as_declared:
            break
        order = eliminate(primal, sizes, score, memory_limit // 4)
        last, around = order[-1]
        if entries((last, *around)) > memory_limit // 4:
            refused.append(tuple(v for v in sizes if v == last or v in around))
            continue
        bags = bags_of(order)
        found.append((sum(entries(b.members) for b in bags), bags))
    if not found:
        raise TreewidthError(_too_large(graph, min(refused, key=entries), sizes, memory_limit))
    _, bags = min(found, key=lambda item: item[0])
    return CliqueTree(_assemble(graph, bags, sizes))


def _too_large(graph: FactorGraph, clique: tuple[str, ...], sizes: dict[str, int], memory_limit: int) -> str:
    count = prod(sizes[v] for v in clique)
    cycle = find_cycle(graph)
    loop = ""
    if cycle is not None:
        loop = (
            f" A loop of the graph: {' - '.join(cycle[:12] + (['...'] if len(cycle) > 12 else [cycle[0]]))}."
        )
    return (
        f"exact inference on this graph needs the joint table of the clique ({_few(clique)}) of {len(clique)} "
        f"variables, {' x '.join(str(sizes[v]) for v in clique[:8])}{' x ...' if len(clique) > 8 else ''} = {count:,} "
        f"entries = {4 * count:,} bytes per batch element in float32, more than memory_limit = {memory_limit:,}.{loop} "
        "Use fewer states, or another topology with shorter loops (remove factors, or join the tokens through a latent "
        "chain or tree); raise memory_limit= if the memory is there; or ask for an approximation by name: "
        "compile(graph, approximate=LoopyBeliefPropagation())"
    )


def _assemble(graph: FactorGraph, bags: list[Bag], sizes: dict[str, int]) -> tuple[Clique, ...]:
    number = {v: i for i, v in enumerate(sizes)}
    bags = bags[::-1]  # children first
    last = len(bags) - 1
    parents = [last - b.parent if b.parent >= 0 else -1 for b in bags]
    children: list[list[int]] = [[] for _ in bags]
    for i, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(i)
    variables = [tuple(sorted(b.members, key=number.__getitem__)) for b in bags]
    separators = [tuple(sorted(b.separator, key=number.__getitem__)) for b in bags]
    home = {v: i for i, b in enumerate(bags) for v in b.members - b.separator}
    factors: list[list[str]] = [[] for _ in bags]
    for f in graph.factors.values():
        if f.order > 1:  # the clique of the scope's first eliminated variable holds all of the scope
            factors[min(home[v] for v in f.scope)].append(f.name)

    scope = {name: f.scope for name, f in graph.factors.items()}
    cliques = []
    for i, names in enumerate(variables):
        residual = [v for v in names if v not in separators[i]]
        here: dict[Term, tuple[str, ...]] = {("factor", f): scope[f] for f in factors[i]}
        here |= {("evidence", v): (v,) for v in residual}
        here |= {("up", c): separators[c] for c in children[i]}
        above: dict[Term, tuple[str, ...]] = here if parents[i] < 0 else here | {("down", i): separators[i]}
        own: list[Term] = [("factor", f) for f in factors[i]]
        own += [("evidence", v) for v in residual]
        cliques.append(
            Clique(
                names,
                separators[i],
                parents[i],
                tuple(children[i]),
                tuple(factors[i]),
                prod(sizes[v] for v in names),
                contraction(here, separators[i], names, sizes),
                tuple(contraction(_but(above, ("up", c)), separators[c], names, sizes) for c in children[i]),
                tuple(contraction(_but(above, term), above[term], names, sizes) for term in own),
            )
        )
    return tuple(cliques)


def _but(terms: dict[Term, tuple[str, ...]], left_out: Term) -> dict[Term, tuple[str, ...]]:
    return {term: scope for term, scope in terms.items() if term != left_out}


def contraction(
    terms: dict[Term, tuple[str, ...]], output: tuple[str, ...], names: tuple[str, ...], sizes: dict[str, int]
) -> Contraction:
    """The contraction of some terms; variables of the output that no term has get a table of ones."""
    covered = {v for scope in terms.values() for v in scope}
    terms = terms | {("unit", v): (v,) for v in output if v not in covered}
    wide = [v for v in names if sizes[v] > 1]
    letter = {v: get_symbol(i + 1) for i, v in enumerate(wide)}  # "a" stays free for the batch
    inputs = ["".join(letter.get(v, "") for v in scope) for scope in terms.values()]
    equation = ",".join(inputs) + "->" + "".join(letter.get(v, "") for v in output)
    counts = tuple((letter[v], sizes[v]) for v in wide)
    path, flops = _optimised(equation, counts)
    return Contraction(tuple(terms), tuple(terms.values()), output, equation, counts, path, flops)


@lru_cache(maxsize=4096)
def _optimised(equation: str, sizes: tuple[tuple[str, int], ...]) -> tuple[tuple[tuple[int, ...], ...], int]:
    count = dict(sizes)
    inputs = equation.split("->")[0].split(",")
    if inputs == [""]:
        return ((0,),), 1
    shapes = [tuple(count[x] for x in term) for term in inputs]
    optimize = "optimal" if len(inputs) <= FEW else "auto"
    path, info = contract_path(equation, *shapes, shapes=True, optimize=optimize)
    return tuple(tuple(pair) for pair in path), int(info.opt_cost)
