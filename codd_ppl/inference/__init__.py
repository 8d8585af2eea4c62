"""Layer 3, infer: pure functions of a plan and log-potentials; exact unless an approximation was compiled by name."""

from codd_ppl.inference import dynamic_trees, spanning_trees
from codd_ppl.inference.divergence import cross_entropy, kl
from codd_ppl.inference.evidence import condition
from codd_ppl.inference.expectations import expectation
from codd_ppl.inference.loopy import LoopyResult, belief_propagation
from codd_ppl.inference.padding import lengths, pad, unpad
from codd_ppl.inference.queries import entropy, log_partition, log_score, marginals
from codd_ppl.inference.ranking import k_best
from codd_ppl.inference.sampling import mode, sample
from codd_ppl.inference.subsets import log_prob, marginal

__all__ = [
    "LoopyResult",
    "belief_propagation",
    "condition",
    "cross_entropy",
    "dynamic_trees",
    "entropy",
    "expectation",
    "k_best",
    "kl",
    "lengths",
    "log_partition",
    "log_prob",
    "log_score",
    "marginal",
    "marginals",
    "mode",
    "pad",
    "sample",
    "spanning_trees",
    "unpad",
]
