"""Tied couplings on graphs of another length: the same tables, more sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from codd_ppl.coupling import CouplingLayer
from codd_ppl.errors import ConfigError, GraphError
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.potentials.description import KINDS, SETTINGS

__all__ = ["extended", "on_graph"]


def extended(coupling: CouplingLayer, sites: int) -> CouplingLayer:
    """The same coupling on ``sites`` tokens; exact, and its cost linear in the sites.

    For graphs whose tables are shared along the text: ``topologies.hidden_markov``, ``chain``, ``skip_chain``, tied
    ``star`` (a mixture), ``independent``. Parameters are shared with ``coupling``, nothing is copied.

    Args:
        coupling: on such a graph.
        sites: at least 1; longer or shorter than the coupling's own.

    Raises:
        ConfigError: another graph (latent trees and free tables belong to a length), or a length that leaves some
            table without a factor, or ``sites`` < 1.
    """
    if sites < 1:
        raise ConfigError(f"sites: expected at least 1, found {sites}")
    if sites == coupling.sites:
        return coupling
    for build in _builders(coupling.graph):
        try:
            if build(coupling.sites) == coupling.graph:
                return on_graph(coupling, build(sites))
        except GraphError:
            continue
    raise ConfigError(
        f"expected a coupling whose tables are tied along the text (hidden_markov, chain, skip_chain, star), found "
        f"{coupling.graph!r}, which belongs to {coupling.sites} sites; use WindowedCoupling or BlockSampler, or give "
        "the longer graph yourself with on_graph(coupling, graph)"
    )


def on_graph(coupling: CouplingLayer, graph: FactorGraph) -> CouplingLayer:
    """The coupling with its tables on another graph, whose ties name the same tables. Parameters are shared.

    Raises:
        ConfigError: a graph with tables of other names or shapes, or potentials of a kind that can't be rebuilt.
        GraphError: a graph that the potentials don't take.
    """
    old: Any = coupling.potentials
    kind = KINDS.get(type(old).__name__)
    if kind is not type(old):
        raise ConfigError(
            f"potentials: expected one of {', '.join(KINDS)}, found {type(old).__name__}; build CouplingLayer(graph, "
            "potentials=...) yourself"
        )
    settings = {name: getattr(old, name) for name in SETTINGS.get(kind.__name__, ())}
    if hasattr(old, "unembedding"):
        settings["unembedding"] = old.unembedding
    new = kind(graph, **settings)
    here = {name: tuple(p.shape) for name, p in new.named_parameters()}
    there = {name: tuple(p.shape) for name, p in old.named_parameters()}
    keys = getattr(new, "_keys", None), getattr(old, "_keys", None)
    if here != there or keys[0] != keys[1]:
        raise ConfigError(
            f"graph: expected tables {keys[1] or there} of shapes {there}, found {keys[0] or here} of {here}; give "
            "the same ties and cardinalities"
        )
    trainable = {name: p.requires_grad for name, p in old.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trainable[name])
    new.load_state_dict(old.state_dict(keep_vars=True), assign=True)  # the parameters themselves
    layer = CouplingLayer(
        graph,
        coupling.vocab_size,
        coupling.hidden_size,
        combine=coupling.combine,
        sweeps=coupling.sweeps,
        tolerance=coupling.tolerance,
        candidates=coupling.candidates,
        potentials=new,
        pool=coupling.pool,
    )
    return layer.train(coupling.training)


def _builders(graph: FactorGraph) -> list[Callable[[int], FactorGraph]]:
    """Topologies of any length with the cardinalities and offsets of ``graph``."""
    vocab = graph.variables[graph.tokens[0]].cardinality
    states = graph.variables[graph.latents[0]].cardinality if graph.latents else None
    found: list[Callable[[int], FactorGraph]] = [lambda n: topologies.independent(n, vocab)]
    if states is not None:
        found.append(lambda n: topologies.hidden_markov(n, vocab, states))
        for tie in {f.tie for f in graph.factors.values() if f.order == 2 and f.tie}:
            found.append(lambda n, tie=tie: topologies.star(n, vocab, states, tie=tie))  # type: ignore[misc]
        return found
    ties = {f.tie for f in graph.factors.values() if f.tie}
    found += [lambda n, tie=tie: topologies.chain(n, vocab, tie=tie) for tie in ties]  # type: ignore[misc]
    skips = [int(t.removeprefix("skip")) for t in ties if t.startswith("skip") and t[4:].isdigit()]
    found.append(lambda n: topologies.skip_chain(n, vocab, sorted(skips)))
    return found
