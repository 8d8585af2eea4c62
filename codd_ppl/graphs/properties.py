"""Structural facts about a factor graph, each a plain function that the compiler checks by name."""

from __future__ import annotations

import networkx as nx
from networkx.algorithms.approximation import treewidth_min_fill_in

from codd_ppl.graphs.factor_graph import FactorGraph

__all__ = [
    "components",
    "directed_parents",
    "find_cycle",
    "interaction_graph",
    "is_chain",
    "is_directed_forest",
    "is_forest",
    "token_edges",
    "treewidth_upper_bound",
]


def interaction_graph(graph: FactorGraph) -> nx.Graph:
    """Variables as nodes, an edge between any two that share a factor (the primal or Markov graph)."""
    result = nx.Graph()
    result.add_nodes_from(graph.variables)
    for factor in graph.factors.values():
        scope = factor.scope
        result.add_edges_from((scope[i], scope[j]) for i in range(len(scope)) for j in range(i))
    return result


def find_cycle(graph: FactorGraph) -> list[str] | None:
    """Names of variables and factors around one loop of the bipartite graph, alternating, or None in a forest."""
    bipartite = graph.to_networkx()
    try:
        edges = nx.find_cycle(bipartite)
    except nx.NetworkXNoCycle:
        return None
    start = next(i for i, edge in enumerate(edges) if edge[0][0] == "variable")
    return [edge[0][1] for edge in edges[start:] + edges[:start]]


def is_forest(graph: FactorGraph) -> bool:
    """True when the bipartite graph of variables and factors has no loop."""
    return find_cycle(graph) is None


def components(graph: FactorGraph) -> list[tuple[str, ...]]:
    """Connected components as tuples of variable names, in the order of declaration."""
    order = {name: i for i, name in enumerate(graph.variables)}
    parts = [
        tuple(sorted(part, key=order.__getitem__))
        for part in nx.connected_components(interaction_graph(graph))
    ]
    return sorted(parts, key=lambda part: order[part[0]])


def is_chain(graph: FactorGraph) -> bool:
    """True when the pairwise factors form one path through all variables (unary factors are allowed)."""
    if any(f.order > 2 for f in graph.factors.values()) or not is_forest(graph):
        return False
    primal = interaction_graph(graph)
    return len(primal) > 0 and nx.is_connected(primal) and max((d for _, d in primal.degree), default=0) <= 2


def directed_parents(graph: FactorGraph) -> dict[str, tuple[str, str] | None] | None:
    """Variable -> (parent variable, factor), None for roots; None overall unless scopes read as a directed forest.

    A graph reads as a directed forest when it is a forest, its factors have order 1 or 2, each pairwise scope is
    (parent, child), no variable is the child of two factors, and unary factors stand on roots only (at most one
    each). Its tables can then be conditional probabilities, which is what Baum-Welch estimates.
    """
    if not is_forest(graph):
        return None
    parents: dict[str, tuple[str, str] | None] = dict.fromkeys(graph.variables)
    unary: set[str] = set()
    for factor in graph.factors.values():
        if factor.order == 1:
            if factor.scope[0] in unary:
                return None
            unary.add(factor.scope[0])
        elif factor.order == 2:
            parent, child = factor.scope
            if parents[child] is not None:
                return None
            parents[child] = (parent, factor.name)
        else:
            return None
    if any(parents[name] is not None for name in unary):
        return None
    return parents


def is_directed_forest(graph: FactorGraph) -> bool:
    """True when the scopes read as (parent, child) of a directed forest; see :func:`directed_parents`."""
    return directed_parents(graph) is not None


def treewidth_upper_bound(graph: FactorGraph) -> int:
    """Upper bound on the treewidth of the interaction graph by the min-fill heuristic (exact on forests)."""
    return int(treewidth_min_fill_in(interaction_graph(graph))[0]) if len(graph) else 0


def token_edges(graph: FactorGraph) -> list[tuple[int, int]]:
    """Pairs of tokens (places in reading order): with each the nearest ones, by a factor or a path through latents.

    In a hidden Markov graph these are the neighbours in the text, through their two latents; in a latent tree siblings.
    """
    primal = interaction_graph(graph)
    place = {name: i for i, name in enumerate(graph.tokens)}
    found = set()
    for name, i in place.items():
        edge, seen, near = [name], {name}, set[str]()
        while edge and not near:
            edge = [other for here in edge for other in primal[here] if other not in seen]
            seen.update(edge)
            near = {other for other in edge if other in place}
        found |= {(min(i, place[other]), max(i, place[other])) for other in near}
    return sorted(found)
