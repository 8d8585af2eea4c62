"""Emissions that hidden states modulate, by a correction of low rank to the logarithms of an emission table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from codd_ppl.errors import ConfigError
from codd_ppl.graphs import FactorGraph
from codd_ppl.potentials.heads import Head
from codd_ppl.potentials.table import table_shapes
from codd_ppl.typing import Float

__all__ = ["LARGEST_EMISSIONS", "EmissionCorrection"]

LARGEST_EMISSIONS = 1 << 16
"""Entries of one site's emission table from which it is refused: every site of every batch element gets its own."""


class EmissionCorrection(nn.Module):
    """For each token x that hangs on a latent z, with h the hidden state of the token's site and r the mask ratio,

        log psi(z, x; h) = log P(x | z) + sum_k a_k(h, r) B_k[z] C_k[x]

    (parameter-space modulation, arXiv:2603.00045, appendix E, of low rank). a is a network whose output starts at 0, so
    that the start is P. Factors of one tie share B and C. The tables take (batch, sites, states, vocab) numbers: for
    small vocabularies.

    Args:
        graph: a directed forest with latents over tokens.
        hidden_size, width: of the hidden states, and of the network's hidden layer.
        rank: terms of the sum.
        mask_ratio: whether a reads r, too.

    Raises:
        ConfigError: no token hangs on a latent, a rank below 1, or a table above :data:`LARGEST_EMISSIONS`.
    """

    def __init__(
        self, graph: FactorGraph, hidden_size: int, width: int, rank: int, mask_ratio: bool = False
    ) -> None:
        super().__init__()
        site, shapes = {name: i for i, name in enumerate(graph.tokens)}, table_shapes(graph)
        self._users: dict[str, list[tuple[str, int]]] = {}
        for factor in graph.factors.values():
            if factor.order == 2 and factor.scope[1] in site and graph.variables[factor.scope[0]].latent:
                users = self._users.setdefault(factor.tie or factor.name, [])
                users.append((factor.name, site[factor.scope[1]]))
        if rank < 1 or not self._users:
            raise ConfigError(
                "expected a rank >= 1 and tokens that hang on latents, whose emissions it corrects, found "
                f"rank = {rank} and {len(self._users)} emission tables; take a latent topology, or emission_rank=0"
            )
        for name in self._users:
            states, vocab = shapes[name]
            if states * vocab > LARGEST_EMISSIONS:
                raise ConfigError(
                    f"emission_rank={rank}: every site would get a table {name!r} of {states} x {vocab} = "
                    f"{states * vocab:,} entries of its own (at most {LARGEST_EMISSIONS:,}); use "
                    "emission_rank=0, the evidence of latents remains"
                )
        self.head = Head(hidden_size, width, rank, mask_ratio)
        self.states, self.values = nn.ParameterDict(), nn.ParameterDict()
        self._keys = {name: f"table{i}" for i, name in enumerate(self._users)}
        for name, key in self._keys.items():
            states, vocab = shapes[name]
            self.states[key] = nn.Parameter(torch.randn(states, rank))
            self.values[key] = nn.Parameter(torch.randn(rank, vocab))

    def forward(
        self,
        tables: dict[str | tuple[str, ...], Tensor],
        hidden: Float[Tensor, "*batch sites hidden"],
        ratio: Float[Tensor, "*batch"] | None = None,
    ) -> dict[str | tuple[str, ...], Float[Tensor, "..."]]:
        """The tables with those of emissions replaced by a stack for each tie, (*batch, factors, states, vocab).

        Args:
            tables: the static ones, by tie or factor name.
            hidden: normed hidden states.
            ratio: share of masked sites, for ``mask_ratio``.
        """
        strength, result = self.head(hidden, ratio), dict(tables)
        for name, users in self._users.items():
            places = torch.tensor([place for _, place in users], device=hidden.device)
            states, values = self.states[self._keys[name]], self.values[self._keys[name]]
            change = (strength[..., places, None, :] * states) @ values
            result[tuple(factor for factor, _ in users)] = result.pop(name) + change
        return result
