"""The tree that keeps most of the dependence: a maximum spanning tree over pairwise mutual information."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import networkx as nx

from codd_ppl.errors import GraphError
from codd_ppl.graphs.factor_graph import FactorGraph, token_graph

__all__ = ["Matrix", "chow_liu"]


@runtime_checkable
class Matrix(Protocol):
    """Rows of numbers: nested sequences, a numpy array, a tensor."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, i: Any, /) -> Any:
        """Row i."""


def chow_liu(
    sites: int,
    cardinality: int,
    weights: Mapping[int, float] | Matrix,
    tie: bool | None = None,
    above: float | None = None,
) -> FactorGraph:
    """Tokens coupled along the maximum spanning tree of ``weights``: skip edges are found and not guessed.

    With the mutual information of the pairs as weights it is the tree T closest to the law P of the tokens (Chow and
    Liu 1968), and what it misses is the total correlation less the information on its edges:

        KL(P || T) = TC(x0, .., x{L-1}) - sum_{(i, j) in T} I(xi; xj).

    Equal weights are decided for the shorter edge, then for the one further left, so that the same weights give the
    same tree. Every scope reads (left, right). Weights come from ``codd_ppl.potentials.mutual_information`` (by
    offset) or ``pairwise_mutual_information`` (a matrix).

    Args:
        sites: number of tokens.
        cardinality: values per token.
        weights: offset s -> weight of all edges x_i - x_{i+s}, for the same statistics everywhere (offsets that are
            left out give no edge, those of ``sites`` and more are not looked at); or a symmetric matrix of (sites,
            sites), nested sequences, an array or a tensor, whose diagonal is not read.
        tie: tables tied by offset, ``skip1``, ``skip2``, .., or one for each edge; None: tied if weights are by offset.
        above: leave out edges whose weight is not above it, so that a forest may come out; 0.0 drops those on which a
            bias-corrected estimate finds nothing. None keeps them all.

    Raises:
        GraphError: offsets that aren't integers >= 1, a matrix of another size or not symmetric, weights that aren't
            finite.
    """
    graph = token_graph(sites, cardinality)
    by_offset = isinstance(weights, Mapping)
    found = _edges_by_offset(sites, weights) if isinstance(weights, Mapping) else _edges(sites, weights)
    edges = [(w, i, j) for w, i, j in found if above is None or w > above]
    # Ranks instead of weights: all different, so that the tree doesn't depend on the algorithm.
    edges.sort(key=lambda edge: (edge[0], edge[1] - edge[2], -edge[1]))
    dense = nx.Graph()
    dense.add_weighted_edges_from((i, j, rank) for rank, (_, i, j) in enumerate(edges))
    tree = nx.maximum_spanning_edges(dense, data=False)
    for i, j in sorted((min(edge), max(edge)) for edge in tree):
        tied = by_offset if tie is None else tie
        graph.add_factor((f"x{i}", f"x{j}"), tie=f"skip{j - i}" if tied else None)
    return graph


def _edges_by_offset(sites: int, weights: Mapping[Any, float]) -> Iterator[tuple[float, int, int]]:
    """(weight, left, right) of all pairs whose offset has a weight."""
    for offset, value in weights.items():
        if isinstance(offset, bool) or not isinstance(offset, int) or offset < 1:
            raise GraphError(
                f"chow_liu: expected offsets that are integers >= 1 as keys of weights, found {offset!r}; an edge "
                "joins x_i and x_{i + offset}"
            )
        weight = _finite(value, f"weights[{offset}]")
        yield from ((weight, i, i + offset) for i in range(sites - offset))


def _edges(sites: int, weights: Any) -> Iterator[tuple[float, int, int]]:
    """(weight, left, right) of all pairs of a symmetric matrix."""
    rows = weights.tolist() if hasattr(weights, "tolist") else weights
    if len(rows) != sites or any(not hasattr(row, "__len__") or len(row) != sites for row in rows):
        raise GraphError(
            f"chow_liu: expected weights as a mapping offset -> weight or a matrix of {sites} x {sites}, the sites "
            f"squared, found {len(rows)} rows, not all of {sites} numbers"
        )
    for i in range(sites):
        for j in range(i + 1, sites):
            weight, other = (_finite(rows[a][b], f"weights[{a}][{b}]") for a, b in ((i, j), (j, i)))
            if abs(weight - other) > 1e-6 * max(1.0, abs(weight)):
                raise GraphError(
                    f"chow_liu: expected a symmetric matrix, found weights[{i}][{j}] = {weight:.6g} and "
                    f"weights[{j}][{i}] = {other:.6g}; fill both triangles"
                )
            yield weight, i, j


def _finite(value: Any, where: str) -> float:
    weight = float(value)
    if not isfinite(weight):
        raise GraphError(
            f"chow_liu: expected finite weights, found {where} = {weight}; leave the edge out, or give it a weight "
            "that `above` drops"
        )
    return weight
