"""Latent couplings that read the denoiser's hidden states: evidence of latents, gates on their edges, emissions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.graphs import FactorGraph
from codd_ppl.potentials.emission_correction import EmissionCorrection
from codd_ppl.potentials.heads import Head, spread
from codd_ppl.potentials.latent import LatentPotentials
from codd_ppl.typing import Float, Int

__all__ = ["ContextualLatentPotentials"]

OPEN = 6.0
"""Gates start at sigmoid(6) = 0.9975: the coupling starts as the static one, to rounding with ``gates=False``."""


class ContextualLatentPotentials(nn.Module):
    """Conditional tables along a directed forest (:class:`LatentPotentials`), modulated by hidden states h:

        psi(z_a; h)      = exp(MLP(h_a)[z_a])                                        evidence of each latent
        psi(z_a, z_b; h) = g P(z_b | z_a) + (1 - g) r(z_b),  g = sigmoid(MLP(h_a, h_b))   with ``gates``: with
                           probability 1 - g the edge forgets its parent and z_b comes from the reset law r
        psi(z_a, x_i; h) = P(x_i | z_a) exp(sum_k MLP(h_i)[k] B_k[z_a] C_k[x_i])     with ``emission_rank``

    (latent- and parameter-space modulation, arXiv:2603.00045, appendix E). h_a is the mean of the hidden states of the
    tokens that hang on the latent, or, if none does, of those below it. All start without effect, or nearly, so that a
    coupling fitted to text alone starts as it was; they are trained on the bound (:class:`codd_ppl.CoDDModule`). Gates
    give every edge and batch element a table of its own, (batch, edges, states, states) numbers, and emissions every
    site: (batch, sites, states, vocab), see :class:`EmissionCorrection`.

    Args:
        graph: a directed forest of latents over tokens, such as ``topologies.hidden_markov``.
        hidden_size: of the denoiser.
        width: of the networks' hidden layer.
        gates: whether edges between latents are gated.
        seed: of the random start.
        emission_rank: terms of the correction of emissions; 0: none.
        mask_ratio: whether the networks read the share of masked sites, too, also without effect at first.
        reduced: read hidden states through a fixed matrix, ``reduction`` (hidden_size, reduced), the first columns of
            the identity until it is set; 0: as they are.

    Attributes:
        needs_ratio: whether :meth:`forward` must be given ``ratio``, as :class:`CouplingLayer` then does.

    Raises:
        GraphError: scopes that don't read as a directed forest.
        ConfigError: no latents, no hidden size, or emissions that can't be corrected (:class:`EmissionCorrection`).
    """

    place: Tensor
    reduction: Tensor | None

    def __init__(
        self,
        graph: FactorGraph,
        hidden_size: int,
        width: int = 128,
        gates: bool = False,
        seed: int = 0,
        emission_rank: int = 0,
        mask_ratio: bool = False,
        reduced: int = 0,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or width < 1 or emission_rank < 0 or not 0 <= reduced <= hidden_size:
            raise ConfigError(
                "expected hidden_size and width >= 1, emission_rank >= 0 and reduced from 0 to hidden_size, found "
                f"{hidden_size}, {width}, {emission_rank} and {reduced}"
            )
        self.static = LatentPotentials(graph, seed)
        self.hidden_size, self.width, self.gates = hidden_size, width, gates
        self.emission_rank, self.mask_ratio, self.reduced = emission_rank, mask_ratio, reduced
        self.register_buffer("reduction", torch.eye(hidden_size, reduced) if reduced else None)
        size_read = reduced or hidden_size
        latents = [v for v in graph if v.latent]
        if not latents:
            raise ConfigError(
                "the graph has no latents to modulate; use TablePotentials, or a latent topology"
            )
        self._latents = {
            size: tuple(v.name for v in latents if v.cardinality == size)
            for size in dict.fromkeys(v.cardinality for v in latents)
        }
        order = [name for names in self._latents.values() for name in names]
        self.register_buffer("place", _means(graph, order), persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = nn.LayerNorm(size_read)
            self.evidence_heads = nn.ModuleDict(
                {str(size): Head(size_read, width, size, mask_ratio) for size in self._latents}
            )
            self.edges = [
                f
                for f in graph.factors.values()
                if f.order == 2 and all(graph.variables[v].latent for v in f.scope)
            ]
            number = {name: i for i, name in enumerate(order)}
            self._ends = [[number[v] for v in f.scope] for f in self.edges]
            self.gate_head = Head(2 * size_read, width, 1, mask_ratio) if gates and self.edges else None
            self.resets = nn.ParameterDict()
            if self.gate_head is not None:
                last = self.gate_head[-1]
                assert isinstance(last, nn.Linear)
                nn.init.constant_(last.bias, OPEN)
                for size in {graph.variables[f.scope[1]].cardinality for f in self.edges}:
                    self.resets[str(size)] = nn.Parameter(torch.zeros(size))
            self.emissions = (
                EmissionCorrection(graph, size_read, width, emission_rank, mask_ratio)
                if emission_rank
                else None
            )

    @property
    def needs_ratio(self) -> bool:
        """Whether the share of masked sites is read."""
        return self.mask_ratio

    def forward(
        self,
        hidden: Float[Tensor, "*batch sites hidden"] | None = None,
        ratio: Float[Tensor, "*batch"] | None = None,
    ) -> dict[str | tuple[str, ...], Float[Tensor, "..."]]:
        """The static tables, evidence of the latents under the tuple of their names, and the tables modulated.

        Args:
            hidden: of the denoiser.
            ratio: share of masked sites; read with ``mask_ratio`` only.

        Raises:
            ShapeError: no hidden states, or of another size; no ratio where one is read.
        """
        result: dict[str | tuple[str, ...], Tensor] = dict(self.static())
        if hidden is None or hidden.shape[-2:] != (self.place.shape[1], self.hidden_size):
            found = None if hidden is None else tuple(hidden.shape)
            raise ShapeError(
                f"contextual potentials read hidden states (*batch, {self.place.shape[1]}, {self.hidden_size}), found "
                f"{found}; pass hidden=output.hidden of the denoiser to the coupling"
            )
        hidden = hidden.to(self.place.dtype)
        ratio = spread(ratio, hidden) if self.mask_ratio else None
        normed = self.norm(hidden if self.reduction is None else hidden @ self.reduction)
        means = self.place @ normed
        start = 0
        for size, names in self._latents.items():
            result[names] = self.evidence_heads[str(size)](means[..., start : start + len(names), :], ratio)
            start += len(names)
        if self.gate_head is not None:
            self._gate(result, means, ratio)
        return result if self.emissions is None else self.emissions(result, normed, ratio)

    def _gate(self, result: dict[str | tuple[str, ...], Tensor], means: Tensor, ratio: Tensor | None) -> None:
        """Edges of one tie become one stack of tables (*batch, edges, states, states); their tie's table goes."""
        assert self.gate_head is not None
        ends = torch.tensor(self._ends, device=means.device)
        logits = self.gate_head(means[..., ends, :].flatten(-2), ratio)[..., 0]
        groups: dict[str, list[int]] = {}
        for i, factor in enumerate(self.edges):
            groups.setdefault(factor.tie or factor.name, []).append(i)
        for key, members in groups.items():
            table = result.pop(key)
            reset = self.resets[str(table.shape[-1])].log_softmax(-1)
            gate = logits[..., members, None, None]
            mixed = torch.logaddexp(
                nn.functional.logsigmoid(gate) + table, nn.functional.logsigmoid(-gate) + reset
            )
            result[tuple(self.edges[i].name for i in members)] = mixed

    def evidence(self) -> None:
        """None: the tables are a complete prior."""
        return None

    def init_from_corpus(
        self, blocks: Int[Tensor, "blocks sites"], *, progress: bool = True, seed: int = 0, **settings: Any
    ) -> Any:
        """Fit the static tables to text (:meth:`LatentPotentials.init_from_corpus`); the networks stay as they are.

        The reset laws become the mean rows of the edges' tables.
        """
        trace = self.static.init_from_corpus(blocks, progress=progress, seed=seed, **settings)
        tables: Mapping[str, Tensor] = self.static()
        with torch.no_grad():
            for size, reset in self.resets.items():
                keys = {f.tie or f.name for f in self.edges}
                rows = [tables[k].detach().exp().mean(0) for k in keys if tables[k].shape[-1] == int(size)]
                reset.copy_(torch.stack(rows).mean(0).log())
        return trace


def _means(graph: FactorGraph, order: list[str]) -> Tensor:
    """Rows of weights over the sites, (latents, sites): the mean of a latent's own tokens, else of those below it."""
    site = {name: i for i, name in enumerate(graph.tokens)}
    children: dict[str, list[str]] = {}
    for factor in graph.factors.values():
        if factor.order == 2:
            children.setdefault(factor.scope[0], []).append(factor.scope[1])
    below: dict[str, set[int]] = {}
    stack = [(name, False) for name in order]
    while stack:  # tokens at or below each latent, children first
        name, ready = stack.pop()
        if name in below:
            continue
        if not ready:
            stack.append((name, True))
            stack += [(child, False) for child in children.get(name, ()) if child not in site]
            continue
        own = {site[c] for c in children.get(name, ()) if c in site}
        below[name] = own or set().union(*(below[c] for c in children.get(name, ())))
    result = torch.zeros(len(order), len(site))
    for row, name in zip(result, order, strict=True):
        places = sorted(below[name]) or list(site.values())
        row[places] = 1 / len(places)
    return result
