"""Unmasking policies by name."""

from collections.abc import Callable

from codd_ppl.errors import ConfigError
from codd_ppl.sampling.adaptive import ConfidenceThreshold, EntropyBound, JointConfidence, JointEntropy
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
    if isinstance(name_or_policy, str):
        if name_or_policy not in named:
            raise ConfigError(
                f"unmasking: expected one of {', '.join(named)} or a policy object, found {name_or_policy!r}; "
                "pass one of these names, or an object with a method reveal(state) -> bool (batch, sites)"
            )
        return named[name_or_policy]()
    if isinstance(name_or_policy, type) or not isinstance(name_or_policy, UnmaskingPolicy):
        raise ConfigError(
            f"unmasking: expected a name or an object with a method reveal(state), found {name_or_policy!r}; "
            "pass one of " + ", ".join(named) + ", or an instance of a class that has that method"
        )
    return name_or_policy
