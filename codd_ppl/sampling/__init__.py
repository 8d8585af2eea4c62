"""Generate: unmasking policies and the few-step sampler."""

from codd_ppl.sampling.protocol import Coupling, JointDistribution, WarmCoupling
from codd_ppl.sampling.sampler import Generation, Sampler
from codd_ppl.sampling.unmasking import (
    Entropy,
    LowConfidence,
    Margin,
    RandomOrder,
    RandomUnmasking,
    RevealState,
    UnmaskingPolicy,
    coupled_marginals,
    network_marginals,
    unmasking_policy,
)

__all__ = [
    "Coupling",
    "Entropy",
    "Generation",
    "JointDistribution",
    "WarmCoupling",
    "LowConfidence",
    "Margin",
    "RandomOrder",
    "RandomUnmasking",
    "RevealState",
    "Sampler",
    "UnmaskingPolicy",
    "coupled_marginals",
    "network_marginals",
    "unmasking_policy",
]
