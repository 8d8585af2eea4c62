"""The couplings whose cost is measured beside a large network, and how much arithmetic each of them is.

All are along one hidden Markov model with random tables, which cost what fitted ones do: no operation here depends on
the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from codd_ppl.coupling import CouplingLayer
from codd_ppl.graphs import topologies
from codd_ppl.sampling.drawing import AnyOrder, Draw, Joint, Latent

__all__ = ["DRAWINGS", "Variant", "bytes_needed", "drawing_at", "variants"]

DRAWINGS = ("joint", "latent", "any_order")
"""Ways to draw that a large vocabulary allows."""


@dataclass(frozen=True)
class Variant:
    """A coupling and a way to draw from it."""

    name: str
    coupling: CouplingLayer
    draw: Draw

    def flops(self, states: int) -> int:
        """Floating-point operations of matrix products in a step that finds all sites of one sequence masked.

        With L sites, V tokens, H states, K candidates, and one pass along the path, P = 2 (L - 1) H^2:

            the sweep       2 P + 4 L (K + 1) H   (4 L V H with all tokens; nothing for a plain product)
            the law         2 L V H         (the fitted evidence times the emissions)
            a joint draw    P
            any order       4 L V H + (2 + turns) P   at most

        Elementwise work isn't in it, nor is what the factorised draw does as well. Compiled loops, which PyTorch's
        counter doesn't see, are.
        """
        sites, vocab = self.coupling.sites, self.coupling.vocab_size
        each, along = 2 * sites * vocab * states, 2 * (sites - 1) * states**2
        count = each
        if self.coupling.combine == "projected":
            few = self.coupling.candidates
            count += 2 * along + (2 * each if few is None else 4 * sites * (few + 1) * states)
        if isinstance(self.draw, AnyOrder) and self.draw.temperature != 1:
            turns = sites if self.draw.turns is None else self.draw.turns
            return count + 2 * each + (2 + turns) * along
        return count + along


def bytes_needed(vocab: int, states: int, sites: int, batch: int) -> int:
    """About what all of this takes: the emissions four times (parameters, logarithms, exponentials, these by token),
    and ten numbers for each token of each site.
    """
    return 4 * (4 * (vocab + states) * states + 10 * batch * sites * vocab)


def drawing_at(name: str, temperature: float) -> Draw:
    """The way to draw of that name; ``any_order`` at temperature 1 would be a joint draw."""
    return Joint() if name == "joint" else Latent(temperature) if name == "latent" else AnyOrder(temperature)


def variants(
    sites: int,
    vocab: int,
    states: int,
    candidates: Sequence[int],
    drawings: Mapping[str, Draw],
    device: torch.device,
    seed: int = 0,
) -> list[Variant]:
    """Projected with each number of candidates ("top 64") and drawn in each way; projected with all tokens, and as a
    plain product, drawn in the first way. They share their tables.
    """
    graph = topologies.hidden_markov(sites, vocab, states)
    first = CouplingLayer(graph, vocab, seed=seed).to(device)
    tables = first.potentials
    found = [
        Variant(f"top {few}, {name}", coupling, draw)
        for few in candidates
        for coupling in [CouplingLayer(graph, vocab, potentials=tables, candidates=few)]
        for name, draw in drawings.items()
    ]
    name, draw = next(iter(drawings.items()))
    product = CouplingLayer(graph, vocab, combine="product", potentials=tables)
    return [
        *found,
        Variant(f"all tokens, {name}", first, draw),
        Variant(f"product, {name}", product, draw),
    ]
