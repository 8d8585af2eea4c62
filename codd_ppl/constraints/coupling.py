"""A coupling whose draws satisfy a constraint with certainty, for the sampler and for everything that takes one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from codd_ppl.constraints.backbone import path_of
from codd_ppl.constraints.cliques import ExtendedGraph
from codd_ppl.constraints.language import Constraint
from codd_ppl.constraints.law import ConstrainedCategorical
from codd_ppl.constraints.layers import layers
from codd_ppl.constraints.lifting import lift
from codd_ppl.constraints.token_strings import token_bytes
from codd_ppl.constraints.utf8 import byte_automaton
from codd_ppl.coupling import CouplingLayer
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.errors import ConfigError, InfeasibleError
from codd_ppl.typing import Bool, Float, Int

__all__ = ["ConstrainedCoupling", "constrain"]

SHOWN = 80
"""Characters of a known text in a message."""


class ConstrainedCoupling(nn.Module):
    """The law of a coupling given that the whole text satisfies a constraint.

        p(x_M | xt, x in L)  =  p(x_M | xt) 1[x in L] / p(L | xt)

    Known tokens count as part of the text. It is called like :class:`codd_ppl.CouplingLayer`. Whatever part of a draw
    is kept, the next step can complete it, since the draw itself does.

    Args:
        coupling: along a chain, over latents (hidden Markov, mixtures) or tokens, or without factors: one pass over the
            sites. With another graph, the automaton becomes variables of the graph and its loops are contracted by
            cliques, while they are small.
        constraint: from ``constraints.regex`` and so on.
        tokenizer: a ``tokenizers.Tokenizer``, or the text of each token id (see :func:`token_bytes`).
        end: id of an end-of-text token: it may stand where the text may end, and then fills the rest of the span; it
            spells nothing.

    Raises:
        ConfigError: another kind of coupling, a span beyond the sites, a tokenizer whose tokens aren't strings.
        InfeasibleError: no sequence of as many tokens as the graph has satisfies the constraint.
        TreewidthError: a graph that is no chain, whose loops with the automaton are too large.
    """

    def __init__(
        self, coupling: CouplingLayer, constraint: Constraint, tokenizer: Any, end: int | None = None
    ) -> None:
        super().__init__()
        if not isinstance(coupling, CouplingLayer):
            raise ConfigError(
                f"constrain: expected a CouplingLayer, found {type(coupling).__name__}, which has no factor graph to "
                "put an automaton in; couple along a graph, such as topologies.hidden_markov"
            )
        if not isinstance(constraint, Constraint):
            raise ConfigError(
                f"constrain: expected a constraint, found {type(constraint).__name__}; write constraints.regex(pattern)"
            )
        self.coupling, self.constraint = coupling, constraint
        self.sites, self.vocab_size = coupling.sites, coupling.vocab_size
        self.tokens = token_bytes(tokenizer, coupling.vocab_size)
        lifted = [
            (lift(byte_automaton(clause.automaton), self.tokens, end), *clause.sites(self.sites))
            for clause in constraint.clauses
        ]
        self.layers = layers(lifted, self.sites, str(constraint))
        plan = coupling.plan
        self.path = path_of(plan, plan.tokens)
        self.extended = None if self.path is not None else ExtendedGraph(coupling.graph, self.layers)

    @property
    def warm_starts(self) -> bool:
        """Whether the coupling's projection may start from the weights of an earlier law."""
        return self.path is not None and self.coupling.warm_starts

    def forward(
        self,
        logits: Float[Tensor, "*batch sites vocab"],
        hidden: Float[Tensor, "*batch sites hidden"] | None = None,
        tokens: Int[Tensor, "*batch sites"] | None = None,
        known: Bool[Tensor, "*batch sites"] | None = None,
        start: ConstrainedCategorical | None = None,
    ) -> ConstrainedCategorical | CoupledCategorical:
        """The joint law of the masked tokens given the known ones and the constraint.

        Raises:
            InfeasibleError: of its queries, not of this call: the network or the prior rules every such text out.
        """
        begin = {} if start is None else {"start": start.prior}
        law = self.coupling(logits, hidden=hidden, tokens=tokens, known=known, **begin)
        if self.path is not None:
            return ConstrainedCategorical(law, self.layers, self.path, str(self.constraint))
        assert self.extended is not None
        return self.extended.law(law)

    def check(self, tokens: Int[Tensor, "*batch sites"], known: Bool[Tensor, "*batch sites"]) -> None:
        """Whether the known tokens can be completed to texts that satisfy the constraint; the sampler asks first.

        Raises:
            InfeasibleError: some can't; the message shows the constraint, the known text, and where it fails.
        """
        rows, seen = tokens.reshape(-1, self.sites), known.reshape(-1, self.sites)
        blocked = self.layers.possible(rows, seen)
        bad = (blocked < self.sites).nonzero()[:, 0].tolist()
        if bad:
            row, site = bad[0], int(blocked[bad[0]])
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise InfeasibleError(
                f"{self.constraint}: the known tokens of batch element {row}{more} can't be completed to a text that "
                f"satisfies it. Known ('?' is to be written): {self._shown(rows[row], seen[row])}; nothing is possible "
                f"from site {site} on. Relax the constraint, mask more sites, or give it another span"
            )

    def _shown(self, tokens: Tensor, known: Tensor) -> str:
        pieces = []
        for token, given in zip(tokens.tolist(), known.tolist(), strict=True):
            text = self.tokens[token] if given else b"?"
            pieces.append(b"<%d>" % token if text is None else text)
        shown = b"".join(pieces).decode(errors="replace")
        return repr(shown if len(shown) <= SHOWN else shown[:SHOWN] + "...")

    def extra_repr(self) -> str:
        """The constraint and how many states it needs at most at a site."""
        return f"constraint={self.constraint}, states={max(layer.states for layer in self.layers.sites)}"


def constrain(
    coupling: CouplingLayer, constraint: Constraint, tokenizer: Any, end: int | None = None
) -> ConstrainedCoupling:
    """The coupling given a constraint, ready for :class:`codd_ppl.Sampler`; see :class:`ConstrainedCoupling`."""
    return ConstrainedCoupling(coupling, constraint, tokenizer, end)
