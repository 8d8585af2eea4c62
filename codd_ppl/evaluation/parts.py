"""What a model is made of, in a few words and numbers that JSON takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import interaction_graph, is_chain, is_forest

__all__ = ["describe_coupling", "describe_network", "graph_kind", "plain_notes"]

SIZES = ("hidden_size", "layers", "heads", "kernel_size")


def graph_kind(graph: FactorGraph) -> str:
    """Its kind by structure: independent, chain, tree, mixture, hidden Markov, latent tree, or graph with loops.

    A tree may be a forest. Hidden Markov: the latents form one path, and every token hangs on one of its own.
    """
    latents = [variable.name for variable in graph if variable.latent]
    if not graph.factors:
        return "independent"
    if not is_forest(graph):
        return "graph with loops"
    if not latents:
        return "chain" if is_chain(graph) else "tree"
    if len(latents) == 1:
        return "mixture"
    primal = interaction_graph(graph)
    core = primal.subgraph(latents)
    hung = {name: set(primal[name]) for name in graph.tokens}
    own = {neighbour for near in hung.values() for neighbour in near}
    path = core.number_of_edges() == len(latents) - 1 and max(degree for _, degree in core.degree) <= 2
    alone = all(len(near) == 1 for near in hung.values()) and len(own) == len(graph.tokens) == len(latents)
    return "hidden Markov" if path and alone and own <= set(latents) else "latent tree"


def describe_network(denoiser: Denoiser) -> dict[str, Any]:
    """Class, number of parameters, and the sizes that a `TransformerConfig` has."""
    config = getattr(denoiser, "config", None)
    sizes = {name: getattr(config, name) for name in SIZES if hasattr(config, name)}
    return {"class": type(denoiser).__name__, "parameters": _parameters(denoiser), **sizes}


def describe_coupling(coupling: CouplingLayer) -> dict[str, Any]:
    """Kind of graph, latents and their states (one number if all have it), potentials, how they are combined."""
    latents = [variable.cardinality for variable in coupling.graph if variable.latent]
    states = sorted(set(latents))
    found: dict[str, Any] = {"graph": graph_kind(coupling.graph), "latents": len(latents)}
    if latents:
        found["states"] = states[0] if len(states) == 1 else states
    return found | {
        "potentials": type(coupling.potentials).__name__,
        "combine": coupling.combine,
        "sweeps": coupling.sweeps,
        "tolerance": coupling.tolerance,
        "candidates": coupling.candidates,
        "pool": coupling.pool is not None,
        "parameters": _parameters(coupling),
    }


def plain_notes(about: Mapping[str, Any]) -> dict[str, Any]:
    """The writer's notes of a model folder (step, seconds, text ...), those that are one word or number."""
    return {key: value for key, value in about.items() if isinstance(value, str | int | float | bool)}


def _parameters(module: object) -> int:
    return sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else 0
