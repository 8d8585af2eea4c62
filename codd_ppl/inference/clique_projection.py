"""The projected coupling on a clique tree: iterative proportional fitting while walking the tree.

As in ``inference/projection.py``: at a masked site i, w_i = q_i / cav_i, one site at a time. A site is fitted at the
one clique where its evidence is multiplied in. The walk goes depth first and sends each message just before it is used,
so every cavity is exact when it is read; coming back from a child clique, the sites of the clique are fitted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from codd_ppl.compiler import CliqueTree, ContractionPlan
from codd_ppl.inference.cliques import Calibration, require_proper, scaled, tree_of
from codd_ppl.inference.semirings import safe_logsumexp
from codd_ppl.inference.tables import Tables

__all__ = ["fit", "walk"]

Move = tuple[Literal["visit", "again", "down", "up"], int]
"""At a clique, or down to a clique and up from it again."""


@lru_cache(maxsize=128)
def walk(plan: ContractionPlan) -> tuple[Move, ...]:
    """Depth first over the clique trees; children in the order of the first site that they sum out."""
    tree = tree_of(plan)
    first = _first_sites(plan, tree)
    moves: list[Move] = []
    roots = [i for i, clique in enumerate(tree.cliques) if clique.parent < 0]
    stack: list[Move] = [("visit", i) for i in sorted(roots, key=first.__getitem__, reverse=True)]
    while stack:
        move = stack.pop()
        moves.append(move)
        if move[0] != "visit":
            continue
        todo: list[Move] = []
        for child in sorted(tree.cliques[move[1]].children, key=first.__getitem__):
            todo += [("down", child), ("visit", child), ("up", child), ("again", move[1])]
        stack += reversed(todo)
    return tuple(moves)


def _first_sites(plan: ContractionPlan, tree: CliqueTree) -> list[int]:
    """For each clique the smallest place of a token that is summed out there or below."""
    place = {v.name: i + len(plan.variables) * v.latent for i, v in enumerate(plan.variables)}
    first: list[int] = []
    for clique in tree.cliques:
        below = [first[c] for c in clique.children]
        first.append(min([*below, *(place[v] for v in clique.residual)]))
    return first


def fit(
    tables: Tables,
    begun: Tables,
    sites: Sequence[str],
    target: Tensor,
    masked: Tensor,
    first: Tensor | None,
    sweeps: int,
    tolerance: float,
) -> Tensor:
    """Log-weights (batch, sites, vocab) of the masked sites, 0 elsewhere; see ``projection.project``.

    ``begun`` is the prior with the first weights, which are ``first``; without them (None) the prior itself.
    """
    require_proper(tables)
    state = _Fit(tables, begun, sites, target, masked, first)
    moves = walk(tables.plan)
    last = max(i for i, move in enumerate(moves) if move[0] == "visit") + 1
    for sweep in range(sweeps):
        state.residual = torch.zeros((), dtype=target.dtype, device=target.device)
        state.sweep(moves[:last])
        # From w = 1 nothing can be said at first about the sites that were fitted once.
        if (sweep > 0 or first is not None) and tolerance > 0 and float(state.residual) <= tolerance:
            break
        if sweep + 1 < sweeps:
            state.sweep(moves[last:])
    weights = [state.weights[name].expand(target.shape[0], -1) for name in sites]
    return torch.where(masked[..., None], torch.stack(weights, 1), 0.0)


class _Fit(Calibration):
    """Messages of one batch while the walk goes on; tensors are replaced, never edited, so autograd can follow."""

    def __init__(
        self,
        tables: Tables,
        begun: Tables,
        sites: Sequence[str],
        target: Tensor,
        masked: Tensor,
        first: Tensor | None,
    ) -> None:
        super().__init__(begun)
        self.site = {name: i for i, name in enumerate(sites)}
        self.target, self.masked = target, masked
        self.base = {name: tables.evidence((name,))[:, 0] for name in self.site}
        self.weights: dict[str, Tensor] = (
            {} if first is None else dict(zip(sites, first.unbind(1), strict=True))
        )
        self.residual = target.new_zeros(())
        self.places = {child: place for c in self.tree.cliques for place, child in enumerate(c.children)}

    def sweep(self, moves: Sequence[Move]) -> None:
        """Make some moves of the walk."""
        for kind, i in moves:
            clique = self.tree.cliques[i]
            if kind == "down":
                down = self.tree.cliques[clique.parent].down[self.places[i]]
                self.downs[i] = scaled(self.contracted(down))[0]
            elif kind == "up":
                self.ups[i] = scaled(self.contracted(clique.up))[0]
            else:
                for (part, name), contraction in self.own(clique):
                    if part == "evidence" and name in self.site:
                        self.fit(str(name), self.contracted(contraction))

    def fit(self, name: str, rest: Tensor) -> None:
        """Set w_i = q_i / cav_i on the masked rows of a site; ``rest`` is the cavity without its own evidence."""
        i = self.site[name]
        cavity = rest + self.base[name]
        total = safe_logsumexp(cavity, -1)[..., None]
        cavity = cavity - torch.where(total == -torch.inf, 0.0, total)
        cavity, target = torch.broadcast_tensors(cavity, self.target[:, i])
        # A token that the prior or the network rules out stays ruled out: no weight can restore it.
        out = (target == -torch.inf) | (cavity == -torch.inf)
        weight = torch.where(out, 0.0, target) - torch.where(out, 0.0, cavity)
        if name in self.weights and weight.numel():
            change = torch.where(out, 0.0, weight - torch.where(out, 0.0, self.weights[name])).detach()
            largest = (change.abs().amax(-1) * self.masked[:, i]).amax()
            self.residual = torch.maximum(self.residual, largest)
        self.weights[name] = weight = torch.where(out, -torch.inf, weight)
        fitted = torch.where(self.masked[:, i, None], self.base[name] + weight, self.base[name])
        self.evidence[name] = fitted
