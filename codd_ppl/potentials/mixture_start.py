"""Mixtures of latent priors as one prior whose tables have blocks, and a start of them from clusters of the text.

With K components of H states each, a latent has K H states, those of component k being k H .. (k + 1) H - 1:

    initial = (pi_1 initial_1, .., pi_K initial_K),  transition = diag(transition_1, .., transition_K),

and the rows of the emissions one below the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from codd_ppl.errors import GraphError
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import directed_parents
from codd_ppl.potentials.clustering import contexts, k_means
from codd_ppl.potentials.starts import Clusters, Start
from codd_ppl.typing import Float, Int

__all__ = ["MixtureStart", "joined", "kinds", "part_graph"]


def kinds(graph: FactorGraph) -> dict[str, str]:
    """Tie or factor name -> "root", "latent" or "token", by the child that its table is about.

    Raises:
        GraphError: anything but one tree of latents with a unary factor on its root, and tokens as leaves of latents.
    """
    parents = directed_parents(graph)
    roots = [] if parents is None else [name for name, parent in parents.items() if parent is None]
    factors = graph.factors.values()
    single = len(roots) == 1 and any(f.scope == (roots[0],) for f in factors)
    if not single or not all(graph.variables[f.scope[0]].latent for f in factors):
        raise GraphError(
            "a mixture needs one directed tree of latents, a unary factor on its root, and every token the child of a "
            f"latent, found the roots {roots[:4]} of {len(graph)} variables; take topologies.hidden_markov, "
            "latent_tree or star(states=..)"
        )
    found: dict[str, str] = {}
    for f in factors:
        kind = "root" if f.order == 1 else "latent" if graph.variables[f.scope[1]].latent else "token"
        if found.setdefault(f.tie or f.name, kind) != kind:
            raise GraphError(f"the table {f.tie!r} has latents and tokens as children; give them two ties")
    return found


def part_graph(graph: FactorGraph, components: int) -> FactorGraph:
    """The graph of one component: each latent with its share of the states.

    Raises:
        GraphError: states that can't be shared equally, or a graph of another kind (see :func:`kinds`).
    """
    kinds(graph)
    result = FactorGraph()
    for v in graph:
        if components < 1 or (v.latent and v.cardinality % components):
            raise GraphError(
                f"expected the states of every latent to be a multiple of the components, found {v.cardinality} of "
                f"{v.name!r} for {components}"
            )
        result.add_variable(
            v.name, v.cardinality // components if v.latent else v.cardinality, latent=v.latent
        )
    for f in graph.factors.values():
        result.add_factor(f.scope, name=f.name, tie=f.tie)
    return result


def joined(kind: str, parts: Float[Tensor, "parts *shape"], weights: Float[Tensor, "*batch parts"]) -> Tensor:
    """The components' tables of one kind, stacked, as one table of the mixture; log space, -inf between blocks.

    Args:
        kind: "root", whose components get the weights, "latent" or "token".
        parts: log-probabilities.
        weights: log pi.
    """
    if kind == "root":
        return (weights[..., None] + parts).flatten(-2)
    if kind == "token":
        return parts.flatten(0, 1)
    count, rows, columns = parts.shape
    own = torch.eye(count, dtype=torch.bool, device=parts.device)[:, None, :, None]
    return torch.where(own, parts[:, :, None, :], -torch.inf).reshape(count * rows, count * columns)


@dataclass(frozen=True)
class MixtureStart:
    """Components start on clusters of blocks by the tokens in them (k-means, Hellinger distance), one each.

    Args:
        components: of the mixture.
        start: of each component, on its blocks.
        neighbours: so many of the most frequent tokens are told apart.
        blocks: so many of the text's blocks are clustered, drawn by the seed.
    """

    components: int
    start: Start = field(default_factory=Clusters)
    neighbours: int = 256
    blocks: int = 20_000

    def tables(
        self, graph: FactorGraph, blocks: Int[Tensor, "blocks sites"], generator: torch.Generator
    ) -> dict[str, Float[Tensor, "..."]]:
        """Tie or factor name -> log-probabilities over the last axis, with blocks.

        Raises:
            GraphError: a graph of another kind (see :func:`part_graph`).
        """
        part = part_graph(graph, self.components)
        some = blocks[torch.randperm(len(blocks), generator=generator)[: self.blocks]]
        number = torch.arange(len(some))[:, None].expand_as(some)
        points = contexts(some, number, len(some), (0,), self.neighbours)
        own, _ = k_means(points, min(self.components, len(some)), generator=generator)
        parts, counts = [], []
        for k in range(self.components):
            chosen = some[own == k]
            counts.append(len(chosen) + 1.0)
            parts.append(self.start.tables(part, chosen if len(chosen) else some, generator))
        return mixed(graph, parts, torch.tensor(counts).log().log_softmax(-1))


def mixed(
    graph: FactorGraph, parts: Sequence[Mapping[str, Tensor]], weights: Float[Tensor, "parts"]
) -> dict[str, Float[Tensor, "..."]]:
    """Tables of the mixture from those of its components and log pi."""
    return {
        name: joined(kind, torch.stack([part[name].to(weights) for part in parts]), weights)
        for name, kind in kinds(graph).items()
    }
