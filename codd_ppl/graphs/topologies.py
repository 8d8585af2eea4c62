"""Ready-made topologies. Each is a few lines over :class:`FactorGraph`; yours can be, too."""

from __future__ import annotations

from collections.abc import Sequence

from codd_ppl.errors import GraphError
from codd_ppl.graphs.factor_graph import FactorGraph, token_graph
from codd_ppl.graphs.rank import low_rank
from codd_ppl.graphs.spanning_tree import chow_liu

__all__ = [
    "caterpillar",
    "chain",
    "chow_liu",
    "grid",
    "hidden_markov",
    "independent",
    "latent_tree",
    "low_rank",
    "skip_chain",
    "star",
    "tree",
]


def independent(sites: int, cardinality: int) -> FactorGraph:
    """Tokens without any factor: the factorised denoiser."""
    return token_graph(sites, cardinality)


def chain(sites: int, cardinality: int, tie: str | None = "edge") -> FactorGraph:
    """Neighbouring tokens coupled: x0 - x1 - ... ; ``tie=None`` gives each edge its own table."""
    graph = token_graph(sites, cardinality)
    for i in range(sites - 1):
        graph.add_factor((f"x{i}", f"x{i + 1}"), tie=tie)
    return graph


def tree(parents: Sequence[int | None], cardinality: int, tie: str | None = None) -> FactorGraph:
    """Tokens coupled along a forest given as a parent list (as in networkx and scipy).

    Args:
        parents: ``parents[i]`` is the site of token i's parent, None or -1 for a root.
        cardinality: values per token.
        tie: one shared table for all edges, or None.

    Raises:
        GraphError: a parent out of range or a token that is its own parent. (A parent list with a loop is
            found by ``compile``, which names it.)
    """
    graph = token_graph(len(parents), cardinality)
    for i, parent in enumerate(parents):
        if parent is None or parent == -1:
            continue
        if not 0 <= parent < len(parents) or parent == i:
            raise GraphError(
                f"parents[{i}] = {parent}: expected another site from 0 to {len(parents) - 1}, or None for a root"
            )
        graph.add_factor((f"x{parent}", f"x{i}"), tie=tie)
    return graph


def star(sites: int, cardinality: int, states: int | None = None, tie: str | None = None) -> FactorGraph:
    """All tokens around one hub.

    With ``states`` the hub is a latent ``z0`` (a mixture of products: ``initial`` is the mixing weight);
    without, the hub is token x0.
    """
    graph = token_graph(sites, cardinality)
    if states is None:
        for i in range(1, sites):
            graph.add_factor(("x0", f"x{i}"), tie=tie)
        return graph
    graph.add_variable("z0", states, latent=True)
    graph.add_factor(("z0",), name="initial")
    for i in range(sites):
        graph.add_factor(("z0", f"x{i}"), tie=tie)
    return graph


def hidden_markov(sites: int, cardinality: int, states: int) -> FactorGraph:
    """Hidden Markov model: latent chain z0 - z1 - ... with one token per latent, tables tied along the chain.

    p(z, x) = initial(z0) prod_i transition(z_i, z_{i+1}) prod_i emission(z_i, x_i).
    """
    graph = token_graph(sites, cardinality)
    for i in range(sites):
        graph.add_variable(f"z{i}", states, latent=True)
    graph.add_factor(("z0",), name="initial")
    for i in range(sites):
        graph.add_factor((f"z{i}", f"x{i}"), tie="emission")
    for i in range(sites - 1):
        graph.add_factor((f"z{i}", f"z{i + 1}"), tie="transition")
    return graph


def latent_tree(sites: int, cardinality: int, states: int, tie: bool = True) -> FactorGraph:
    """Balanced binary tree of latents over the tokens, z0 the root.

    Each token hangs on a latent of its own (``emission``); latents are joined pairwise, level by level, by a
    parent latent (``transition1`` just above the leaves, then ``transition2``, ...). An odd one out is joined
    alone, so that any number of sites works. ``tie=False`` gives each factor its own table.
    """
    graph = token_graph(sites, cardinality)
    levels: list[list[int]] = [list(range(sites))]  # columns: positions within each level, leaves first
    while len(levels[-1]) > 1:
        levels.append(list(range((len(levels[-1]) + 1) // 2)))
    names: list[list[str]] = []
    count = 0
    for level in reversed(levels):
        names.insert(0, [f"z{count + j}" for j in range(len(level))])
        count += len(level)
    for level_names in reversed(names):
        for name in level_names:
            graph.add_variable(name, states, latent=True)
    graph.add_factor((names[-1][0],), name="initial")
    for height in range(len(names) - 1, 0, -1):
        for j, child in enumerate(names[height - 1]):
            graph.add_factor((names[height][j // 2], child), tie=f"transition{height}" if tie else None)
    for i, leaf in enumerate(names[0]):
        graph.add_factor((leaf, f"x{i}"), tie="emission" if tie else None)
    return graph


def caterpillar(spine: int, legs: int, cardinality: int, tie: bool = True) -> FactorGraph:
    """A chain of ``spine`` tokens, each with ``legs`` further tokens hanging on it.

    Sites run along the text: spine token, its legs, next spine token, ... so ``spine * (legs + 1)`` sites.
    """
    if spine < 1 or legs < 0:
        raise GraphError(f"caterpillar: expected spine >= 1 and legs >= 0, found {spine} and {legs}")
    width = legs + 1
    graph = token_graph(spine * width, cardinality)
    for s in range(spine):
        if s + 1 < spine:
            graph.add_factor((f"x{s * width}", f"x{(s + 1) * width}"), tie="spine" if tie else None)
        for leg in range(1, width):
            graph.add_factor((f"x{s * width}", f"x{s * width + leg}"), tie=f"leg{leg}" if tie else None)
    return graph


def grid(rows: int, columns: int, cardinality: int, tie: bool = True) -> FactorGraph:
    """Tokens on a grid in reading order, row by row, each coupled with its right and lower neighbour.

    Tables are tied by direction, ``right`` and ``down``; ``tie=False`` gives each edge its own. The treewidth is the
    smaller of the two sides, so exact inference costs about cardinality ** (min(rows, columns) + 1) for each token;
    with few values and from seven rows on an order with fewer and larger cliques may be taken.
    """
    if rows < 1 or columns < 1:
        raise GraphError(f"grid: expected rows >= 1 and columns >= 1, found {rows} and {columns}")
    graph = token_graph(rows * columns, cardinality)
    for i in range(rows * columns):
        if (i + 1) % columns:
            graph.add_factor((f"x{i}", f"x{i + 1}"), tie="right" if tie else None)
        if i + columns < rows * columns:
            graph.add_factor((f"x{i}", f"x{i + columns}"), tie="down" if tie else None)
    return graph


def skip_chain(sites: int, cardinality: int, skips: Sequence[int] = (1, 2), tie: bool = True) -> FactorGraph:
    """Tokens coupled with those a few sites further on: an edge x_i - x_{i+s} for each s of ``skips``.

    Tables are tied by offset, ``skip1``, ``skip2``, ..; ``tie=False`` gives each edge its own. The treewidth is at most
    the largest offset, so exact inference costs at most cardinality ** (max(skips) + 1) for each site.

    Raises:
        GraphError: no offsets, repeated ones, or one below 1.
    """
    offsets = tuple(skips)
    if not offsets or len(set(offsets)) != len(offsets) or any(s < 1 for s in offsets):
        raise GraphError(f"skip_chain: expected distinct skips >= 1, found {offsets}")
    graph = token_graph(sites, cardinality)
    for i in range(sites):
        for s in offsets:
            if i + s < sites:
                graph.add_factor((f"x{i}", f"x{i + s}"), tie=f"skip{s}" if tie else None)
    return graph
