"""A law over tokens read as one path along the sites, so that an automaton can walk beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.constraints.products import Table
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.inference.tables import Tables
from codd_ppl.typing import Float

__all__ = ["Backbone", "Place", "path_of"]


@dataclass(frozen=True)
class Place:
    """What one site is in the graph.

    Attributes:
        token: its variable.
        latent: the latent that it hangs on; None: none.
        emission: the factor between them.
        first: the latent wasn't met at the site before.
        link: the factor to the site before; None: none, or the latent is the same.
    """

    token: str
    latent: str | None
    emission: str | None
    first: bool
    link: str | None


@lru_cache(maxsize=64)
def path_of(plan: ContractionPlan, sites: tuple[str, ...]) -> tuple[Place, ...] | None:
    """The graph as a path along the sites: independent tokens, a chain over neighbours, or one over latents.

    A latent may carry several tokens that follow each other (a mixture: all of them); missing links cut the path.

    Returns:
        A place for each site; None where the graph is something else.
    """
    pairs = [f for f in plan.factors if f.order > 1]
    if any(f.order > 2 for f in pairs):
        return None
    latent = {v.name for v in plan.variables if v.latent}
    hangs, links = dict[str, tuple[str, str]](), dict[frozenset[str], str]()
    for f in pairs:
        inside = [v for v in f.scope if v in latent]
        if len(inside) == 1:
            token = f.scope[1] if f.scope[0] in latent else f.scope[0]
            if token in hangs:
                return None
            hangs[token] = (inside[0], f.name)
        elif frozenset(f.scope) in links:
            return None
        else:
            links[frozenset(f.scope)] = f.name
    places, used, met = list[Place](), set[str](), set[str]()
    last = ""
    for token in sites:
        carrier, emission = hangs.get(token, (None, None))
        here = token if carrier is None else carrier
        first = here != last
        if first and here in met:
            return None
        link = links.get(frozenset((last, here))) if first else None
        used |= {link} if link is not None else set()
        met.add(here)
        places.append(Place(token, carrier, emission, first, link))
        last = here
    alone = latent - met
    if len(used) != len(links) or alone:
        return None
    return tuple(places)


class Backbone:
    """The numbers of a path: states z_i, evidence, emissions and transitions, in log space.

        p(x) = 1/Z  sum_z  prod_i own_i[z_i] emission_i[z_i, x_i] w_i[x_i] move_i[z_{i-1}, z_i]

    A token without a latent that is linked to another one is its own state; one without any link has a single state.

    Args:
        dist: the law.
        path: from :func:`path_of`.
    """

    def __init__(self, dist: CoupledCategorical, path: tuple[Place, ...]) -> None:
        self.path = path
        self.tables = Tables(dist.plan, dist.log_potentials)
        self.batch = self.tables.batch
        self.device = self.tables.device
        self.weights = self.tables.evidence(dist.sites)
        linked = {i for i, p in enumerate(path) if p.latent is None and p.link is not None}
        linked |= {i - 1 for i in linked}
        self._own_state = [p.latent is None and i in linked for i, p in enumerate(path)]
        self._kept: dict[tuple[int, ...], tuple[Tensor, Table]] = {}
        self._emissions: dict[tuple[object, int | None], Tensor] = {}

    def states(self, site: int) -> int:
        """Number of values of z_i."""
        name = self.path[site].latent
        if name is not None:
            return self.tables.plan.variable[name].cardinality
        return self.weights.shape[-1] if self._own_state[site] else 1

    def is_state(self, site: int) -> bool:
        """Whether the token is its own state."""
        return self._own_state[site]

    def own(self, site: int) -> Float[Tensor, "batch states"] | None:
        """Evidence of z_i where it is met first; None: there is none (that of tokens is in ``weights``)."""
        place = self.path[site]
        if place.latent is None or not place.first:
            return None
        tables = self.tables
        given = place.latent in tables.raw or any(place.latent in block for block in tables.layout.blocks)
        if not given and not tables.plan.unary.get(place.latent):
            return None
        return tables.evidence((place.latent,))[:, 0].double()

    def emission_key(self, site: int) -> int:
        """Equal for sites whose tokens hang on their states by the same table."""
        log = self._emission(site)
        return -1 - int(self._own_state[site]) if log is None else id(log[0])

    def _emission(self, site: int) -> tuple[Tensor, bool] | None:
        """The table between state and token, and whether the token comes first."""
        place = self.path[site]
        if place.emission is None:
            return None
        scope = self.tables.plan.factor[place.emission].scope
        key, stacked = self.tables.layout.source[place.emission]
        if (key, stacked) not in self._emissions:
            self._emissions[key, stacked] = self.tables.factor(place.emission)
        return self._emissions[key, stacked], scope[0] != place.latent

    def emission(self, site: int, tokens: Tensor) -> Float[Tensor, "batch states tokens"]:
        """log psi(z_i, x) for some values of x; -inf where the token is its own state and x another value."""
        found = self._emission(site)
        if found is not None:
            return found[0][:, tokens].mT if found[1] else found[0][..., tokens]
        if not self._own_state[site]:
            return self.weights.new_zeros(1, 1, len(tokens))
        values = torch.arange(self.states(site), device=tokens.device)
        return torch.where(values[:, None] == tokens, 0.0, -torch.inf).to(self.weights)[None]

    def rows(self, site: int, batch: Tensor, states: Tensor, tokens: Tensor) -> Float[Tensor, "rows tokens"]:
        """Rows of :meth:`emission`, for given batch elements and states."""
        found = self._emission(site)
        if found is None:
            log = torch.where(states[:, None] == tokens, 0.0, -torch.inf)
            return (log if self._own_state[site] else torch.zeros_like(log)).to(self.weights)
        table = found[0].mT if found[1] else found[0]
        row = table[batch if len(table) > 1 else torch.zeros_like(batch), states]
        return row if len(tokens) == row.shape[-1] and self._ascending(tokens) else row[:, tokens]

    @staticmethod
    def _ascending(tokens: Tensor) -> bool:
        return bool((tokens[1:] > tokens[:-1]).all())

    def same(self, site: int) -> bool:
        """Whether z_i is the latent of the site before."""
        return not self.path[site].first

    def move(self, site: int, back: bool) -> Table:
        """log psi(z_{i-1}, z_i) as a table from z_i to z_{i-1} (``back``) or the other way, in float64."""
        place, before = self.path[site], self.path[site - 1]
        if place.link is None:
            shape = (1, self.states(site), self.states(site - 1))
            table = self.weights.new_zeros(shape if back else (1, *shape[:0:-1]), dtype=torch.float64)
            return Table(table)
        log = self.tables.factor(place.link)
        key = (id(log), int(back))
        if key not in self._kept:
            name = before.token if before.latent is None else before.latent
            forwards = self.tables.plan.factor[place.link].scope[0] == name
            table = log.mT if forwards == back else log
            self._kept[key] = (log, Table(table.double()))
        return self._kept[key][1]
