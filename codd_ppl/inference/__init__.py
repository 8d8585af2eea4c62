"""Layer 3, infer: pure functions of a plan and log-potentials; exact unless an approximation was compiled by name."""

from codd_ppl.inference.loopy import LoopyResult, belief_propagation
from codd_ppl.inference.queries import entropy, log_partition, log_score, marginals
from codd_ppl.inference.sampling import mode, sample

__all__ = [
    "LoopyResult",
    "belief_propagation",
    "entropy",
    "log_partition",
    "log_score",
    "marginals",
    "mode",
    "sample",
]
