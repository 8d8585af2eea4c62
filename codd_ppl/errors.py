"""Named errors. Every message says what was expected, what was found, where, and what to do."""

__all__ = [
    "CoddError",
    "GraphError",
    "CyclicGraphError",
    "PotentialsError",
    "ShapeError",
    "TokenError",
    "LogitsError",
    "InfeasibleError",
    "IntractableError",
    "TreewidthError",
    "ConvergenceWarning",
    "DataError",
    "ConfigError",
]


class CoddError(Exception):
    """Base of every error that this library raises on purpose."""


class GraphError(CoddError, ValueError):
    """A factor graph is malformed: unknown variable, repeated name, bad cardinality, empty scope."""


class CyclicGraphError(GraphError):
    """A loop of the factor graph stands in the way of exact inference; the message names it."""


class PotentialsError(CoddError, ValueError):
    """Log-potentials don't fit the plan: missing or unknown key, wrong shape, NaN or +inf."""


class ShapeError(CoddError, ValueError):
    """A tensor has the wrong shape or dtype."""


class TokenError(CoddError, ValueError):
    """Token ids outside the vocabulary, or values that contradict the known tokens."""


class LogitsError(CoddError, ValueError):
    """Denoiser logits hold NaN or +inf."""


class InfeasibleError(CoddError, ValueError):
    """The evidence has probability zero, so that there is nothing to sample, decode or normalise."""


class IntractableError(CoddError, ValueError):
    """The query has no exact polynomial algorithm on this graph; the message names the estimator to ask for."""


class TreewidthError(CyclicGraphError, IntractableError):
    """The graph's loops need a clique table beyond the memory limit; the message names clique, size and remedies."""


class ConvergenceWarning(UserWarning):
    """An approximation that was asked for by name stopped before it converged; the message says how far it got."""


class DataError(CoddError, ValueError):
    """A text file is missing, empty, not UTF-8, or too short for one block."""


class ConfigError(CoddError, ValueError):
    """A setting is out of range or contradicts another one."""
