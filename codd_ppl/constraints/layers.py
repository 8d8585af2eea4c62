"""The automaton of a whole sequence, site by site: only states that lead from the beginning to a valid end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codd_ppl.constraints.lifting import TokenAutomaton
from codd_ppl.errors import InfeasibleError
from codd_ppl.typing import Bool, Int

__all__ = ["Groups", "Layer", "Layers", "layers"]

Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Groups:
    """The tokens that are possible at a site, those of one class together.

    Attributes:
        tokens: (possible,) ids.
        class_of: (possible,) their classes, ascending.
        sizes: how many each class has.
    """

    tokens: Int[Tensor, " possible"]
    class_of: Int[Tensor, " possible"]
    sizes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """One site: which states are there before it, and what each class of tokens does to them.

    Attributes:
        states: number of states before the site.
        following: (classes, states) place among the states before the next site; -1: impossible.
        phase_class: (vocab,) a class of every token, shared by the sites under the same clauses.
        classes: (phase classes,) this site's class, -1 if impossible.
        edges: (3, edges) state before, class and state after of all that is possible.
        groups: the possible tokens by class.
    """

    states: int
    following: Int[Tensor, "classes states"]
    phase_class: Int[Tensor, " vocab"]
    classes: Int[Tensor, " phase_classes"]
    edges: Int[Tensor, "3 edges"]
    groups: Groups


@dataclass(frozen=True, eq=False)
class Layers:
    """A layer for each site; before the first there is one state, behind the last one, too."""

    sites: tuple[Layer, ...]

    @cached_property
    def _on(self) -> dict[torch.device, tuple[Layer, ...]]:
        return {}

    def on(self, device: torch.device) -> tuple[Layer, ...]:
        """The layers on a device; what sites share they share there, too."""
        if device not in self._on:
            kept = dict[int, Tensor | Groups]()

            def moved(value: Any) -> Any:
                if id(value) not in kept:
                    kept[id(value)] = (
                        Groups(value.tokens.to(device), value.class_of.to(device), value.sizes)
                        if isinstance(value, Groups)
                        else value.to(device)
                    )
                return kept[id(value)]

            self._on[device] = tuple(
                Layer(s.states, *map(moved, (s.following, s.phase_class, s.classes, s.edges, s.groups)))
                for s in self.sites
            )
        return self._on[device]

    def possible(
        self, tokens: Int[Tensor, "batch sites"], known: Bool[Tensor, "batch sites"]
    ) -> Int[Tensor, " batch"]:
        """The first site at which the known tokens leave no state, for each sequence; the number of sites: none."""
        alive = known.new_ones(len(known), 1)
        blocked = torch.full((len(known),), len(self.sites), device=known.device)
        for i, layer in enumerate(self.on(known.device)):
            value = layer.classes[layer.phase_class[tokens[:, i].clamp(0, len(layer.phase_class) - 1)]]
            before, through, after = layer.edges
            fits = ~known[:, i, None] | (value[:, None] == through)
            step = (alive[:, before] & fits).to(torch.uint8)
            states = self.sites[i + 1].states if i + 1 < len(self.sites) else 1
            reached = step.new_zeros(len(known), states)
            alive = reached.scatter_reduce(1, after.expand_as(step), step, "amax") > 0
            blocked = torch.where(~alive.any(-1) & (blocked == len(self.sites)), i, blocked)
        return blocked


def layers(clauses: Sequence[tuple[TokenAutomaton, int, int]], sites: int, name: str) -> Layers:
    """Follow all clauses at once from the first site to the last, then drop what leads nowhere.

    The state before a site holds one automaton's state for each clause: its first before the span, a common one behind
    it, so that clauses on different stretches don't multiply. States from which the rest is the same are joined.

    Args:
        clauses: token automata with the sites [start, stop) that they read.
        sites: of the sequence.
        name: of the constraint, for the message.

    Raises:
        InfeasibleError: no sequence of tokens satisfies the clauses.
    """
    before = np.zeros((1, len(clauses)), np.int64)
    phases = dict[tuple[int, ...], tuple[Tensor, Array]]()
    steps = list[tuple[Tensor, Array]]()
    for i in range(sites):
        active = tuple(k for k, (_, start, stop) in enumerate(clauses) if start <= i < stop)
        if active not in phases:
            phases[active] = _phase([clauses[k][0] for k in active], len(clauses[0][0].class_of))
        class_of, parts = phases[active]
        after = np.repeat(before[None], len(parts), 0)  # (classes, states, clauses)
        dead = np.zeros(after.shape[:2], bool)
        for column, k in enumerate(active):
            automaton, _, stop = clauses[k]
            after[..., k] = automaton.following[parts[:, column, None], before[None, :, k]]
            dead |= after[..., k] < 0
            if i + 1 == stop:
                dead |= ~automaton.accepting[after[..., k]]
                after[..., k] = 0
        alive = ~dead
        if not alive.any():
            raise InfeasibleError(
                f"{name}: no sequence of {sites} tokens satisfies it; the last chance ends at site {i}. Give it "
                "another span or length, an end token if the text may be shorter, or tokens that can spell it"
            )
        before, place = np.unique(after[alive], axis=0, return_inverse=True)
        following = np.full(dead.shape, -1)
        following[alive] = place.reshape(-1)
        steps.append((class_of, following))
    return Layers(tuple(reversed(list(_pruned(steps)))))


def _phase(automata: list[TokenAutomaton], vocab: int) -> tuple[Tensor, Array]:
    """Class of each token under several automata, (vocab,), and of each class the class in each automaton."""
    if not automata:
        return torch.zeros(vocab, dtype=torch.int64), np.zeros((1, 0), np.int64)
    stacked = np.stack([a.class_of for a in automata], 1)
    parts, class_of = np.unique(stacked, axis=0, return_inverse=True)
    return torch.from_numpy(class_of.reshape(-1).astype(np.int64)), parts


def _pruned(steps: list[tuple[Tensor, Array]]):  # type: ignore[no-untyped-def]
    """Layers from the last to the first, without dead ends; equal states and equal classes joined."""
    place = np.zeros(1, np.int64)  # of the states behind the site, -1: dead
    known = dict[tuple[int, bytes], Groups]()
    for phase_class, following in reversed(steps):
        following = np.where(following >= 0, place[following], -1)
        columns, place = np.unique(following, axis=1, return_inverse=True)
        place = place.reshape(-1)
        alive = (columns >= 0).any(0)
        renumbered = np.where(alive, np.cumsum(alive) - 1, -1)
        place, following = renumbered[place], columns[:, alive]
        rows, classes = np.unique(following, axis=0, return_inverse=True)
        classes = classes.reshape(-1)
        alive = (rows >= 0).any(1)
        classes, following = np.where(alive, np.cumsum(alive) - 1, -1)[classes], rows[alive]
        key = (id(phase_class), classes.tobytes())
        if key not in known:
            known[key] = _groups(phase_class, torch.from_numpy(classes))
        through, before = (following >= 0).nonzero()
        edges = np.stack((before, through, following[through, before]))
        yield Layer(
            following.shape[1],
            torch.from_numpy(following),
            phase_class,
            torch.from_numpy(classes),
            torch.from_numpy(edges),
            known[key],
        )


def _groups(phase_class: Tensor, classes: Tensor) -> Groups:
    mine = classes[phase_class]
    tokens = (mine >= 0).nonzero()[:, 0]
    order = mine[tokens].argsort(stable=True)
    tokens = tokens[order]
    return Groups(tokens, mine[tokens], tuple(mine[tokens].bincount().tolist()))
