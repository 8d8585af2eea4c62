"""Layer 3, infer: pure functions of a plan and log-potentials, exact on every forest."""

from codd_ppl.inference.queries import entropy, log_partition, log_score, marginals
from codd_ppl.inference.sampling import mode, sample

__all__ = ["entropy", "log_partition", "log_score", "marginals", "mode", "sample"]
