"""A rooted forest over the same sites for each batch element, sorted into levels of equal distance from the root."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from codd_ppl.errors import CyclicGraphError, GraphError, ShapeError
from codd_ppl.inference.spanning_trees import maximum_spanning_forest
from codd_ppl.typing import Bool, Int

__all__ = ["DynamicForest", "Level"]


class Level(NamedTuple):
    """Sites equally far from their root."""

    rows: Tensor  # (edges) batch element * sites + site
    above: Tensor  # (edges) where the parent stands in the level before; empty for the roots


@dataclass(frozen=True, eq=False)
class DynamicForest:
    """A rooted forest over the sites for each batch element.

    Args:
        parents: (*batch, sites) integer, the site that each site hangs on; -1: a root.

    Raises:
        ShapeError: not integer, or without sites.
        GraphError: a parent outside of -1 .. sites - 1.
        CyclicGraphError: the parents lead round in a circle; the message names one.
    """

    parents: Int[Tensor, "*batch sites"]

    def __post_init__(self) -> None:
        parents = self.parents
        if (
            parents.is_floating_point()
            or parents.dtype == torch.bool
            or parents.dim() < 1
            or not parents.shape[-1]
        ):
            raise ShapeError(
                f"expected parents as integers (*batch, sites), found {parents.dtype} {tuple(parents.shape)}"
            )
        wrong = ((parents < -1) | (parents >= parents.shape[-1])).nonzero()
        if len(wrong):
            *where, site = wrong[0].tolist()
            raise GraphError(
                f"the parent of site {site} of batch element {tuple(where)} is {int(parents[(*where, site)])}, "
                f"expected a site from 0 to {parents.shape[-1] - 1}, or -1 for a root"
            )
        self.levels  # noqa: B018  a circle shows here

    @classmethod
    def from_edges(cls, adjacency: Bool[Tensor, "*batch sites sites"]) -> DynamicForest:
        """The forest with these edges (bool, either triangle or both), each tree rooted at its first site.

        Raises:
            ShapeError: not a bool (*batch, sites, sites).
            CyclicGraphError: edges that close a loop.
        """
        shape = tuple(adjacency.shape)
        if adjacency.dtype != torch.bool or len(shape) < 2 or shape[-1] != shape[-2]:
            raise ShapeError(
                f"expected edges as bool (*batch, sites, sites), found {adjacency.dtype} {shape}"
            )
        edges = adjacency | adjacency.mT
        parents = maximum_spanning_forest(torch.where(edges, 0.0, -torch.inf))
        loop = edges.diagonal(dim1=-2, dim2=-1).any(-1)
        count = edges.sum((-2, -1)) // 2
        bad = (loop | (count != (parents >= 0).sum(-1))).nonzero()
        if len(bad):
            raise CyclicGraphError(
                f"the edges of batch element {tuple(bad[0].tolist())} close a loop; drop one edge of it, or keep the "
                "best ones with spanning_trees.maximum_spanning_forest"
            )
        return cls(parents)

    @property
    def sites(self) -> int:
        """Number of sites of each tree."""
        return self.parents.shape[-1]

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The sites by their distance from the root, roots first."""
        n = self.parents.shape[-1]
        parents = self.parents.reshape(-1, n).long()
        depth, to = (parents >= 0).long(), parents
        for _ in range(n.bit_length()):
            on = to.clamp_min(0)
            depth = depth + torch.where(to >= 0, depth.gather(-1, on), 0)
            to = torch.where(to >= 0, to.gather(-1, on), -1)
        circling = (to >= 0).nonzero()
        if len(circling):
            element, site = circling[0].tolist()
            walk = [int(to[element, site])]
            while (step := int(parents[element, walk[-1]])) not in walk:
                walk.append(step)
            walk = [*walk[walk.index(step) :], step]
            raise CyclicGraphError(
                f"the parents of batch element {element} (flattened) lead in a circle, {' -> '.join(map(str, walk))}; "
                "a tree needs a root, whose parent is -1"
            )
        flat = depth.reshape(-1)
        start = torch.arange(len(parents), device=parents.device)[:, None] * n
        above = (parents + start).reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat).tolist() if flat.numel() else []
        place = torch.empty_like(flat)
        levels: list[Level] = []
        for index, rows in enumerate(order.split(counts)):
            place[rows] = torch.arange(len(rows), device=rows.device)
            levels.append(Level(rows, place[above[rows]] if index else rows[:0]))
        return tuple(levels)
