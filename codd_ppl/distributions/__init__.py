"""Layer 5, express: coupled categorical outputs as a distribution of Pyro and torch."""

from codd_ppl.distributions.coupled_categorical import CoupledCategorical
from codd_ppl.distributions.kl import kl_divergence

__all__ = ["CoupledCategorical", "kl_divergence"]
