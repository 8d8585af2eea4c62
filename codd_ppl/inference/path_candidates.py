"""The sweep of :mod:`codd_ppl.inference.path_tokens` where only the likeliest tokens of each site are fitted.

All others together are one more token, whose row of the emission table is what the candidates leave of its sums. So
each masked site has a table of its own, C (candidates + 1, states), and with f and b the messages from both sides

    c = C (f b),     message = C^T (q / c),     log w = log q - log(c / sum c).

What doesn't depend on the messages, and what nobody waits for, is done for all sites at once: on a GPU a small step
takes as long as its operations take to start, and nine of them are left for each site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from codd_ppl.inference.path_model import scaled
from codd_ppl.inference.semirings import LogSemiring
from codd_ppl.typing import Float, Int

__all__ = ["Candidates", "PathMessages", "ruled_out", "sweep_candidates"]

TINY = 1e-7
"""Share of a row of sums, or of a site's probability, that is rounding."""

ROOM = 1 << 21
"""Entries of the sites' tables, or of the network's law, that are gathered at a time on a CPU, to stay in the cache."""

AHEAD = 1 << 28
"""The same on other devices."""


@dataclass
class PathMessages:
    """A path in scaled linear space, from its root on.

    Attributes:
        rows: of the batch, masked at each step.
        latent: evidence of the latents, (steps, batch, states).
        move: transitions (state, next state).
        said: messages of the tokens, one (batch, states) for each step.
    """

    rows: Sequence[Int[Tensor, " rows"]]
    latent: Float[Tensor, "steps batch states"]
    move: Float[Tensor, "states states"]
    said: list[Tensor]

    def say(self, step: int, message: Float[Tensor, "rows states"]) -> None:
        """The tokens' new message of the masked rows."""
        old, rows = self.said[step], self.rows[step]
        self.said[step] = message if len(rows) == len(old) else old.index_copy(0, rows, message)

    def from_the_right(self) -> list[Tensor]:
        """Messages from the right to each step's latent."""
        own = (torch.stack(self.said) * self.latent).unbind(0)
        right = [torch.ones_like(own[0])] * len(own)
        for k in range(len(own) - 1, 0, -1):
            vector = own[k] if k + 1 == len(own) else own[k] * right[k]
            right[k - 1] = scaled(vector) @ self.move.T
        return right


def ruled_out(target: Tensor, masked: Tensor) -> Int[Tensor, " tokens"] | None:
    """The tokens that all masked sites rule out, or None where some rule out others."""
    if bool((target.amin(-1)[masked] > -torch.inf).all()):
        return torch.empty(0, dtype=torch.int64, device=target.device)
    dead = (target == -torch.inf)[masked]
    return dead[0].nonzero()[:, 0] if bool((dead == dead[0]).all()) else None


class Candidates:
    """The tables C of all masked sites, gathered a few steps at a time, and the shares q of their tokens.

    Among the others the weight is constant: they have the network's probability together, in the prior's proportions.
    Tokens that are ruled out at every site are not among them; their weight is 0.

    Args:
        table: emissions (vocab, states), rows in one piece.
        sums: of the table over the vocabulary, (states,).
        count: candidates of each site.
        out: tokens that are ruled out.
        target: log q, (batch, sites, vocab).
        where: places of the masked sites in (batch * sites), step by step.
        rows: of the batch, masked at each step.

    Attributes:
        index: their candidates, (masked, candidates).
        logs: log q of these and of the others together, (masked, candidates + 1).
    """

    def __init__(
        self,
        table: Float[Tensor, "vocab states"],
        sums: Float[Tensor, " states"],
        count: int,
        out: Int[Tensor, " tokens"],
        target: Float[Tensor, "batch sites vocab"],
        where: Int[Tensor, " masked"],
        rows: Sequence[Int[Tensor, " rows"]],
    ) -> None:
        self.table, self.sums, self.out, self.where, self.shape = table, sums, out, where, target.shape
        most, flat = ROOM if table.device.type == "cpu" else AHEAD, target.flatten(0, 1)
        if len(where) == len(flat):
            top, self.index = (found[where] for found in flat.topk(count, sorted=False))
        else:
            some = [
                flat[part].topk(count, sorted=False) for part in where.split(max(1, most // flat.shape[1]))
            ]
            top, self.index = (torch.cat(found) for found in zip(*some, strict=True))
        rest = (1 - top.exp().sum(-1, keepdim=True)).clamp(min=TINY)
        self.logs = torch.cat((top, rest.log()), -1)
        self._left = sums - table[out].to(sums.dtype).sum(0) if len(out) else sums
        self._rounding = TINY * sums
        self._ends = list(accumulate(len(some) for some in rows))
        self._most = max(1, most // ((count + 1) * table.shape[1]))
        self._room = table.new_empty(0, table.shape[1])
        self._first, self._gathered = 0, table.new_empty(0, count + 1, table.shape[1])

    def at(self, step: int) -> slice:
        """The masked sites of a step, among all of them."""
        return slice(self._ends[step - 1] if step else 0, self._ends[step])

    def tables(self, step: int) -> Float[Tensor, "rows tokens states"]:
        """C of each masked row of a step; until others are asked for."""
        some = self.at(step)
        if not self._first <= some.start <= some.stop <= self._first + len(self._gathered):
            stop = some.stop
            for end in self._ends[step + 1 :]:
                stop = end if end - some.start <= self._most else stop
            self._gather(some.start, stop)
        return self._gathered[some.start - self._first : some.stop - self._first]

    def _gather(self, start: int, stop: int) -> None:
        index = self.index[start:stop]
        index = torch.cat((index, index[:, :1]), -1)  # the last row is written over
        if len(self._room) < index.numel():  # fresh memory would cost more than reading the rows
            self._room = self.table.new_empty(index.numel(), self.table.shape[1])
        rows = torch.index_select(self.table, 0, index.flatten(), out=self._room[: index.numel()])
        found = rows.view(*index.shape, -1).to(self.sums.dtype)
        # What is left may be nothing but the rounding of these sums.
        found[:, -1] = (self._left - found[:, :-1].sum(1)).clamp_(min=0).add_(self._rounding)
        self._first, self._gathered = start, found

    def first_shares(self, weights: Tensor) -> Float[Tensor, "masked tokens"]:
        """Log-weights (batch, sites, vocab) in linear space; that of the others is their geometric mean."""
        given = weights.flatten(0, 1)[self.where]
        top, others = given.gather(-1, self.index), given.shape[-1] - self.index.shape[-1] - len(self.out)
        total = given.index_fill_(-1, self.out, 0.0).sum(-1, keepdim=True)
        mean = (total - top.sum(-1, keepdim=True)) / others
        logs = torch.cat((top, mean), -1)
        return (logs - logs.amax(-1, keepdim=True)).exp()

    def weights(self, cavity: Tensor, belief: Tensor) -> Float[Tensor, "batch sites vocab"]:
        """Log-weights, 0 at known sites, from all cavities (masked, candidates + 1) and beliefs (masked, states)."""
        logs = self.logs - cavity.log() + (belief @ self.sums).log()[:, None]
        batch, sites, vocab = self.shape
        others = logs.new_zeros(batch * sites).index_copy(0, self.where, logs[:, -1])
        result = others[:, None].expand(-1, vocab).contiguous()
        result[self.where[:, None], self.index] = logs[:, :-1]
        if len(self.out):
            result[self.where[:, None], self.out] = -torch.inf
        return result.view(self.shape)


def sweep_candidates(
    path: PathMessages,
    fit: Candidates,
    sweeps: int,
    tolerance: float,
    first: Float[Tensor, "batch sites vocab"] | None,
) -> Float[Tensor, "batch sites vocab"] | None:
    """As :func:`codd_ppl.inference.path_tokens.sweep_tokens`.

    Args:
        path: whose messages of the tokens are replaced.
        fit: at least one site is masked.
        sweeps, tolerance, first: as there.
    """
    semiring, most, shares, result = LogSemiring(), max(fit.table.shape), fit.logs.exp(), first
    if first is not None:
        begun = fit.first_shares(first)
        for k in (k for k, rows in enumerate(path.rows) if len(rows)):
            message = torch.bmm(begun[fit.at(k)][:, None], fit.tables(k))[:, 0]
            semiring.watch(message.amin() / most)
            path.say(k, message)
    for sweep in range(sweeps):
        right = path.from_the_right()
        behind = (torch.stack(right) * path.latent).unbind(0)
        left, lefts, cavities, beliefs = (
            torch.ones_like(right[0]),
            list[Tensor](),
            list[Tensor](),
            list[Tensor](),
        )
        for k, own in enumerate(path.latent.unbind(0)):
            lefts.append(left)
            if rows := len(path.rows[k]):
                belief = left * behind[k]
                belief = belief if rows == len(belief) else belief[path.rows[k]]
                table = fit.tables(k)
                cavity = torch.bmm(belief[:, None], table.mT)
                path.say(k, torch.bmm(shares[fit.at(k)][:, None] / cavity, table)[:, 0])
                cavities.append(cavity[:, 0])
                beliefs.append(belief)
            if k + 1 < len(right):
                left = scaled(left * own * path.said[k]) @ path.move
        cavity = torch.cat(cavities)
        least = [torch.stack(lefts) * path.latent, torch.stack(right), torch.stack(path.said), cavity]
        semiring.watch(torch.stack([part.amin() for part in least]).amin() / most)
        if not semiring.safe():
            return None
        telling = tolerance > 0 and (sweep > 0 or first is not None)
        if tolerance > 0 or sweep + 1 == sweeps:
            before, result = result, fit.weights(cavity, torch.cat(beliefs))
            if telling and before is not None:
                gap = result - before
                if float(torch.where(torch.isfinite(gap), gap, 0.0).abs().amax()) <= tolerance:
                    break
    return result
