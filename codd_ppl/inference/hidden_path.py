"""Messages along a hidden Markov model of a small vocabulary, shared by all that a decoding step asks of it.

A step asks three things of one law: the prior's marginals given the known tokens, the weights that project it onto the
network's, and a joint draw. With P the emission table, T the transition table, m_i the message of token i to its
latent, l_i the evidence of this one, and f and b the messages from the left and from the right, in scaled linear space,

    b_{i-1} = T (m_i l_i b_i),    f_{i+1} = (f_i m_i l_i) T,    c_i = (f_i l_i b_i) P

each needs a pass one way only: the marginals are c_i times the evidence; the projection, site by site, goes to the
right with m_i = (q_i / c_i) P^T against the b of the prior, and leaves the f from which a draw goes back to the left.
Where q is pooled with the prior's marginals, the prior's own f goes to the right along with that one.
The projection is in :mod:`codd_ppl.inference.hidden_projection`; draws of one site after the other
(:mod:`codd_ppl.inference.site_by_site`) start from f and b, too.

The passes are loops of ``native.c``. Where that can't be had, linear space is not safe or a derivative is asked for,
every answer here is None, and the general queries give it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.inference import native
from codd_ppl.inference.path_model import PathModel, linear_form, path_model
from codd_ppl.inference.sampling import categorical
from codd_ppl.inference.semirings import safe_floor
from codd_ppl.inference.transforms import transforming
from codd_ppl.typing import Bool, Float, Int, LogPotentials

__all__ = ["HiddenPath"]

Arguments = tuple[Tensor | int | None, ...]


@dataclass(frozen=True)
class HiddenPath:
    """A law of partly known tokens along a hidden Markov model, and the messages that are at hand.

    Made by :meth:`of`. The batch is flattened.

    Attributes:
        model: the tables.
        tokens, free: (batch, sites) the known tokens, and where none is known.
        weight: (batch, sites, vocab) evidence of the free tokens in linear space; None: all 1.
        said: (batch, sites, states) messages of the tokens.
        ahead: messages from the left, if a projection left them.
        log_weights: of the projection, if the law comes from one.
    """

    model: PathModel
    tokens: Int[Tensor, "batch sites"]
    free: Bool[Tensor, "batch sites"]
    weight: Float[Tensor, "batch sites vocab"] | None
    said: Float[Tensor, "batch sites states"]
    ahead: Float[Tensor, "batch sites states"] | None = None
    log_weights: Float[Tensor, "batch sites vocab"] | None = None

    @classmethod
    def of(
        cls,
        plan: ContractionPlan,
        log_potentials: LogPotentials,
        sites: tuple[str, ...],
        log_evidence: Float[Tensor, "*batch sites vocab"] | None,
        tokens: Int[Tensor, "*batch sites"] | None,
        known: Bool[Tensor, "*batch sites"],
    ) -> HiddenPath | None:
        """The law of a plan, or None where it isn't such a path, or not the compiled loops' business.

        Args:
            plan, log_potentials: without evidence of the tokens.
            sites: the tokens, in reading order.
            log_evidence: of the tokens; known ones count by their value alone. None: there is none.
            tokens, known: as the evidence's batch. Without tokens the evidence counts at known sites, too; such a law
                can be projected, no more.
        """
        if transforming() or not known.numel() or known.device.type != "cpu":
            return None
        model = path_model(plan, log_potentials, sites, known.shape[:-1])
        if model is None:
            return None
        if log_evidence is not None:
            recorded = torch.is_grad_enabled() and log_evidence.requires_grad
            if recorded or log_evidence.dtype != model.emit.dtype:
                return None
        batch = prod(known.shape[:-1])
        free, weight = (~known).reshape(batch, -1).contiguous(), None
        value = torch.zeros_like(free, dtype=torch.int64)
        if tokens is not None:
            value = tokens.reshape(batch, -1).long().masked_fill(free, 0).contiguous()
        if log_evidence is None:
            read = value if tokens is None else (value + 1).masked_fill(free, 0)
            said = model.messages.index_select(0, read.flatten()).view(*free.shape, -1)
            return cls(model, value, free, None, said)
        weight = linear_form(log_evidence.reshape(batch, len(sites), -1), -1).contiguous()
        said = weight @ model.tokens
        if not bool(torch.isfinite(said).all()):
            return None
        if tokens is not None:
            said = torch.where(free[..., None], said, model.tokens[value])
        return cls(model, value, free, weight, said)

    @property
    def limit(self) -> float:
        """What results must exceed, where sums of so many terms may have lost some to underflow."""
        return safe_floor(self.said.dtype) * max(self.model.emit.shape)

    @cached_property
    def right(self) -> Float[Tensor, "batch sites states"] | None:
        """Messages from the right."""
        (_, sites, states), model = self.said.shape, self.model
        result = torch.empty_like(self.said)

        def part(cut: native.Cut) -> Arguments:
            said = cut(self.said)
            return (
                sites, len(said), states, model.back, *model.evidence(cut), said, cut(result),
                said.new_empty(len(said) * (2 * states + 1)),
            )  # fmt: skip

        least = self.run("path_right", part)
        return result if least > self.limit else None

    @cached_property
    def left(self) -> Float[Tensor, "batch sites states"] | None:
        """Messages from the left."""
        if self.ahead is not None:
            return self.ahead
        found = self.__dict__.get("_meeting")  # there if marginals were asked for
        return self.to_the_right() if found is None else found[0]

    @cached_property
    def _meeting(self) -> tuple[Tensor, Tensor] | None:
        """Messages from the left, and cavities of the free tokens so that marginals sum to 1; in one pass, or in none

        with those that a projection has left.
        """
        if self.right is None:
            return None
        if self.ahead is not None and self.weight is not None:
            cavity = (self.ahead * self.right * self.model.latent) @ self.model.emit
            total = (cavity * self.weight).sum(-1, keepdim=True)
            return (self.ahead, cavity / total) if float(total.amin()) > self.limit else None
        cavity = self.said.new_ones(*self.free.shape, self.model.emit.shape[1])
        left = self.to_the_right(cavity, self.weight)
        return None if left is None else (left, cavity)

    @cached_property
    def free_marginals(self) -> Float[Tensor, "batch sites vocab"] | None:
        """Probabilities of each free token's values; all 1 where the token is known."""
        if (found := self._meeting) is None:
            return None
        free = self.free[..., None]
        return found[1] if self.weight is None else torch.where(free, found[1] * self.weight, 1.0)

    @cached_property
    def marginals(self) -> Float[Tensor, "batch sites vocab"] | None:
        """Probabilities of each token's values, one-hot where known."""
        if (found := self.free_marginals) is None:
            return None
        one_hot = torch.zeros_like(found).scatter_(-1, self.tokens[..., None], 1.0)
        return torch.where(self.free[..., None], found, one_hot)

    @cached_property
    def log_marginals(self) -> Float[Tensor, "batch sites vocab"] | None:
        """Logarithms of the free tokens'; 0 where known, as -inf takes the logarithm ten times as long."""
        return None if self.free_marginals is None else self.free_marginals.log()

    def unconditional(self) -> HiddenPath:
        """The law with nothing known and without evidence of the tokens: of one sequence, as all are alike then, or of

        as many as there are where each has evidence of its latents.
        """
        found: HiddenPath | None = self.model.memory.get("unconditional")
        if found is None:
            rows = len(self.model.latent)
            tokens, free = torch.zeros_like(self.tokens[:rows]), torch.ones_like(self.free[:rows])
            said = self.model.messages[0].expand(rows, *self.said.shape[1:]).contiguous()
            found = HiddenPath(self.model, tokens, free, None, said)
            self.model.memory["unconditional"] = found
        return found

    def sample(
        self, sample_shape: Sequence[int], generator: torch.Generator | None
    ) -> Int[Tensor, "*shape sites"] | None:
        """Joint draws, (*sample_shape, batch, sites)."""
        if self.left is None:
            return None
        result = self.tokens.repeat(prod(sample_shape), 1, 1)  # a view would be written over by the next draw
        self._draw(self.left, generator, result)
        return result.view(*sample_shape, *self.tokens.shape)

    def sample_sharpened(
        self, temperature: float, generator: torch.Generator | None
    ) -> Int[Tensor, "batch sites"] | None:
        """States from their law, then each free token from its conditional law to the power 1 / temperature."""
        if self.left is None:
            return None
        (states,) = self._draw(self.left, generator)
        chances = self.model.emit[states]
        chances = (chances if self.weight is None else chances * self.weight)[self.free]
        result = self.tokens.clone()
        result[self.free] = categorical(chances.log_().div_(temperature), generator)
        return result

    @cached_property
    def mode(self) -> Int[Tensor, "batch sites"] | None:
        """Tokens of a most probable assignment of tokens and states; ties go to smaller values."""
        (batch, sites, states), model = self.said.shape, self.model
        vocab, said, result = model.emit.shape[1], self.said.clone(), self.tokens.clone()
        weight = said.new_ones(batch, sites, vocab) if self.weight is None else self.weight.contiguous()

        def part(cut: native.Cut) -> Arguments:
            own = cut(said)
            return (
                sites, len(own), states, vocab, model.emit, model.tokens, model.move, model.back,
                *model.evidence(cut), cut(weight), cut(self.free), own, torch.empty_like(own), cut(result),
                own.new_empty(2 * states + 1),
            )  # fmt: skip

        return result if self.run("path_best", part) > self.limit else None

    def _draw(
        self, left: Tensor, generator: torch.Generator | None, values: Tensor | None = None
    ) -> Int[Tensor, "draws batch sites"]:
        """States; free tokens are written into ``values`` (draws, batch, sites), if given."""
        batch, sites, states = self.said.shape
        vocab, draws = self.model.emit.shape[1], 1 if values is None else len(values)
        weight = self.said.new_ones(batch, sites, vocab) if self.weight is None else self.weight
        result = self.tokens.new_empty(draws, batch, sites)
        uniform = torch.rand(draws, batch, sites, 2, generator=generator, dtype=torch.float64)
        size = max(states, vocab)
        native.call(
            "path_draw", draws, sites, batch, states, vocab, *self.model.evidence(lambda whole: whole), left, self.said,
            self.model.back, self.model.emit, weight.contiguous(), self.free, uniform, result, values,
            uniform.new_empty(size + -(-size // 16)),
        )  # fmt: skip
        return result

    def run(self, name: str, part: Callable[[native.Cut], Arguments]) -> float:
        """A loop over parts of the batch, each in a thread of its own; the smallest of what they return."""
        batch, sites, states = self.said.shape
        return native.call_in_parts(name, batch, sites * states * states, part)

    def to_the_right(
        self,
        cavity: Tensor | None = None,
        weight: Tensor | None = None,
        quotient: Tensor | None = None,
        said: Tensor | None = None,
    ) -> Tensor | None:
        """Messages from the left; cavities and the tokens' new messages are written where they are given."""
        (_, sites, states), model, vocab = self.said.shape, self.model, self.model.emit.shape[1]
        left, message = torch.empty_like(self.said), self.said if said is None else said

        def part(cut: native.Cut) -> Arguments:
            own = cut(message)
            given = (None if cavity is None else self.right, weight, quotient)
            return (
                sites, len(own), states, vocab, model.emit, model.tokens, model.move, *model.evidence(cut),
                cut(self.free), *[None if t is None else cut(t) for t in given], own, cut(left),
                None if cavity is None else cut(cavity), own.new_empty(len(own) * (2 * max(states, vocab) + 1)),
                self.tokens.new_empty(len(own)),
            )  # fmt: skip

        least = self.run("path_left", part)
        return left if least > self.limit else None
