"""The k most probable assignments: the tree sweep with sorted lists of scores for numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan, Step
from codd_ppl.errors import ConfigError
from codd_ppl.inference import clique_ranking, loopy
from codd_ppl.inference.cliques import require_proper
from codd_ppl.inference.scores import log_score
from codd_ppl.inference.semirings import log_joint
from codd_ppl.inference.tables import StepTable, Tables
from codd_ppl.inference.transforms import eager
from codd_ppl.typing import Float, Int, LogPotentials

__all__ = ["k_best"]

CHUNK = 1 << 22
"""A step's candidates are looked at in slices of about so many."""


@eager
def k_best(
    plan: ContractionPlan, log_potentials: LogPotentials, k: int
) -> tuple[Float[Tensor, "*batch k"], dict[str, Int[Tensor, "*batch k"]]]:
    """The k most probable joint assignments of all variables, latents included, exactly.

    Max-product whose numbers are sorted lists of k scores (the k-max semiring of Goodman 1999, "Semiring parsing"). A
    pair of lists has at most k log k combinations that can be among the k best, and a message only needs the lists of
    its k best children's values, so that the cost is that of :func:`codd_ppl.inference.mode` plus k^2 log k for every
    parent value. Memory: one integer for each message, parent value and rank. With loops the space of assignments is
    split around each one that was found (Lawler 1972; Nilsson 1998), at the cost of a mode for each variable and rank.

    Args:
        plan, log_potentials: as in :func:`codd_ppl.inference.log_partition`.
        k: how many, at least 1.

    Returns:
        log scores, (*batch, k), descending: log_score of each (subtract log_partition for log-probabilities;
        differentiable), and variable -> (*batch, k) values. Equally good assignments come in any order. Where fewer
        than k assignments are possible, the rest has score -inf and value -1 (infeasible log-potentials: all of it).

    Raises:
        ConfigError: k is not an integer of at least 1.
        PotentialsError: malformed log-potentials, NaN or +inf.
        IntractableError: the plan is an approximation.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ConfigError(f"k_best: expected an integer k >= 1, found {k!r}")
    loopy.require_exact(plan, "k_best")
    tables = Tables(plan, log_potentials)
    require_proper(tables)
    with torch.no_grad():
        if plan.junction is not None:
            values, possible = clique_ranking.best_assignments(tables, k)
        else:
            values, possible = _Lists(tables, k).decode()
    batch = tables.batch_shape
    shaped = {name: torch.where(possible, v, 0).T.reshape(k, *batch) for name, v in values.items()}
    scores = log_score(plan, log_potentials, shaped)
    scores = torch.where(possible.T.reshape(k, *batch), scores, -torch.inf).movedim(0, -1)
    # Scores were compared with rounding; in the last place the order may be another one.
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    found = {
        name: torch.where(possible, v, -1).reshape(*batch, k).gather(-1, order) for name, v in values.items()
    }
    return scores, found


@dataclass(frozen=True)
class _Belief:
    """A variable's list for each value, (batch or 1, cardinality, ranks), and the rank that each entry has in the
    list of every incoming message, (batch or 1, messages, cardinality, ranks)."""

    scores: Tensor
    ranks: Tensor | None


class _Lists:
    """Upward pass and decoding."""

    def __init__(self, tables: Tables, k: int) -> None:
        self.tables, self.plan, self.k = tables, tables.plan, k
        self.beliefs: dict[str, _Belief] = {}
        self.messages: list[Tensor] = []
        self.choices: list[
            Tensor
        ] = []  # of each step: joint value of the children * combinations + combination
        self.widths: list[tuple[int, ...]] = []
        for index, step in enumerate(self.plan.steps):
            children = [self._children(step, c) for c in range(len(step.shape) - 1)]
            self.widths.append(tuple(c.shape[-1] for c in children))
            scores, choice = _message(tables.step(index), children, k)
            top = scores.amax((-2, -1), keepdim=True)  # what all entries share changes no comparison
            self.messages.append(scores - torch.where(torch.isfinite(top), top, 0.0))
            self.choices.append(choice)

    def _children(self, step: Step, child: int) -> Tensor:
        """Lists of a step's children on one axis, (batch or 1, messages, cardinality, ranks)."""
        names = tuple(m.children[child] for m in step.messages)
        if not any(self.plan.below[name] for name in names):
            return self.tables.evidence(names)[..., None]
        lists = [self.belief(name).scores for name in names]
        width = max(t.shape[-1] for t in lists)
        return torch.stack(torch.broadcast_tensors(*(_padded(t, width) for t in lists)), dim=1)

    def belief(self, name: str) -> _Belief:
        if name not in self.beliefs:
            evidence = self.tables.evidence((name,))[:, 0, :, None]
            incoming = [self.messages[s][:, g] for s, g in self.plan.below[name]]
            if incoming:
                width = max(t.shape[-1] for t in incoming)
                lists = torch.stack(torch.broadcast_tensors(*(_padded(t, width) for t in incoming)), dim=1)
                scores, ranks = _merged(lists, self.k)
                self.beliefs[name] = _Belief(scores + evidence, ranks)
            else:
                self.beliefs[name] = _Belief(evidence, None)
        return self.beliefs[name]

    def decode(self) -> tuple[dict[str, Tensor], Tensor]:
        """Variable -> values (batch, k), and which of them are possible, (batch, k)."""
        k, batch, device = self.k, self.tables.batch, self.tables.device
        tops, places = [], []
        for root in self.plan.roots:
            scores = self.belief(root).scores.flatten(1)
            top, place = scores.topk(min(k, scores.shape[1]), dim=-1)
            tops.append(_padded(top, k))
            places.append(torch.nn.functional.pad(place, (0, k - place.shape[-1])))
        lists = torch.stack(torch.broadcast_tensors(*tops), dim=1)[:, :, None]
        total, ranks = _merged(lists, k)
        total, ranks = _padded(total[:, 0], k), torch.nn.functional.pad(ranks, (0, k - ranks.shape[-1]))
        possible = (total != -torch.inf).expand(batch, k)
        state: dict[str, tuple[Tensor, Tensor]] = {}
        for i, root in enumerate(self.plan.roots):
            place = places[i].expand(batch, k).gather(1, ranks[:, i, 0].expand(batch, k))
            width = self.belief(root).scores.shape[-1]
            state[root] = (place // width, place % width)
        rows = torch.arange(batch, device=device)[:, None]
        for index in range(len(self.plan.steps) - 1, -1, -1):
            step, choice, widths = self.plan.steps[index], self.choices[index], self.widths[index]
            cards = [n for axis, n in enumerate(step.shape) if axis != step.parent_axis]
            ranks_of = torch.tensor(_combinations(widths, k), device=device)
            for g, message in enumerate(step.messages):
                value, rank = state[message.parent]
                known = self.belief(message.parent).ranks
                assert known is not None
                slot = self.plan.below[message.parent].index((index, g))
                # Lists of a step are padded to one length; what is chosen from the padding is impossible.
                rank = rank.clamp(max=known.shape[-1] - 1)
                own = known.expand(batch, *known.shape[1:])[rows, slot, value, rank]
                own = own.clamp(max=choice.shape[-1] - 1)
                at = g if choice.shape[1] > 1 else 0
                picked = choice.expand(batch, *choice.shape[1:])[rows, at, value, own]
                joint, ways = picked // len(ranks_of), ranks_of[picked % len(ranks_of)]
                for c in range(len(cards) - 1, -1, -1):
                    state[message.children[c]] = (joint % cards[c], ways[..., c])
                    joint = joint // cards[c]
        return {name: state[name][0] for name in self.plan.variable}, possible


def _message(table: StepTable, children: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Lists for every parent value, (batch or 1, messages, parent, ranks), and where their entries come from."""
    batches, messages = ({t.shape[d] for t in (table.log, *children)} for d in (0, 1))
    whole = (0 if 0 in batches else max(batches), max(messages))
    size = prod(table.log.shape[2:])
    ways = len(_combinations(tuple(c.shape[-1] for c in children), k))
    each = size + min(k, size // table.log.shape[-1]) * ways * table.log.shape[-1]
    dim = 0 if whole[0] > 1 else 1
    if prod(whole) * each <= CHUNK or whole[dim] <= 1:
        return _best(table, children, k)
    width = max(1, CHUNK // (each * whole[1 - dim]))
    parts = []
    for start in range(0, whole[dim], width):
        cut = [
            t if t.shape[dim] == 1 else t.narrow(dim, start, min(width, whole[dim] - start))
            for t in (table.log, *children)
        ]
        parts.append(_message(StepTable(cut[0]), cut[1:], k))
    return torch.cat([p[0] for p in parts], dim), torch.cat([p[1] for p in parts], dim)


def _best(table: StepTable, children: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    # The k best joint values of the children by their best entries: no other value can have one of the k best.
    heads = log_joint(table, [c[..., 0] for c in children], None).flatten(2, -2).transpose(-1, -2)
    heads, values = heads.topk(min(k, heads.shape[-1]), dim=-1)  # (batch, messages, parent, values)
    combos = _combinations(tuple(c.shape[-1] for c in children), k)
    extra: Tensor | None = None
    flat, lead = values, values.shape[:2]
    for c in range(len(children) - 1, -1, -1):
        child, size = children[c].expand(*lead, *children[c].shape[2:]), children[c].shape[2]
        index = (flat % size).flatten(2)[..., None].expand(-1, -1, -1, child.shape[-1])
        lists = child.gather(2, index).reshape(*values.shape, child.shape[-1])
        # An impossible value has no entries: -inf - -inf is left out.
        drop = torch.where(lists[..., :1] == -torch.inf, -torch.inf, lists - lists[..., :1])
        part = drop[..., torch.tensor([way[c] for way in combos], device=drop.device)]
        extra = part if extra is None else extra + part
        flat = flat // size
    assert extra is not None
    candidates = (heads[..., None] + extra).flatten(-2)
    scores, place = candidates.topk(min(k, candidates.shape[-1]), dim=-1)
    return scores, values.gather(-1, place // len(combos)) * len(combos) + place % len(combos)


def _merged(lists: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best sums of one entry of each list, pair by pair: (batch, n, cardinality, ranks) -> the same without n, and
    the rank in each list, (batch, n, cardinality, ranks)."""
    number, width = lists.shape[1], lists.shape[-1]
    ranks = torch.arange(width, device=lists.device).expand(*lists.shape)[:, :, None]  # (.., groups, 1, ..)
    while lists.shape[1] > 1:
        if lists.shape[1] % 2:  # the neutral list: one entry, 0
            neutral = torch.full_like(lists[:, :1], -torch.inf)
            neutral[..., 0] = 0.0
            lists = torch.cat((lists, neutral), dim=1)
            ranks = torch.cat((ranks, torch.zeros_like(ranks[:, :1])), dim=1)
        ways = torch.tensor(_combinations((lists.shape[-1],) * 2, k), device=lists.device)
        sums = lists[:, 0::2][..., ways[:, 0]] + lists[:, 1::2][..., ways[:, 1]]
        lists, place = sums.topk(min(k, len(ways)), dim=-1)
        halves = []
        for side in (0, 1):
            half = ranks[:, side::2]
            index = ways[:, side][place][:, :, None].expand(-1, -1, half.shape[2], -1, -1)
            halves.append(half.gather(-1, index))
        ranks = torch.cat(halves, dim=2)
    return lists[:, 0], ranks[:, 0, :number]


@lru_cache(maxsize=256)
def _combinations(widths: tuple[int, ...], k: int) -> tuple[tuple[int, ...], ...]:
    """Ranks, one in each list, of sums that at most k - 1 others must beat: prod (rank + 1) <= k."""
    partial: list[tuple[int, ...]] = [()]
    for width in widths:
        partial = [(*r, i) for r in partial for i in range(min(width, k // prod(j + 1 for j in r)))]
    return tuple(partial)


def _padded(scores: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(scores, (0, width - scores.shape[-1]), value=-torch.inf)
