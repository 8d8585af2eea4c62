"""Draws of one site after the other, in any order, each given what is known and drawn so far.

Along a hidden Markov model with one emission table P and one transition table T a message from the left, f, and one
from the right, b, meet at every site:

    c_i = (f_i b_i) P,      p(x_i | known, drawn) proportional to u_i(x_i) c_i(x_i).

A cursor stands where both are up to date: f at and left of it, b at and right of it. A draw at the cursor changes the
message of one token, and no message that meets at the cursor. To move by one site is one product of a vector with T.
So a set of sites in reading order costs one sweep, and so does one against it; any order costs the way that the cursor
goes. Vectors are scaled to a largest entry of 1 at every move. What a draw can lose to underflow is then small against
its total, unless that total is near the smallest number: then the draw is made again from the same uniform numbers by
full queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.inference.path_projection import HiddenMarkov, hidden_markov, linear_form
from codd_ppl.inference.products import invert
from codd_ppl.inference.tables import Tables
from codd_ppl.typing import Bool, Float, Int, LogPotentials

__all__ = ["Conditioned", "draw_along_path", "draw_one_by_one", "visits"]

BELOW_ONE = 1 - 2**-50
"""Uniform numbers are multiplied by it, so that their product with a sum stays below the sum."""


class Conditioned(Protocol):
    """What a draw by full queries asks of a law."""

    @property
    def marginals(self) -> Float[Tensor, "*batch sites vocab"]:
        """Of single sites."""

    @property
    def tokens(self) -> Int[Tensor, "*batch sites"]:
        """Known tokens, 0 elsewhere."""

    def condition(
        self, value: Int[Tensor, "*batch sites"], sites: Bool[Tensor, "*batch sites"]
    ) -> Conditioned:
        """The law given tokens at some sites."""


def visits(turns: Int[Tensor, "batch sites"]) -> Iterator[tuple[int, Tensor]]:
    """Sites in the order in which they are visited, and the rows that draw there.

    Turn 0 goes along the sites, turn 1 back, turn 2 along them again; rows meet at the same site.
    """
    sites, count = turns.shape[1], int(turns.max()) + 1 if turns.numel() else 0
    place = torch.arange(sites, device=turns.device)
    turn = turns.clamp_min(0)
    key = turn * sites + torch.where(turn % 2 == 0, place, sites - 1 - place)
    key = torch.where(turns >= 0, key, count * sites)  # last, and left out
    order = key.T.flatten().argsort(stable=True)
    sizes = key.flatten().bincount(minlength=count * sites + 1)[:-1].tolist()
    rows = (order % turns.shape[0])[: sum(sizes)].split([size for size in sizes if size])
    keys = (k for k, size in enumerate(sizes) if size)
    for k, row in zip(keys, rows, strict=True):
        yield (k % sites if k // sites % 2 == 0 else sites - 1 - k % sites), row


def sharpened_draw(weights: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Values (rows,) of weights (rows, vocab) to the power 1 / temperature, from uniform numbers (rows,)."""
    if temperature != 1:
        top = weights.amax(-1, keepdim=True)
        weights = (weights / top).double().pow(1 / temperature)
    return invert(weights, uniform * BELOW_ONE)


def draw_one_by_one(
    law: Conditioned,
    turns: Int[Tensor, "*batch sites"],
    uniform: Float[Tensor, "*batch sites"],
    temperature: float,
) -> Int[Tensor, "*batch sites"]:
    """Each site by a query of the whole law given what was drawn: right on any graph, and as slow as it sounds.

    Args:
        law: that knows some tokens.
        turns: see :func:`visits`; negative where nothing is to be drawn.
        uniform: float64, one number for each site.
        temperature: of every site.

    Returns:
        Known and drawn tokens, 0 elsewhere.
    """
    shape, sites = turns.shape, turns.shape[-1]
    flat, number = turns.reshape(-1, sites), uniform.reshape(-1, sites)
    values = law.tokens.reshape(-1, sites).clone()
    drawn = torch.zeros_like(flat, dtype=torch.bool)
    place = torch.arange(sites, device=turns.device)
    turn = flat.clamp_min(0)
    key = turn * sites + torch.where(turn % 2 == 0, place, sites - 1 - place)
    order = torch.where(flat >= 0, key, key.amax() + 1 if key.numel() else 0).argsort(dim=-1, stable=True)
    left = (flat >= 0).sum(-1)
    rows = torch.arange(len(flat), device=turns.device)
    for n in range(int(left.max()) if left.numel() else 0):
        given = law.condition(values.reshape(shape), drawn.reshape(shape)) if n else law
        some = rows[left > n]
        site = order[some, n]
        weights = given.marginals.reshape(len(flat), sites, -1)[some, site]
        values[some, site] = sharpened_draw(weights, number[some, site], temperature)
        drawn[some, site] = True
    return values.reshape(shape)


def draw_along_path(
    plan: ContractionPlan,
    log_potentials: LogPotentials,
    sites: tuple[str, ...],
    tokens: Int[Tensor, "*batch sites"],
    turns: Int[Tensor, "*batch sites"],
    uniform: Float[Tensor, "*batch sites"],
    temperature: float,
) -> Int[Tensor, "*batch sites"] | None:
    """The same along a hidden Markov model, from the same numbers; None for other graphs, or where it is not safe.

    Args:
        plan, log_potentials: with known tokens clamped as evidence of all sites, under one key.
        sites: the tokens in reading order.
        tokens: known ones, 0 elsewhere.
        turns, uniform, temperature: as in :func:`draw_one_by_one`.
    """
    model = None if plan.junction is not None else hidden_markov(plan, sites)
    if model is None or model.order != tuple(range(len(sites))) or not turns.numel():
        return None
    tables = Tables(plan, log_potentials)
    (run,) = plan.runs
    emission, transition = tables.step(model.emission), tables.step(model.transition)
    if not (tables.layout.shared.issuperset(range(run.start, run.stop)) and emission.single and transition.single):
        return None
    flat = turns.reshape(-1, len(sites))
    cursor = _Cursor.of(tables, model, sites, len(flat), temperature)
    drawn = torch.zeros_like(flat)
    for site, rows in visits(flat):
        cursor.go(site)
        drawn[rows, site] = cursor.draw(rows, uniform.reshape(flat.shape)[rows, site])
    if not cursor.safe:
        return None
    return torch.where(turns >= 0, drawn.reshape(turns.shape), tokens)


@dataclass
class _Cursor:
    """Messages around one site of the path, all laid out (sites, batch, ..).

    Attributes:
        emit, turned: emission table in linear space (vocab, states), and its transpose, laid out for products.
        ahead, behind: transition table (state, next state), and its transpose.
        evidence: of the tokens, (sites, batch, vocab).
        latent: evidence of the latents, the emission table's scales included, (sites, batch or 1, states).
        said: the tokens' messages to their latents, times these latents' evidence.
        left, right: messages from both sides.
        temperature: of the draws.
        floors: largest entries and totals, which must not be near the smallest number.
    """

    emit: Tensor
    turned: Tensor
    ahead: Tensor
    behind: Tensor
    evidence: Tensor
    latent: Tensor
    said: list[Tensor]
    left: list[Tensor]
    right: list[Tensor]
    temperature: float
    floors: list[Tensor]
    place: int = 0

    @classmethod
    def of(
        cls, tables: Tables, model: HiddenMarkov, sites: tuple[str, ...], batch: int, temperature: float
    ) -> _Cursor:
        """At the first site, after one sweep from the right."""
        emission = tables.step(model.emission)
        emit = emission.stored[0, 0].to(tables.dtype)
        latent = linear_form(tables.evidence(model.latents) + emission.scale[:, 0, None], -1).transpose(0, 1)
        evidence = linear_form(tables.evidence(sites), -1).expand(batch, -1, -1).transpose(0, 1)
        ahead = linear_form(tables.step(model.transition).log[0, 0].T).contiguous()
        said = list(((evidence @ emit) * latent).unbind(0))
        ones = torch.ones_like(said[0])
        turned = emit.T.contiguous()
        self = cls(
            emit.contiguous(), turned, ahead, ahead.T.contiguous(), evidence, latent, said,
            [ones] * len(sites), [ones] * len(sites), temperature, [],
        )  # fmt: skip
        self.place = len(sites) - 1
        self.go(0)
        return self

    def go(self, site: int) -> None:
        """Move to a site."""
        while self.place < site:
            self.left[self.place + 1] = self._sent(self.left[self.place], self.ahead)
            self.place += 1
        while self.place > site:
            self.right[self.place - 1] = self._sent(self.right[self.place], self.behind)
            self.place -= 1

    def _sent(self, message: Tensor, table: Tensor) -> Tensor:
        vector = message * self.said[self.place]
        top = vector.amax(-1, keepdim=True)
        self.floors.append(top)
        return torch.mm(vector.div_(top), table)

    def draw(self, rows: Tensor, uniform: Tensor) -> Tensor:
        """Values of the token here, of some rows of the batch, (rows,); they are known from now on."""
        i, every = self.place, len(rows) == len(self.said[0])
        latent, evidence = self.latent[i], self.evidence[i]
        belief = self.left[i] * self.right[i] * latent
        if not every:
            belief, evidence = belief[rows], evidence[rows]
            latent = latent if len(latent) == 1 else latent[rows]
        else:
            uniform = uniform[rows.argsort()]
        weights = torch.mm(belief, self.turned) * evidence
        self.floors.append(weights.amax(-1, keepdim=True))
        if self.temperature > 1:  # flattens, so that small weights count
            self.floors.append(weights.masked_fill(evidence == 0, torch.inf).amin(-1, keepdim=True))
        values = sharpened_draw(weights, uniform, self.temperature)
        said = self.emit[values] * latent
        if every:
            self.said[i] = said
            return values[rows]
        self.said[i] = self.said[i].index_copy(0, rows, said)
        return values

    @property
    def safe(self) -> bool:
        """Whether every total was far enough from the smallest number, times as many states as were summed."""
        if not self.floors:
            return True
        info = torch.finfo(self.emit.dtype)
        least = torch.cat(self.floors).amin()
        return bool(least > info.tiny / info.eps * len(self.emit.T))
