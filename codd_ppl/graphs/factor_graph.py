"""The factor graph: what a coupling is made of, declared without a tensor in sight."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import networkx as nx

from codd_ppl.errors import GraphError

__all__ = ["Factor", "FactorGraph", "Variable", "reading_order", "token_graph"]


def reading_order(names: Iterable[str]) -> tuple[str, ...]:
    """Tokens by their number where all are called ``x0, x1, ..``, otherwise as they come."""
    names = tuple(names)
    if all(n[0] == "x" and n[1:].isdecimal() for n in names):
        return tuple(sorted(names, key=lambda n: int(n[1:])))
    return names


@dataclass(frozen=True)
class Variable:
    """A discrete variable with values ``0 .. cardinality - 1``; latent ones are never observed."""

    name: str
    cardinality: int
    latent: bool = False


@dataclass(frozen=True)
class Factor:
    """A non-negative function of the variables in ``scope``; factors with the same ``tie`` share one table."""

    name: str
    scope: tuple[str, ...]
    tie: str | None = None

    @property
    def order(self) -> int:
        """Number of variables in the scope."""
        return len(self.scope)


class FactorGraph:
    """Variables and factors of p(x) = 1/Z prod_f psi_f(x_f), in the order in which they were added.

    Tokens are called ``x0 .. x{L-1}`` in reading order; latents carry ``latent=True``. The scope's
    order is the order of the table's dimensions. In a directed reading (Baum-Welch, sampling by hand)
    the first variable of a scope is the parent.

    Example:
        >>> graph = FactorGraph()
        >>> graph.add_variable("x0", cardinality=27)
        >>> graph.add_variable("z0", cardinality=64, latent=True)
        >>> graph.add_factor(("z0", "x0"), tie="emission")
        >>> graph
        FactorGraph(2 variables (1 latent), 1 factor, 1 tie)
    """

    def __init__(self) -> None:
        self._variables: dict[str, Variable] = {}
        self._factors: dict[str, Factor] = {}
        self._ties: dict[str, list[str]] = {}

    # -- declare ---------------------------------------------------------------------------------

    def add_variable(self, name: str, cardinality: int, latent: bool = False) -> None:
        """Add a variable.

        Args:
            name: unique, not empty, without a comma (factor names are made of them).
            cardinality: number of values, at least 1.
            latent: True when it is never observed.

        Raises:
            GraphError: the name is taken or malformed, or the cardinality is not a positive integer.
        """
        if not isinstance(name, str) or not name or "," in name:
            raise GraphError(f"a variable's name must be a non-empty string without a comma, found {name!r}")
        if name in self._variables:
            raise GraphError(f"variable {name!r} was added before; give each variable a name of its own")
        if name in self._factors or name in self._ties:
            raise GraphError(
                f"{name!r} is the name of a factor or tie already; all three share one name space"
            )
        if isinstance(cardinality, bool) or not isinstance(cardinality, int) or cardinality < 1:
            raise GraphError(f"variable {name!r}: cardinality must be an integer >= 1, found {cardinality!r}")
        self._variables[name] = Variable(name, cardinality, bool(latent))

    def add_factor(self, scope: Sequence[str], tie: str | None = None, name: str | None = None) -> None:
        """Add a factor over existing variables.

        Args:
            scope: names of the variables, in the order of the table's dimensions; no repeats.
            tie: factors with the same tie share one table, so their scopes need the same cardinalities.
            name: defaults to the scope joined by commas. A factor over one variable that is named like the
                variable is the same thing as that variable's unary evidence.

        Raises:
            GraphError: unknown or repeated variable, name taken, or a tie between tables of different shape.
        """
        if isinstance(scope, str):
            raise GraphError(
                f"a scope is a tuple of variable names, found the string {scope!r}; write ({scope!r},)"
            )
        scope = tuple(scope)
        if not scope:
            raise GraphError("a factor needs at least one variable in its scope, found none")
        for variable in scope:
            if variable not in self._variables:
                known = ", ".join(list(self._variables)[:8]) or "none yet"
                raise GraphError(
                    f"factor over {scope}: there is no variable {variable!r}; "
                    f"add it first with add_variable (known: {known})"
                )
        if len(set(scope)) != len(scope):
            raise GraphError(f"factor over {scope}: a variable may appear once in a scope")
        name = ",".join(scope) if name is None else name
        if not isinstance(name, str) or not name:
            raise GraphError(f"a factor's name must be a non-empty string, found {name!r}")
        if name in self._factors:
            raise GraphError(
                f"factor {name!r} was added before; multiply the two tables, or pass another name="
            )
        if name in self._variables and scope != (name,):
            raise GraphError(f"factor name {name!r} is the name of a variable; pass another name=")
        shape = self._shape(scope)
        if tie is not None:
            if not isinstance(tie, str) or not tie:
                raise GraphError(f"factor {name!r}: tie must be a non-empty string or None, found {tie!r}")
            if tie in self._variables:
                raise GraphError(f"factor {name!r}: tie {tie!r} is the name of a variable; choose another")
            other = self._ties[tie][0] if tie in self._ties else name
            if other != name and self.shape(other) != shape:
                raise GraphError(
                    f"tie {tie!r}: factor {name!r} has a table of shape {shape}, but {other!r} has "
                    f"{self.shape(other)}; tied factors share one table, use another tie"
                )
        clash = self._factors.get(tie) if tie is not None else None
        if clash is not None and clash.tie != tie:
            raise GraphError(f"tie {tie!r} is the name of another factor; choose another")
        if name in self._ties and tie != name:
            raise GraphError(f"factor name {name!r} is a tie of other factors; pass another name=")
        self._factors[name] = Factor(name, scope, tie)
        if tie is not None:
            self._ties.setdefault(tie, []).append(name)

    # -- look ------------------------------------------------------------------------------------

    @property
    def variables(self) -> dict[str, Variable]:
        """Variables by name, in the order of declaration (a copy)."""
        return dict(self._variables)

    @property
    def factors(self) -> dict[str, Factor]:
        """Factors by name, in the order of declaration (a copy)."""
        return dict(self._factors)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Names of the observed variables in reading order: ``x0, x1, ..`` first by number, others as declared."""
        return reading_order(v.name for v in self._variables.values() if not v.latent)

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the latent variables, as declared."""
        return tuple(v.name for v in self._variables.values() if v.latent)

    @property
    def ties(self) -> dict[str, tuple[str, ...]]:
        """Tie -> names of the factors that share its table."""
        return {tie: tuple(names) for tie, names in self._ties.items()}

    def shape(self, factor: str) -> tuple[int, ...]:
        """Cardinalities of a factor's scope, the shape of its table.

        Raises:
            GraphError: there is no such factor.
        """
        if factor not in self._factors:
            raise GraphError(
                f"there is no factor {factor!r}; known: {', '.join(list(self._factors)[:8]) or 'none'}"
            )
        return self._shape(self._factors[factor].scope)

    def _shape(self, scope: Iterable[str]) -> tuple[int, ...]:
        return tuple(self._variables[v].cardinality for v in scope)

    # -- networkx --------------------------------------------------------------------------------

    def to_networkx(self) -> nx.Graph:
        """Bipartite graph: variable nodes ``("variable", name)`` and factor nodes ``("factor", name)``.

        Node attributes hold cardinality, latent, scope and tie, so that :meth:`from_networkx` restores the
        identical graph.
        """
        graph = nx.Graph(kind="codd_ppl.FactorGraph")
        for v in self._variables.values():
            graph.add_node(
                ("variable", v.name), bipartite=0, kind="variable", cardinality=v.cardinality, latent=v.latent
            )
        for f in self._factors.values():
            graph.add_node(("factor", f.name), bipartite=1, kind="factor", scope=f.scope, tie=f.tie)
            graph.add_edges_from((("factor", f.name), ("variable", v)) for v in f.scope)
        return graph

    @classmethod
    def from_networkx(
        cls, graph: nx.Graph, cardinality: int | None = None, tie: str | None = None
    ) -> FactorGraph:
        """Read a graph made by :meth:`to_networkx`, or turn any ``nx.Graph`` into pairwise factors over tokens.

        Args:
            graph: either a bipartite factor graph as :meth:`to_networkx` writes it, or any undirected graph:
                its nodes become tokens ``x0, x1, ..`` in node order and its edges pairwise factors. Node
                attributes ``cardinality`` and ``latent`` override the defaults (latents are named ``z0, z1, ..``);
                an edge attribute ``tie`` overrides ``tie``.
            cardinality: values per token; needed unless every node says it.
            tie: tie of all edges without one of their own.

        Raises:
            GraphError: directed or multi graph, self-loop, or no cardinality for a node.
        """
        if not isinstance(graph, nx.Graph) or graph.is_directed() or graph.is_multigraph():
            raise GraphError(
                f"from_networkx takes an undirected nx.Graph, found {type(graph).__name__}; "
                "convert it with nx.Graph(graph)"
            )
        result = cls()
        kinds = nx.get_node_attributes(graph, "kind")
        if graph.graph.get("kind") == "codd_ppl.FactorGraph" or (
            len(kinds) == len(graph) > 0 and set(kinds.values()) <= {"variable", "factor"}
        ):
            for (_, name), data in _of_kind(graph, "variable"):
                result.add_variable(name, data["cardinality"], data["latent"])
            for (_, name), data in _of_kind(graph, "factor"):
                result.add_factor(data["scope"], tie=data["tie"], name=name)
            return result

        names: dict[Hashable, str] = {}
        counts = {"x": 0, "z": 0}
        for node, data in graph.nodes(data=True):
            latent = bool(data.get("latent", False))
            size = data.get("cardinality", cardinality)
            if size is None:
                raise GraphError(
                    f"node {node!r} has no cardinality; pass cardinality= or set the node attribute"
                )
            letter = "z" if latent else "x"
            names[node] = f"{letter}{counts[letter]}"
            counts[letter] += 1
            result.add_variable(names[node], size, latent)
        for a, b, data in graph.edges(data=True):
            if a == b:
                raise GraphError(
                    f"node {a!r} has an edge to itself; put unary evidence on the variable instead"
                )
            result.add_factor((names[a], names[b]), tie=data.get("tie", tie))
        return result

    # -- identity --------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, FactorGraph)
            and tuple(self._variables.values()) == tuple(other._variables.values())
            and tuple(self._factors.values()) == tuple(other._factors.values())
        )

    __hash__ = None  # type: ignore[assignment]  # mutable; hash the compiled plan

    def __iter__(self) -> Iterator[Variable]:
        return iter(self._variables.values())

    def __len__(self) -> int:
        return len(self._variables)

    def __repr__(self) -> str:
        def count(n: int, noun: str) -> str:
            return f"{n} {noun}{'' if n == 1 else 's'}"

        return (
            f"FactorGraph({count(len(self._variables), 'variable')} ({len(self.latents)} latent), "
            f"{count(len(self._factors), 'factor')}, {count(len(self.ties), 'tie')})"
        )


def _of_kind(graph: nx.Graph, kind: str) -> list[tuple[tuple[str, str], dict]]:
    return [(node, data) for node, data in graph.nodes(data=True) if data["kind"] == kind]


def token_graph(sites: int, cardinality: int) -> FactorGraph:
    """Tokens ``x0 .. x{sites-1}`` without a factor: what a topology starts from.

    Raises:
        GraphError: ``sites`` or ``cardinality`` isn't an integer >= 1.
    """
    if isinstance(sites, bool) or not isinstance(sites, int) or sites < 1:
        raise GraphError(f"sites must be an integer >= 1, found {sites!r}")
    graph = FactorGraph()
    for i in range(sites):
        graph.add_variable(f"x{i}", cardinality)
    return graph
