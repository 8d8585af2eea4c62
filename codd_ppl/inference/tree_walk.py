"""The walk over a plan's forest that :mod:`codd_ppl.inference.projection` fits the sites along, and its messages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.inference.semirings import LogSemiring, safe_logsumexp
from codd_ppl.inference.tables import StepTable, Tables
from codd_ppl.inference.tree import Upward

__all__ = ["TreeWalk", "walk"]

Move = tuple[
    str, int, int, int
]  # ("visit" | "again", variable index, -, -) | ("down" | "up", step, position, child axis)


@lru_cache(maxsize=128)
def walk(plan: ContractionPlan) -> tuple[Move, ...]:
    """Depth-first walk over the plan's forest, children in reading order of the first token below them.

    Moves: visit a variable; go down a factor to one of its children; come back up from it; visit again a token
    that has children, once more each time the walk comes back to it (only leaves are the last ones seen from both
    sides, so inner tokens need it for a fast convergence).
    """
    names = [v.name for v in plan.variables]
    number = {name: i for i, name in enumerate(names)}
    rank = {v.name: (v.latent, i) for i, v in enumerate(plan.variables)}
    first = dict(rank)  # smallest token below each variable, filled from the leaves
    for step in plan.steps:
        for m in step.messages:
            first[m.parent] = min(first[m.parent], *(first[c] for c in m.children))
    moves: list[Move] = []
    stack: list[Move] = [("visit", number[r], 0, 0) for r in reversed(plan.roots)]
    while stack:
        move = stack.pop()
        moves.append(move)
        if move[0] != "visit":
            continue
        todo: list[Move] = []
        messages = [(s, g, plan.steps[s].messages[g]) for s, g in plan.below[names[move[1]]]]
        for s, g, m in sorted(messages, key=lambda item: min(first[c] for c in item[2].children)):
            for c, child in enumerate(m.children):
                todo += [("down", s, g, c), ("visit", number[child], 0, 0), ("up", s, g, c)]
            todo += [] if plan.variables[move[1]].latent else [("again", move[1], 0, 0)]
        stack += reversed(todo)
    return tuple(moves)


class TreeWalk:
    """Messages of one batch while the walk goes on; nothing is edited in place, so autograd can follow.

    ``up`` holds the prior with the first weights, ``prior`` is without; ``first`` (batch, sites, vocab) are these.
    """

    def __init__(
        self,
        up: Upward,
        prior: Tables,
        sites: Sequence[str],
        target: Tensor,
        masked: Tensor,
        first: Tensor | None,
        semiring: LogSemiring,
    ) -> None:
        self.plan, self.tables, self.semiring = up.plan, up.tables, semiring
        self.site = {name: i for i, name in enumerate(sites)}
        self.target, self.masked = target, masked
        self.evidence = {v.name: self.tables.evidence((v.name,))[:, 0] for v in self.plan.variables}
        self.base = {v.name: prior.evidence((v.name,))[:, 0] for v in self.plan.variables}
        self.weights: dict[str, Tensor] = (
            {} if first is None else dict(zip(sites, first.unbind(1), strict=True))
        )
        self.up_messages = {
            (s, g): up.message(s)[:, g]
            for s, step in enumerate(self.plan.steps)
            for g in range(len(step.messages))
        }
        self.down_messages: dict[str, Tensor] = {}
        self.residual: Tensor | None = None

    def run(self, moves: tuple[Move, ...]) -> None:
        """Make some moves of the walk."""
        for kind, a, g, c in moves:
            if kind in ("visit", "again"):
                self.visit(self.plan.variables[a].name)
            elif kind == "down":
                self.down(a, g, c)
            else:
                self.up(a, g)

    def visit(self, name: str) -> None:
        """Set w_i = q_i / cav_i on the masked rows of a token."""
        if name not in self.site:
            return
        i = self.site[name]
        cavity = self.belief(name, evidence=self.base[name])
        scale = safe_logsumexp(cavity, -1)[..., None]
        cavity = cavity - torch.where(scale == -torch.inf, 0.0, scale)
        target = self.target[:, i]
        cavity, target = torch.broadcast_tensors(cavity, target)
        # A token that the prior or the network rules out stays ruled out: no weight can restore it.
        out = (target == -torch.inf) | (cavity == -torch.inf)
        weight = torch.where(out, -torch.inf, torch.where(out, 0.0, target) - torch.where(out, 0.0, cavity))
        if name in self.weights:
            change = torch.where(out, 0.0, weight - torch.where(out, 0.0, self.weights[name])).detach()
            gap = (
                (change.abs().amax(-1) * self.masked[:, i]).amax() if change.numel() else change.new_zeros(())
            )
            self.residual = gap if self.residual is None else torch.maximum(self.residual, gap)
        self.weights[name] = weight
        self.evidence[name] = torch.where(self.masked[:, i, None], self.base[name] + weight, self.base[name])

    def belief(self, name: str, evidence: Tensor, without: tuple[int, int] | None = None) -> Tensor:
        """Evidence times the messages to a variable, those of one factor left out."""
        total = evidence
        if name in self.down_messages:
            total = total + self.down_messages[name]
        for where in self.plan.below[name]:
            if where != without:
                total = total + self.up_messages[where]
        return total

    def _table(self, s: int, g: int) -> StepTable:
        table = self.tables.step(s)
        return table if table.log.shape[1] == 1 else _Slice(table, g)

    def _children(self, s: int, g: int) -> list[Tensor]:
        result = []
        for child in self.plan.steps[s].messages[g].children:
            total = self.evidence[child]
            for where in self.plan.below[child]:
                total = total + self.up_messages[where]
            result.append(total[:, None])
        return result

    def down(self, s: int, g: int, c: int) -> None:
        """Send the message to a child of a factor."""
        step, message = self.plan.steps[s], self.plan.steps[s].messages[g]
        outer = self.belief(message.parent, self.evidence[message.parent], without=(s, g))[:, None]
        sent = self.semiring.down(step, self._table(s, g), outer, self._children(s, g), c)[:, 0]
        self.down_messages[message.children[c]] = sent

    def up(self, s: int, g: int) -> None:
        """Send the message to the parent of a factor."""
        sent, _ = self.semiring.up(self.plan.steps[s], self._table(s, g), self._children(s, g))
        self.up_messages[s, g] = sent[:, 0]


class _Slice(StepTable):
    """One message's table out of a step's, sharing the step's exponentials."""

    def __init__(self, whole: StepTable, message: int) -> None:
        pick = slice(message, message + 1)
        super().__init__(whole.log[:, pick])
        self.__dict__["scale"] = whole.scale[:, pick]
        self.__dict__["linear"] = whole.linear[:, pick]
