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

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.inference.cursor import Cursor, sharpened_draw
from codd_ppl.inference.hidden_path import HiddenPath
from codd_ppl.inference.leaves import Leaves
from codd_ppl.inference.path_model import HiddenMarkov, hidden_markov
from codd_ppl.inference.tables import Tables
from codd_ppl.typing import Bool, Float, Int, LogPotentials

__all__ = ["Conditioned", "Turns", "draw_along_path", "draw_one_by_one"]

Turns = Int[Tensor, "*batch sites"] | Callable[[Tensor], Tensor]
"""When each site is drawn (:func:`codd_ppl.inference.cursor.Visits`), or a callable that reads it off the marginals."""


@runtime_checkable
class Conditioned(Protocol):
    """What a draw by full queries asks of a law."""

    @property
    def marginals(self) -> Float[Tensor, "*batch sites vocab"]:
        """Of single sites."""

    @property
    def tokens(self) -> Int[Tensor, "*batch sites"]:
        """Known tokens, 0 elsewhere."""

    @property
    def known(self) -> Bool[Tensor, "*batch sites"]:
        """Where they are."""

    def condition(
        self, value: Int[Tensor, "*batch sites"], sites: Bool[Tensor, "*batch sites"]
    ) -> Conditioned:
        """The law given tokens at some sites."""


def draw_one_by_one(
    law: Conditioned,
    turns: Turns,
    uniform: Float[Tensor, "*batch sites"],
    temperature: float,
) -> Int[Tensor, "*batch sites"]:
    """Each site by a query of the whole law given what was drawn: right on any graph, and as slow as it sounds.

    Args:
        law: that knows some tokens.
        turns: see :func:`codd_ppl.inference.cursor.Visits`, or a callable that reads them off the law's marginals;
            negative where nothing is to be drawn.
        uniform: float64, one number for each site.
        temperature: of every site.

    Returns:
        Known and drawn tokens, 0 elsewhere.
    """
    turns = turns if isinstance(turns, Tensor) else turns(law.marginals)
    turns = turns.masked_fill(law.known, -1)
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
    log_evidence: Float[Tensor, "*batch sites vocab"],
    tokens: Int[Tensor, "*batch sites"],
    known: Bool[Tensor, "*batch sites"],
    leaves: Leaves | None,
    turns: Turns,
    uniform: Float[Tensor, "*batch sites"],
    temperature: float,
    path: HiddenPath | None = None,
) -> Int[Tensor, "*batch sites"] | None:
    """The same along a hidden Markov model, from the same numbers; None for other graphs, or where it is not safe.

    Args:
        plan, log_potentials: of the law, without the evidence of the tokens.
        log_evidence, tokens, known: of its tokens.
        leaves: these taken out of the graph; not needed where ``path`` has its marginals.
        turns: as in :func:`draw_one_by_one`, or a callable that reads them off the marginals (*batch, sites, vocab),
            which have no meaning at known sites.
        uniform, temperature: as there.
        path: the law's messages, where they are at hand.
    """
    count = known.shape[-1]
    sites = tuple(f"x{i}" for i in range(count))
    model = None if plan.junction is not None else hidden_markov(plan, sites)
    if model is None or model.order != tuple(range(count)) or not known.numel():
        return None
    start: HiddenPath | tuple[Tables, HiddenMarkov, Leaves]
    if path is not None and path.free_marginals is not None:
        start = path
    else:
        tables = Tables(plan, log_potentials)
        (run,) = plan.runs
        shared = tables.layout.shared.issuperset(range(run.start, run.stop))
        if leaves is None or not (
            shared and all(tables.step(k).single for k in (model.emission, model.transition))
        ):
            return None
        start = (tables, model, leaves)
    cursor = Cursor(log_evidence, temperature, start)
    if not isinstance(turns, Tensor):
        turns = turns(cursor.marginals().reshape(*known.shape, -1))
    turns = turns.masked_fill(known, -1)
    drawn = cursor.draw_all(turns.reshape(-1, count), uniform.reshape(-1, count).T.contiguous())
    if not cursor.safe:
        return None
    return torch.where(turns >= 0, drawn.T.reshape(turns.shape), tokens)
