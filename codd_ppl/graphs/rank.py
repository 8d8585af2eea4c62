"""Pairs of tokens coupled through a latent of few states instead of a table of vocabulary squared."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from codd_ppl.errors import GraphError
from codd_ppl.graphs.factor_graph import Factor, FactorGraph

__all__ = ["LowRankEdge", "low_rank", "low_rank_edges"]


def low_rank(graph: FactorGraph, rank: int) -> FactorGraph:
    """The graph with every factor over two tokens replaced by a latent of ``rank`` states between them:

        psi(x, y) = sum_r exp(a[x, r] + b[r, y]),    scopes (x, z) and (z, y),

    a non-negative table of rank at most ``rank`` (any table, for rank = cardinality), at (V + V) rank for each edge
    instead of V^2. To the engine it is a graph like any other; a tree stays a tree, a directed forest a directed one.

    Latents are called by the first free names ``z0, z1, ..``. A tie ``t`` becomes the ties ``t.left`` and ``t.right``.
    Variables and other factors stay as they are.

    Raises:
        GraphError: ``rank`` isn't an integer >= 1, or no factor is over two tokens.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise GraphError(f"low_rank: rank must be an integer >= 1, found {rank!r}")
    result, variables = FactorGraph(), graph.variables
    for variable in variables.values():
        result.add_variable(variable.name, variable.cardinality, variable.latent)
    taken = {*variables, *graph.factors, *graph.ties}
    free = (name for name in map("z{}".format, count()) if name not in taken)
    replaced = 0
    for factor in graph.factors.values():
        if factor.order != 2 or any(variables[v].latent for v in factor.scope):
            result.add_factor(factor.scope, tie=factor.tie, name=factor.name)
            continue
        (left, right), z = factor.scope, next(free)
        result.add_variable(z, rank, latent=True)
        result.add_factor((left, z), tie=factor.tie and f"{factor.tie}.left")
        result.add_factor((z, right), tie=factor.tie and f"{factor.tie}.right")
        replaced += 1
    if not replaced:
        raise GraphError(
            "low_rank: expected at least one factor over two tokens, found none; start from topologies.chain, tree or "
            "chow_liu"
        )
    return result


@dataclass(frozen=True)
class LowRankEdge:
    """Two tokens joined by a latent; ``tables`` are the names (tie or factor) of (left, z) and (z, right)."""

    left: str
    latent: str
    right: str
    tables: tuple[str, str]


def low_rank_edges(graph: FactorGraph) -> list[LowRankEdge] | None:
    """The edges of a graph that :func:`low_rank` made of pairwise factors over tokens; None for any other graph."""
    variables, factors = graph.variables, list(graph.factors.values())
    enters: dict[str, Factor] = {}
    leaves: dict[str, Factor] = {}
    for factor in factors:
        if factor.order != 2:
            return None
        left, right = factor.scope
        if variables[left].latent == variables[right].latent:
            return None
        side, z = (enters, right) if variables[right].latent else (leaves, left)
        if z in side:
            return None
        side[z] = factor
    if not factors or not set(enters) == set(leaves) == set(graph.latents):
        return None
    return [
        LowRankEdge(
            enters[z].scope[0],
            z,
            leaves[z].scope[1],
            (enters[z].tie or enters[z].name, leaves[z].tie or leaves[z].name),
        )
        for z in graph.latents
    ]
