"""The automaton as variables of the factor graph, for graphs that are no path along the sites."""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.compiler import compile
from codd_ppl.constraints.layers import Layers
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.graphs import FactorGraph

__all__ = ["ExtendedGraph"]


class ExtendedGraph:
    """The graph with two latents more for each site: the class c_i of its token, the automaton's state a_i behind it.

        psi(x_i, c_i) = 1[x_i is in class c_i],     psi(a_{i-1}, c_i, a_i) = 1[a_{i-1} -c_i-> a_i]

    Its loops are contracted by cliques (:mod:`codd_ppl.inference.cliques`), so that the answer is exact; the cost grows
    with the cliques, and a graph whose cliques are too large is refused when this is built.

    Args:
        graph: of the law.
        layers: the automaton, site by site.

    Raises:
        TreewidthError: a clique beyond the memory limit.
    """

    def __init__(self, graph: FactorGraph, layers: Layers) -> None:
        extended, self.tables = FactorGraph(), dict[str, Tensor]()
        for variable in graph:
            extended.add_variable(variable.name, variable.cardinality, latent=variable.latent)
        for factor in graph.factors.values():
            extended.add_factor(factor.scope, name=factor.name, tie=factor.tie)
        before, count = "", len(layers.sites)
        for i, (token, layer) in enumerate(zip(graph.tokens, layers.sites, strict=True)):
            classes, here, after = len(layer.following), f"class of {token}", f"automaton behind {token}"
            states = layers.sites[i + 1].states if i + 1 < count else 1
            extended.add_variable(here, classes, latent=True)
            extended.add_variable(after, states, latent=True)
            member = layer.classes[layer.phase_class][:, None] == torch.arange(classes)
            step = torch.zeros(layer.states, classes, states, dtype=torch.bool)
            step[tuple(layer.edges)] = True
            self._add(extended, (token, here), member)
            self._add(extended, (before, here, after) if i else (here, after), step if i else step[0])
            before = after
        self.plan = compile(extended)

    def _add(self, graph: FactorGraph, scope: tuple[str, ...], possible: Tensor) -> None:
        graph.add_factor(scope)
        self.tables[",".join(scope)] = torch.where(possible, 0.0, -torch.inf)

    def law(self, prior: CoupledCategorical) -> CoupledCategorical:
        """The law given the constraint; its latents include the automaton, which its tokens determine."""
        evidence = prior.log_evidence
        potentials = {k: v for k, v in prior.log_potentials.items() if k != prior.sites}
        potentials.update((k, v.to(evidence)) for k, v in self.tables.items())
        return CoupledCategorical(self.plan, potentials, evidence, prior.tokens, prior.known)
