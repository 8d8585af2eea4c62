"""What potentials, and the coupling that holds them, are built from, as JSON values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from codd_ppl.errors import ConfigError
from codd_ppl.graphs import FactorGraph
from codd_ppl.potentials.contextual import ContextualLatentPotentials
from codd_ppl.potentials.latent import LatentPotentials
from codd_ppl.potentials.low_rank import LowRankPotentials
from codd_ppl.potentials.mixture import MixturePotentials
from codd_ppl.potentials.pool import LogarithmicPool
from codd_ppl.potentials.table import TablePotentials
from codd_ppl.potentials.tied import TiedEmissionPotentials

__all__ = ["KINDS", "SETTINGS", "build_layer", "build_potentials", "describe"]

KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        ContextualLatentPotentials,
        LatentPotentials,
        LowRankPotentials,
        MixturePotentials,
        TablePotentials,
        TiedEmissionPotentials,
    )
}
SETTINGS = {
    "ContextualLatentPotentials": ("hidden_size", "width", "gates", "emission_rank", "mask_ratio", "reduced"),
    "MixturePotentials": ("components", "hidden_size", "width", "mask_ratio"),
    "TiedEmissionPotentials": ("rank",),
}
"""What a kind of potentials is built from, beside the graph: attributes of the same names."""


def describe(layer: Any) -> dict[str, Any]:
    """Kind and settings of a coupling's potentials, and how it combines logits and prior, as JSON values.

    Raises:
        ConfigError: potentials of a kind that a file can't describe.
    """
    kind = type(layer.potentials).__name__
    if kind not in KINDS:
        raise ConfigError(
            f"expected potentials of one of the kinds {', '.join(KINDS)}, found {kind}; keep "
            "torch.save(module.state_dict()) beside the code that builds it"
        )
    return {
        "potentials": kind,
        "settings": {name: getattr(layer.potentials, name) for name in SETTINGS.get(kind, ())},
        "combine": layer.combine,
        "sweeps": layer.sweeps,
        "tolerance": layer.tolerance,
        "candidates": layer.candidates,
        "pool": None if layer.pool is None else layer.pool.knots[1:].tolist(),
    }


def build_potentials(graph: FactorGraph, about: dict[str, Any], unembedding: Tensor | None = None) -> Any:
    """Potentials as :func:`describe` said, their weights still to be loaded.

    Raises:
        ConfigError: emissions tied to an unembedding that isn't given.
    """
    kind, given = KINDS[about["potentials"]], dict(about.get("settings", {}))
    if kind is TiedEmissionPotentials:
        if unembedding is None:
            raise ConfigError(
                "the emissions are tied to the network's unembedding, which isn't in the file: give "
                "unembedding=denoiser.unembedding"
            )
        given["unembedding"] = unembedding
    return kind(graph, **given)


def build_layer(
    kind: Any, graph: FactorGraph, vocab_size: int, potentials: Any, about: dict[str, Any]
) -> Any:
    """A coupling of the class ``kind`` that combines as :func:`describe` said; its pool's weights are still to come."""
    return kind(
        graph,
        vocab_size,
        getattr(potentials, "hidden_size", None),
        combine=about["combine"],
        sweeps=about["sweeps"],
        tolerance=about.get("tolerance", 0.0),
        candidates=about.get("candidates"),
        potentials=potentials,
        pool=LogarithmicPool(about["pool"]) if about.get("pool") else None,
    )
