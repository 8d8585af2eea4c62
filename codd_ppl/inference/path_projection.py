"""The projection sweep along a hidden Markov model, in scaled linear space: a few operations a site.

The same fixed point as the walk in :mod:`codd_ppl.inference.projection`, for the case that matters most: latents on a
path, one token on each, all with one emission table P and one transition table T. With f the message from the left,
b that from the right and u the evidence of a token's values, each site in turn gets

    c = (f b) P,     w = q / (c u / sum(c u)),     f <- f (w u P^T) T.

Sites and batch elements may have tables P and T of their own, as stacks for the ties. Where T has blocks along its
diagonal and nothing else (a mixture of models), products with it are products with the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codd_ppl.inference.path_model import HiddenMarkov, linear_form, scaled
from codd_ppl.inference.semirings import LogSemiring
from codd_ppl.inference.tables import Tables

BLOCKS = 512
"""States from which on it pays to look for blocks in the transitions (tests/benchmarks/structured_transitions.json)."""

__all__ = [
    "blockwise",
    "diagonal_blocks",
    "sweep_path",
]


def sweep_path(
    tables: Tables,
    model: HiddenMarkov,
    sites: Sequence[str],
    target: Tensor,
    masked: Tensor,
    first: Tensor | None,
    sweeps: int,
    tolerance: float,
) -> Tensor | None:
    """Log-weights (batch, sites, vocab), 0 where not masked; None where this route is not safe.

    Args:
        tables: the prior, with known tokens clamped as evidence.
        model: from :func:`hidden_markov`.
        sites: the tokens.
        target: log q, (batch, sites, vocab).
        masked: (batch, sites) bool.
        first: log-weights to begin with, (batch, sites, vocab), from
            :func:`codd_ppl.inference.first_weights.first_weights`; None: all 1.
        sweeps, tolerance: as in :func:`codd_ppl.inference.projection.project`.
    """
    emission = tables.step(model.emission).log
    if not target.shape[0]:
        return None
    batch, order = target.shape[0], torch.tensor(model.order, device=target.device)
    latent = linear_form(tables.evidence(model.latents), -1).transpose(0, 1).expand(-1, batch, -1)
    evidence = linear_form(tables.evidence(tuple(sites)), -1)
    evidence = evidence.expand(batch, -1, -1)[:, order].transpose(0, 1)  # (sites, batch, vocab) from here on
    log_q, hidden = target[:, order].transpose(0, 1), masked[:, order].T[..., None]
    possible = evidence > 0
    emit, move = _emissions(emission, model), _moves(tables, model)
    states, vocab = emission.shape[3], emission.shape[2]
    parts = _Parts(emit, move, latent, torch.where(possible, log_q.exp(), 0.0), hidden)
    semiring, message = LogSemiring(), parts.heard(evidence)
    weight = before = torch.zeros_like(log_q)
    if first is not None:  # all that a sweep needs of the weights is in the messages of the tokens
        before = first[:, order].transpose(0, 1)
        message = parts.heard(evidence * linear_form(before, -1))
        semiring.watch(message.detach().amin() / max(states, vocab))
    for sweep in range(sweeps):
        right, left, message, cavity = _sweep(parts, message)
        cavity = torch.where(hidden & possible, cavity, 1.0)
        least = [v.detach().amin() for v in (right, left, message, cavity)]
        semiring.watch(torch.stack(least).amin() / max(states, vocab))
        if not semiring.safe():
            return None
        total = cavity * evidence
        share = torch.where(possible & hidden, total / total.sum(-1, keepdim=True), 1.0)
        weight = torch.where(possible, log_q - share.log(), -torch.inf)
        if (sweep or first is not None) and tolerance > 0:
            change = torch.where(torch.isfinite(weight) & hidden, weight - before, 0.0)
            if float(change.detach().abs().amax()) <= tolerance:
                break
        before = weight
    result = torch.where(hidden, weight, 0.0).transpose(0, 1)
    return result[:, order.argsort()]


@dataclass(frozen=True)
class _Parts:
    """In linear space: emission (states, vocab) and transition (state, next state) tables, and for each site

    the evidence of its latent (sites, batch, states), q where possible (sites, batch, vocab), and whether it is masked.
    Tables of their own are a list, from the root on: emissions (batch or 1, states, vocab) each, transitions
    (batch or 1, states, next state). Transitions with K blocks alone are these, (K, states / K, states / K).
    """

    emit: Tensor | list[Tensor]
    move: Tensor | list[Tensor]
    latent: Tensor
    quotient: Tensor
    hidden: Tensor

    def said(self, vector: Tensor, site: int) -> Tensor:
        """A vector over the states times the emissions of a site, (batch, vocab)."""
        if isinstance(self.emit, Tensor):
            return vector @ self.emit
        return (vector[:, None] @ self.emit[site])[:, 0]

    def back(self, vector: Tensor, site: int) -> Tensor:
        """A vector over the vocabulary times the transposed emissions of a site, (batch, states)."""
        if isinstance(self.emit, Tensor):
            return vector @ self.emit.T
        return (self.emit[site] @ vector[..., None])[..., 0]

    def heard(self, evidence: Tensor) -> Tensor:
        """The same at all sites at once, (sites, batch, states)."""
        if isinstance(self.emit, Tensor):
            return evidence @ self.emit.T
        return torch.stack([self.back(vector, i) for i, vector in enumerate(evidence.unbind(0))])

    def along(self, vector: Tensor, edge: int) -> Tensor:
        """A vector over the states at the root's end of an edge times its transition, (batch, states)."""
        if isinstance(self.move, Tensor):
            return vector @ self.move if self.move.dim() == 2 else blockwise(vector, self.move)
        return (vector[:, None] @ self.move[edge])[:, 0]

    def against(self, vector: Tensor, edge: int) -> Tensor:
        """The same from the other end."""
        if isinstance(self.move, Tensor):
            return vector @ self.move.T if self.move.dim() == 2 else blockwise(vector, self.move.mT)
        return (self.move[edge] @ vector[..., None])[..., 0]


def _emissions(log: Tensor, model: HiddenMarkov) -> Tensor | list[Tensor]:
    """From the step's tables (batch or 1, sites or 1, vocab, states)."""
    if log.shape[:2] == (1, 1):
        return linear_form(log[0, 0].T)
    each = log.unbind(1)
    return [linear_form(each[i if len(each) > 1 else 0].transpose(1, 2), (1, 2)) for i in model.emitted]


def _moves(tables: Tables, model: HiddenMarkov) -> Tensor | list[Tensor]:
    (run,) = tables.plan.runs
    if tables.layout.shared.issuperset(range(run.start, run.stop)):
        table = tables.step(model.transition).log
        if table.shape[0] == 1:
            move = linear_form(table[0, 0].T)
            blocks = diagonal_blocks(move) if len(move) >= BLOCKS else None
            return move if blocks is None else blocks
    logs = [tables.step(s).log[:, 0].transpose(1, 2) for s in range(run.stop - 1, run.start - 1, -1)]
    return [linear_form(log, (1, 2)) for log in logs]


def _sweep(parts: _Parts, message: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sweep: messages from the right, from the left, from the tokens, and cavities (1 where nothing is masked)."""
    length = message.shape[0]
    latent, quotient, chosen = parts.latent.unbind(0), parts.quotient.unbind(0), parts.hidden.unbind(0)
    some, every = parts.hidden.flatten(1).any(1).tolist(), parts.hidden.flatten(1).all(1).tolist()
    messages, cavity = list(message.unbind(0)), [torch.ones_like(quotient[0])] * length
    right = [torch.ones_like(latent[0])] * length
    for i in range(length - 1, 0, -1):
        right[i - 1] = parts.against(scaled(latent[i] * right[i] * messages[i]), i - 1)
    left = [latent[0]]
    for i in range(length):
        if some[i]:
            cavity[i] = parts.said(left[i] * right[i], i)
            new = parts.back(quotient[i] / cavity[i], i)
            messages[i] = new if every[i] else torch.where(chosen[i], new, messages[i])
        if i + 1 < length:
            left.append(parts.along(scaled(left[i] * messages[i]), i) * latent[i + 1])
    return torch.stack(right), torch.stack(left), torch.stack(messages), torch.stack(cavity)


def diagonal_blocks(table: Tensor) -> Tensor | None:
    """The equal blocks along the diagonal, (K, n / K, n / K), of a square table that is 0 elsewhere; None if K = 1."""
    reached = table.detach()[0].nonzero()
    size = int(reached[-1]) + 1 if len(reached) else len(table)
    if size == len(table) or len(table) % size:
        return None
    cut = table.unflatten(0, (-1, size)).unflatten(-1, (-1, size))
    filled = (cut.detach() != 0).any(3).any(1).fill_diagonal_(False)
    return None if bool(filled.any()) else cut.diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()


def blockwise(vector: Tensor, blocks: Tensor) -> Tensor:
    """Rows (batch, states) times the table of these blocks."""
    rows = vector.unflatten(-1, (len(blocks), -1)).transpose(0, 1)
    return torch.bmm(rows, blocks).transpose(0, 1).flatten(1)
