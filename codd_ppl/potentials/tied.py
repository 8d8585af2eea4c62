"""Latent priors whose emissions are tied to the token vectors that a network has already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from codd_ppl.compiler import compile
from codd_ppl.errors import ConfigError, GraphError, ShapeError
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import directed_parents
from codd_ppl.inference import marginals
from codd_ppl.potentials.baum_welch import baum_welch
from codd_ppl.potentials.table import table_shapes
from codd_ppl.potentials.tied_fit import TiedFit, fit_tied
from codd_ppl.potentials.trace import Trace
from codd_ppl.typing import Float, Int

__all__ = ["TiedEmissionPotentials", "TiedStart"]


@dataclass(frozen=True)
class TiedStart:
    """What :meth:`TiedEmissionPotentials.init_from_corpus` did: Baum-Welch on free tables, then a fit to these.

    Attributes:
        trace: of Baum-Welch.
        fit: of the emissions.
    """

    trace: Trace
    fit: TiedFit


class TiedEmissionPotentials(nn.Module):
    """Conditional tables along a directed forest (:class:`LatentPotentials`), with emissions

        P(x | z) = softmax_x(u_x D . e_z + b_x)

    from a network's unembedding u, (vocab, width): (states + width) rank + vocab parameters, not states x vocab (the
    softmax bottleneck of Yang et al. 2018, arXiv:1711.03953, is what that costs).

    u is held, not owned: a buffer that is not saved, no parameter, and shares its memory with the tensor that was given
    as long as neither is moved to another device or type. A model folder takes it from the network that it holds.

    Args:
        graph: a directed forest with one emission table, such as ``topologies.hidden_markov``.
        unembedding: u, for instance ``BidirectionalTransformer.unembedding``.
        rank: columns of D.
        seed: of the random start.

    Raises:
        GraphError: another kind of graph.
        ShapeError: vectors of another number of tokens.
        ConfigError: a rank outside of 1 .. width.
    """

    unembedding: Tensor

    def __init__(
        self, graph: FactorGraph, unembedding: Float[Tensor, "vocab width"], rank: int = 64, seed: int = 0
    ) -> None:
        super().__init__()
        emissions = {
            f.tie or f.name
            for f in graph.factors.values()
            if f.order == 2 and graph.variables[f.scope[0]].latent and not graph.variables[f.scope[1]].latent
        }
        if directed_parents(graph) is None or len(emissions) != 1:
            raise GraphError(
                "TiedEmissionPotentials needs scopes (parent, child) along a directed forest, and one emission table "
                f"that all tokens share, found {len(emissions)}; take topologies.hidden_markov, or LatentPotentials"
            )
        (self.emission,) = emissions
        shapes = table_shapes(graph)
        states, vocab = shapes.pop(self.emission)
        if unembedding.dim() != 2 or unembedding.shape[0] != vocab:
            raise ShapeError(
                f"expected an unembedding of shape ({vocab}, width), found {tuple(unembedding.shape)}"
            )
        width = unembedding.shape[1]
        if not 1 <= rank <= width:
            raise ConfigError(
                f"expected a rank from 1 to {width}, the width of the unembedding, found {rank}"
            )
        self.graph, self.rank = graph, rank
        self.register_buffer("unembedding", unembedding.detach(), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        self._keys = {name: f"table{i}" for i, name in enumerate(shapes)}
        self.tables = nn.ParameterDict(
            {
                self._keys[name]: nn.Parameter(0.5 * torch.randn(shape, generator=generator))
                for name, shape in shapes.items()
            }
        )
        self.projection = nn.Parameter(torch.randn(width, rank, generator=generator) / width**0.5)
        self.states = nn.Parameter(torch.randn(states, rank, generator=generator) / rank**0.5)
        self.bias = nn.Parameter(torch.zeros(vocab))
        self._kept: tuple[object, Tensor, tuple[Tensor, ...]] | None = None

    def forward(self, hidden: Tensor | None = None) -> dict[str, Float[Tensor, "..."]]:
        """Factor or tie name -> log-probabilities, without batch dimensions; ``hidden`` is not read.

        Without gradients the emission table is kept until something that it is made of changes.
        """
        result = {name: self.tables[key].log_softmax(-1) for name, key in self._keys.items()}
        result[self.emission] = self._emissions()
        return result

    def _emissions(self) -> Float[Tensor, "states vocab"]:
        parts = (self.unembedding, self.projection, self.states, self.bias)
        recorded = torch.is_grad_enabled() and any(p.requires_grad for p in parts)
        if recorded or any(type(p) not in (Tensor, nn.Parameter) or p.is_inference() for p in parts):
            return self._made()
        state = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in parts)
        if self._kept is None or self._kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                # The parts themselves are held so that no other tensor can come to be at their addresses.
                self._kept = state, self._made(), tuple(p.detach() for p in parts)
        return self._kept[1]

    def _made(self) -> Tensor:
        features = self.unembedding.to(self.projection.dtype) @ self.projection
        return (self.states @ features.T + self.bias).log_softmax(-1)

    def evidence(self) -> None:
        """None: the tables are a complete prior."""
        return None

    def init_from_corpus(
        self,
        blocks: Int[Tensor, "blocks sites"],
        *,
        progress: bool = True,
        seed: int = 0,
        iterations: int = 100,
        **settings: Any,
    ) -> TiedStart:
        """Fit free tables to text by Baum-Welch, then the emissions to the free ones (:meth:`start_from`).

        Args:
            blocks: (n, sites) int64.
            progress: show a progress bar.
            seed: of the start and the order of the blocks.
            iterations: of the emissions' fit.
            settings: passed to :func:`codd_ppl.potentials.baum_welch`.

        Raises:
            ShapeError, TokenError: blocks that don't fit the graph.
        """
        tables, trace = baum_welch(self.graph, blocks, progress=progress, seed=seed, **settings)
        fit = self.start_from(tables, iterations)
        if trace.interrupted:
            raise KeyboardInterrupt
        return TiedStart(trace, fit)

    def start_from(self, tables: Mapping[str, Float[Tensor, "..."]], iterations: int = 100) -> TiedFit:
        """Start from free tables: the latents' as they are, the emissions by :func:`fit_tied`.

        States count as often as they occur at all sites together under these tables.

        Args:
            tables: tie or factor name -> log-probabilities over the last axis, of Baum-Welch for instance.
            iterations: of L-BFGS, at most.
        """
        found = marginals(compile(self.graph), dict(tables.items()), factors=False)
        users = [f for f in self.graph.factors.values() if (f.tie or f.name) == self.emission]
        weights = torch.stack([found[f.scope[0]] for f in users]).sum(0)
        fit = fit_tied(tables[self.emission], weights, self.unembedding, self.rank, iterations)
        with torch.no_grad():
            for name, key in self._keys.items():
                self.tables[key].copy_(tables[name])
            self.projection.copy_(fit.projection)
            self.states.copy_(fit.states)
            self.bias.copy_(fit.bias)
        return fit
