"""Layer 5, express: coupled categorical outputs as a distribution of Pyro and torch."""

from codd_ppl.distributions.coupled_categorical import CoupledCategorical
from codd_ppl.distributions.kl import kl_divergence
from codd_ppl.distributions.maximum_tree import MaximumTree
from codd_ppl.distributions.spanning_tree_mixture import SpanningTreeMixture

__all__ = ["CoupledCategorical", "MaximumTree", "SpanningTreeMixture", "kl_divergence"]
