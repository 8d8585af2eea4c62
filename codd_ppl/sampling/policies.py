"""Unmasking policies by name."""

from collections.abc import Callable

from codd_ppl.sampling.adaptive import ConfidenceThreshold, EntropyBound, JointConfidence, JointEntropy
from codd_ppl.sampling.names import by_name
from codd_ppl.sampling.unmasking import (
    Entropy,
    LowConfidence,
    Margin,
    RandomOrder,
    RandomUnmasking,
    UnmaskingPolicy,
)

__all__ = ["unmasking_policy"]


def unmasking_policy(name_or_policy: str | UnmaskingPolicy) -> UnmaskingPolicy:
    """The policy of that name, with its defaults; a policy object is handed back as it is.

    Names: ``random``, ``random_order``, ``low_confidence``, ``margin``, ``entropy``, and, adaptive,
    ``joint_confidence``, ``joint_entropy``, ``entropy_bound``, ``confidence_threshold``.

    Raises:
        ConfigError: unknown name, or an object without a ``reveal`` method.
    """
    named: dict[str, Callable[[], UnmaskingPolicy]] = {
        "random": RandomUnmasking,
        "random_order": RandomOrder,
        "low_confidence": LowConfidence,
        "margin": Margin,
        "entropy": Entropy,
        "joint_confidence": JointConfidence,
        "joint_entropy": JointEntropy,
        "entropy_bound": EntropyBound,
        "confidence_threshold": ConfidenceThreshold,
    }
    like = "an object with a method reveal(state) -> bool (batch, sites)"
    return by_name("unmasking", name_or_policy, named, UnmaskingPolicy, like)
