"""A place on a hidden Markov path where the messages from both sides are up to date, and draws there.

See :mod:`codd_ppl.inference.site_by_site`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codd_ppl.inference import native
from codd_ppl.inference.hidden_path import HiddenPath
from codd_ppl.inference.leaves import Leaves
from codd_ppl.inference.path_model import HiddenMarkov, linear_form
from codd_ppl.inference.products import invert, transposed_times
from codd_ppl.inference.tables import Tables
from codd_ppl.typing import Float, Int

__all__ = ["Cursor", "Visits", "sharpened_draw"]

COMPILED = 1 << 20
"""Entries of an emission table up to which the compiled loop is the faster one."""

BELOW_ONE = 1 - 2**-50
"""Uniform numbers are multiplied by it, so that their product with a sum stays below the sum."""


@dataclass(frozen=True)
class Visits:
    """Sites in the order in which they are visited, and the rows of the batch that draw there.

    Attributes:
        places: the sites.
        starts: where the rows of each visit begin, and the end of the last.
        rows: those of all visits in one piece.
    """

    places: Int[Tensor, " visits"]
    starts: Int[Tensor, " ends"]
    rows: Int[Tensor, " draws"]

    @classmethod
    def to(cls, site: int, device: torch.device) -> Visits:
        """One visit where nothing is drawn."""
        return cls(*(torch.tensor(value, dtype=torch.int64, device=device) for value in ([site], [0, 0], [])))

    @classmethod
    def of(cls, turns: Int[Tensor, "batch sites"]) -> Visits:
        """Turn 0 goes along the sites, turn 1 back, turn 2 along them again; rows meet at the same site.

        Sites with a negative turn are left out.
        """
        batch, sites = turns.shape
        turn = turns.clamp_min(0)
        place = torch.arange(sites, device=turns.device)
        key = turn * sites + torch.where(turn % 2 == 0, place, sites - 1 - place)
        key, order = key.masked_fill(turns < 0, torch.iinfo(key.dtype).max).T.flatten().sort(stable=True)
        asked, sizes = key[: int((turns >= 0).sum())].unique_consecutive(return_counts=True)
        step, turn = asked % sites, asked // sites
        places = torch.where(turn % 2 == 0, step, sites - 1 - step)
        starts = nn.functional.pad(sizes.cumsum(0), (1, 0))
        return cls(places, starts, order[: int(starts[-1])] % batch)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Each site and the rows that draw there."""
        return zip(self.places.tolist(), self.rows.split(self.starts.diff().tolist()), strict=True)


def sharpened_draw(weights: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Values (rows,) of weights (rows, vocab) to the power 1 / temperature, from uniform numbers (rows,)."""
    if temperature != 1:
        weights = (weights / weights.amax(-1, keepdim=True)).log_().div_(temperature).exp_()
    return invert(weights, uniform * BELOW_ONE)


class Cursor:
    """A place on the path, and the messages that meet there, all laid out (sites, batch, states).

    Args:
        log_evidence: of the tokens of a law, a hidden Markov model whose path is in reading order.
        temperature: of the draws.
        start: its messages, where they are at hand and have its marginals; or its tables, where they are, and its
            tokens taken out of the graph.

    Attributes:
        place: where it stands; None: anywhere, as nothing was drawn since both sweeps.
        said: the tokens' messages to their latents, times these latents' evidence.
        left, right: messages from both sides.
        floors: the totals that moves and draws rest on; none may be near the smallest number.
    """

    def __init__(
        self,
        log_evidence: Float[Tensor, "*batch sites vocab"],
        temperature: float,
        start: HiddenPath | tuple[Tables, HiddenMarkov, Leaves],
    ) -> None:
        self.log_evidence = log_evidence.reshape(-1, *log_evidence.shape[-2:])
        self.temperature = temperature
        self.floors: list[Tensor] = []
        self._marginals: Tensor | None = None
        self.place: int | None = None
        if isinstance(start, HiddenPath):
            self._begin_at(start)
        else:
            self._begin(*start)
        small = self.emit.numel() <= COMPILED and self.emit.dtype == self.said.dtype
        self.native = small and native.usable(self.said.shape[-1], self.emit, self.said)
        if self._marginals is None:
            self._visit(Visits.to(0, self.said.device), None)

    def _begin_at(self, path: HiddenPath) -> None:
        """Anywhere, as the messages from both sides are at hand."""
        assert path.left is not None and path.right is not None
        latent = path.model.latent.expand_as(path.said)
        found = (latent, path.said * latent, path.left, path.right)
        self.latent, self.said, self.left, self.right = (t.transpose(0, 1).contiguous() for t in found)
        self.emit, self.ahead, self.behind = path.model.tokens, path.model.move, path.model.back
        self._marginals = path.free_marginals

    def _begin(self, tables: Tables, model: HiddenMarkov, leaves: Leaves) -> None:
        """At the last site, with the messages of the tokens alone."""
        emission, (message,) = tables.step(model.emission), leaves.messages
        self.emit = emission.stored[0, 0]
        self.ahead = linear_form(tables.step(model.transition).log[0, 0].T).contiguous()
        self.behind = self.ahead.T.contiguous()
        count, states = message.shape[-2:]
        own = tables.evidence(model.latents)
        log = (message.reshape(-1, count, states) + own).transpose(0, 1)
        self.said = (log - log.amax(-1, keepdim=True)).contiguous().exp_()
        latent = linear_form(own + emission.scale[:, 0, None], -1).transpose(0, 1)
        self.latent = latent.expand_as(self.said).contiguous()
        self.left, self.right = torch.ones_like(self.said), torch.ones_like(self.said)
        self.place = count - 1

    def marginals(self) -> Float[Tensor, "batch sites vocab"]:
        """Of all sites, before the first draw."""
        if self._marginals is not None:
            return self._marginals
        self._visit(Visits.to(len(self.said) - 1, self.said.device), None)
        self.place = None
        belief = self.left * self.right * self.latent
        belief = (belief / belief.amax(-1, keepdim=True)).transpose(0, 1)
        evidence = self.log_evidence
        weights = (evidence - evidence.amax(-1, keepdim=True)).exp_()
        weights *= transposed_times(belief.flatten(0, 1), self.emit).view_as(weights)
        return weights.div_(weights.sum(-1, keepdim=True))

    def draw_all(self, turns: Tensor, uniform: Tensor) -> Tensor:
        """Tokens (sites, batch), 0 where nothing is drawn, from turns (batch, sites) and numbers (sites, batch)."""
        return self._visit(Visits.of(turns), uniform)

    def _visit(self, todo: Visits, uniform: Tensor | None) -> Tensor:
        """Go to each site and draw for the rows there."""
        drawn = torch.zeros(self.said.shape[:2], dtype=torch.int64, device=self.said.device)
        if not len(todo.places):
            return drawn
        self.place = int(todo.places[0]) if self.place is None else self.place
        if self.native:
            self._visit_native(todo, uniform, drawn)
            return drawn
        for site, rows in todo:
            self._go(site)
            if len(rows):
                assert uniform is not None
                every = len(rows) == drawn.shape[1]  # then in the batch's order
                part = None if every else rows
                drawn[site, rows] = self._draw(uniform[site] if every else uniform[site, rows], part)
        return drawn

    def _visit_native(self, todo: Visits, uniform: Tensor | None, drawn: Tensor) -> None:
        """The same by the loop of ``native.c``."""
        (sites, batch, states), vocab, emit = self.said.shape, self.emit.shape[0], self.emit.contiguous()
        room = self.said.new_empty(batch * (states + vocab) + vocab)
        least = native.call(
            "turns", len(todo.places), todo.places, todo.starts, todo.rows, self.place, sites, batch, states,
            vocab, emit, self.emit.T.contiguous(), self.ahead, self.behind, self.latent, self.log_evidence.contiguous(),
            torch.tensor(self.temperature, dtype=torch.float64), None if uniform is None else uniform * BELOW_ONE,
            self.said, self.left, self.right, drawn, room,
        )  # fmt: skip
        self.floors.append(self.said.new_tensor([[least]]))
        self.place = int(todo.places[-1])

    def _go(self, site: int) -> None:
        """Move to a site."""
        assert self.place is not None
        while self.place < site:
            self._send(self.left, self.place + 1, self.ahead)
        while self.place > site:
            self._send(self.right, self.place - 1, self.behind)

    def _send(self, messages: Tensor, target: int, table: Tensor) -> None:
        vector = messages[self.place] * self.said[self.place]
        top = vector.amax(-1, keepdim=True)
        self.floors.append(top)
        torch.mm(vector.div_(top), table, out=messages[target])
        self.place = target

    def _draw(self, uniform: Tensor, rows: Tensor | None) -> Tensor:
        """Values of the token here, (rows,), of some rows of the batch or all; they are known from now on."""
        i = self.place
        left, right, latent, log = self.left[i], self.right[i], self.latent[i], self.log_evidence[:, i]
        if rows is not None:
            left, right, latent, log = left[rows], right[rows], latent[rows], log[rows]
        evidence = (log - log.amax(-1, keepdim=True)).exp_()
        weights = transposed_times(left * right * latent, self.emit) * evidence
        self.floors.append(weights.amax(-1, keepdim=True))
        if self.temperature > 1:  # flattens, so that small weights count
            self.floors.append(weights.masked_fill(evidence == 0, torch.inf).amin(-1, keepdim=True))
        values = sharpened_draw(weights, uniform, self.temperature)
        said = self.emit[values].to(latent.dtype) * latent
        if rows is None:
            self.said[i] = said
        else:
            self.said[i].index_copy_(0, rows, said)
        return values

    @property
    def safe(self) -> bool:
        """Whether every total was far enough from the smallest number, times as many states as were summed."""
        if not self.floors:
            return True
        info = torch.finfo(self.ahead.dtype)
        least = torch.cat(self.floors).amin()
        return bool(least > info.tiny / info.eps * len(self.ahead))
