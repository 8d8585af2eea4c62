"""Tokens that hang on latents, taken out of the graph: one matrix product for all of them, a small core for the rest.

Hidden Markov models, latent trees and mixtures have every token x_i on one latent z_i. With the evidence u_i of the
token's values and the emission table P,

    m_i(z) = sum_x P(x | z) u_i(x)      for a free token: one product (tokens x vocab) @ (vocab x states) for all,
    m_i(z) = P(x | z) u_i(x)            for a known one: a row of the table,

and every question about the tokens is one about the latents with m as their evidence. The products serve all
questions about one distribution; clamping a set of tokens only looks up rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan, compile
from codd_ppl.graphs import FactorGraph
from codd_ppl.inference.evidence import add_evidence
from codd_ppl.inference.free_tokens import FreeTokens
from codd_ppl.inference.queries import log_partition, marginals
from codd_ppl.inference.sampling import categorical, sample
from codd_ppl.inference.semirings import LogSemiring
from codd_ppl.inference.tables import Key, StepTable, Tables
from codd_ppl.inference.transforms import transforming
from codd_ppl.typing import Bool, Float, Int, LogPotentials

__all__ = ["Leaves", "absorb"]


@dataclass(frozen=True)
class Group:
    """Tokens whose messages one step of the plan sends: their places among the sites, and their latents."""

    step: int
    sites: tuple[int, ...]
    latents: tuple[str, ...]


@dataclass(frozen=True)
class Skeleton:
    """A plan without its tokens.

    Attributes:
        core: over the latents alone.
        groups: the tokens.
        latents: variables that have tokens, those of one cardinality together.
        tables: factors with tokens.
        tied: ties of these.
    """

    core: ContractionPlan
    groups: tuple[Group, ...]
    latents: tuple[tuple[str, ...], ...]
    tables: frozenset[str]
    tied: frozenset[str]

    def in_core(self, key: Key) -> bool:
        """Whether a key is about the core alone: tables of its factors, or evidence of its variables."""
        if isinstance(key, tuple):
            return self.core.variable.keys() >= set(key) or self.core.factor.keys() >= set(key)
        return key in self.core.factor or key in self.core.ties or key in self.core.variable

    def of_tokens(self, key: Key) -> bool:
        """Whether a key is about tables of tokens alone."""
        if isinstance(key, tuple):
            return self.tables.issuperset(key)
        return key in self.tables or key in self.tied


@lru_cache(maxsize=128)
def skeleton(plan: ContractionPlan, sites: tuple[str, ...]) -> Skeleton | None:
    """The plan without its tokens, or None where some token has another place than as the leaf of a latent."""
    place = {name: i for i, name in enumerate(sites)}
    latent = {v.name for v in plan.variables if v.latent}
    if not latent or any(
        plan.below[name] or plan.unary.get(name) or name not in plan.above for name in sites
    ):
        return None
    groups = []
    for s in sorted({plan.above[name][0] for name in sites}):
        messages = plan.steps[s].messages
        if len(plan.steps[s].shape) != 2 or any(
            m.children[0] not in place or m.parent not in latent for m in messages
        ):
            return None
        groups.append(
            Group(s, tuple(place[m.children[0]] for m in messages), tuple(m.parent for m in messages))
        )
    graph = FactorGraph()
    for v in plan.variables:
        if v.latent:
            graph.add_variable(v.name, v.cardinality, latent=True)
    for f in plan.factors:
        if latent.issuperset(f.scope):
            graph.add_factor(f.scope, name=f.name, tie=f.tie)
    holders = dict.fromkeys(name for g in groups for name in g.latents)
    sizes = dict.fromkeys(plan.variable[name].cardinality for name in holders)
    latents = tuple(tuple(n for n in holders if plan.variable[n].cardinality == size) for size in sizes)
    tables = [f for f in plan.factors if not latent.issuperset(f.scope)]
    tied = frozenset(f.tie for f in tables if f.tie)
    return Skeleton(compile(graph), tuple(groups), latents, frozenset(f.name for f in tables), tied)


def absorb(
    plan: ContractionPlan,
    log_potentials: LogPotentials,
    sites: tuple[str, ...],
    log_evidence: Float[Tensor, "*batch sites vocab"],
    tokens: Int[Tensor, "*batch sites"],
    known: Bool[Tensor, "*batch sites"],
) -> Leaves | None:
    """The tokens of a plan taken out, or None where that isn't possible or linear space is not safe.

    Args:
        plan: whose tokens are ``sites``.
        log_potentials: of its factors.
        sites, log_evidence: the tokens and their evidence; that of known ones counts at their value only.
        tokens, known: the values of the known ones.
    """
    found = None if transforming() else skeleton(plan, sites)
    if found is None or not all(found.in_core(key) or found.of_tokens(key) for key in log_potentials):
        return None
    tables = Tables(plan, log_potentials)
    emissions = [tables.step(g.step) for g in found.groups]
    own = any(e.scale.shape[0] != 1 for e in emissions)
    if (
        (own and tables.batch_shape != log_evidence.shape[:-2])
        or not log_evidence.numel()
        or tables.dtype != log_evidence.dtype
    ):
        return None
    result = Leaves(found, dict(log_potentials), emissions, log_evidence, tokens, known)
    return result if result.safe else None


class Leaves:
    """Questions about the tokens of a plan, asked of its latents. Made by :func:`absorb`."""

    def __init__(
        self,
        model: Skeleton,
        log_potentials: dict[str | tuple[str, ...], Tensor],
        emissions: list[StepTable],
        log_evidence: Tensor,
        tokens: Tensor,
        known: Tensor,
    ) -> None:
        self.model, self.emissions = model, emissions
        self.tokens, self.known, self.log_evidence = tokens, known, log_evidence
        self.rest = {key: value for key, value in log_potentials.items() if model.in_core(key)}
        semiring = LogSemiring()
        self._parts = [self._free_part(g, e) for g, e in zip(model.groups, emissions, strict=True)]
        for part in self._parts:
            if part.product.numel():
                semiring.watch(part.product.detach().amin() / log_evidence.shape[-1])
        self.safe = semiring.safe()

    def _free_part(self, group: Group, emission: StepTable) -> FreeTokens:
        if group.sites == tuple(range(self.known.shape[-1])):
            return FreeTokens.of(self.known, self.log_evidence, emission)
        places = _index(group.sites, self.known)
        return FreeTokens.of(self.known[..., places], self.log_evidence[..., places, :], emission)

    @cached_property
    def messages(self) -> list[Tensor]:
        """Log-messages of each group's tokens, (*batch, tokens, states)."""
        result = []
        for group, emission, part in zip(self.model.groups, self.emissions, self._parts, strict=True):
            log = part.product.log() + part.top
            if emission.scale.shape[:2] == (1, 1):
                log = log + emission.scale[0]
            else:
                each = log.reshape(-1, len(group.sites), log.shape[-1])
                log = (each + emission.scale).flatten(0, 1)
            rows = self._rows(group, emission, self.tokens)
            free = rows.reshape(-1, rows.shape[-1]).index_copy(0, part.where, log).reshape(rows.shape)
            result.append(torch.where(part.free[..., None], free, rows))
        return result

    def _rows(self, group: Group, emission: StepTable, values: Tensor) -> Tensor:
        """Log-messages of tokens with these values, (*shape, tokens, states)."""
        places = _index(group.sites, values)
        evidence = self.log_evidence.expand(*values.shape, -1).gather(-1, values[..., None])
        values = values[..., places]
        flat = values if len(emission.scale) == 1 else values.reshape(-1, len(emission.scale), len(places))
        return emission.given(flat).reshape(*values.shape, -1) + evidence[..., places, :]

    def _core(self, messages: list[Tensor]) -> dict[str | tuple[str, ...], Tensor]:
        """Log-potentials of the core with the tokens' messages as evidence."""
        result = dict(self.rest)
        for names in self.model.latents:
            number = {name: i for i, name in enumerate(names)}
            groups = [g for g in zip(self.model.groups, messages, strict=True) if g[0].latents[0] in number]
            together = torch.cat([m for _, m in groups], dim=-2) if len(groups) > 1 else groups[0][1]
            order = [number[z] for g, _ in groups for z in g.latents]
            if order != list(range(len(names))):
                shape = (*together.shape[:-2], len(names), together.shape[-1])
                places = torch.tensor(order, device=together.device)
                together = together.new_zeros(shape).index_add(-2, places, together)
            result = add_evidence(self.model.core, result, names, together)
        return result

    @cached_property
    def log_partition(self) -> Float[Tensor, "*batch"]:
        """log Z given the known tokens."""
        return log_partition(self.model.core, self._core(self.messages))

    def log_clamped(
        self, value: Int[Tensor, "*shape sites"], chosen: Bool[Tensor, "*shape sites"]
    ) -> Float[Tensor, "*shape"]:
        """log Z with the chosen free tokens clamped as well."""
        messages = []
        for group, emission, free in zip(self.model.groups, self.emissions, self.messages, strict=True):
            rows = self._rows(group, emission, value)
            messages.append(torch.where(chosen[..., _index(group.sites, chosen), None], rows, free))
        return log_partition(self.model.core, self._core(messages))

    def sample_sharpened(
        self, temperature: float, generator: torch.Generator | None
    ) -> Int[Tensor, "*batch sites"]:
        """Latents from their law, then each free token from its conditional law to the power 1 / temperature."""
        with torch.no_grad():
            drawn = sample(self.model.core, self._core(self.messages), (), generator)
            result = self.tokens.clone()
            for group, emission in zip(self.model.groups, self.emissions, strict=True):
                places = _index(group.sites, result)
                states = torch.stack([drawn[z] for z in group.latents], -1)
                log = emission.rows(states.reshape(-1, len(group.sites))).reshape(*states.shape, -1)
                values = categorical((log + self.log_evidence[..., places, :]) / temperature, generator)
                result[..., places] = torch.where(self.known[..., places], result[..., places], values)
        return result

    def sample(
        self, sample_shape: Sequence[int], generator: torch.Generator | None
    ) -> Int[Tensor, "*shape sites"]:
        """Joint draws: the latents, then each free token from its row of the emission table."""
        with torch.no_grad():
            drawn = sample(self.model.core, self._core(self.messages), sample_shape, generator)
            shape = (*sample_shape, *self.known.shape[:-1])
            result = self.tokens.expand(*shape, -1).clone()
            for group, part in zip(self.model.groups, self._parts, strict=True):
                places = _index(group.sites, result)
                states = torch.stack([drawn[z] for z in group.latents], -1)
                flat = states.reshape(-1, part.free.numel())[:, part.where]  # (draws, free tokens)
                values = part.draw(flat, generator)
                old = result[..., places]
                new = old.reshape(-1, part.free.numel()).index_copy(1, part.where, values).reshape(old.shape)
                result[..., places] = torch.where(part.free, new, old)
        return result

    @property
    def marginals(self) -> Float[Tensor, "*batch sites vocab"]:
        """Probabilities of each token's values: p(x) = w(x) sum_z p(z) / m(z) P(x | z), one-hot where known."""
        core = marginals(self.model.core, self._core(self.messages), factors=False)
        total = torch.nn.functional.one_hot(self.tokens, self.log_evidence.shape[-1]).to(self.log_evidence)
        for group, part in zip(self.model.groups, self._parts, strict=True):
            states = torch.stack([core[z] for z in group.latents], -2)
            ratio = states.reshape(-1, states.shape[-1])[part.where] / part.product
            back = part.back(ratio)
            back = back / back.sum(-1, keepdim=True)
            places = _index(group.sites, total)
            old = total[..., places, :]
            new = old.reshape(-1, old.shape[-1]).index_copy(0, part.where, back).reshape(old.shape)
            total = total.index_copy(-2, places, torch.where(part.free[..., None], new, old))
        return total


def _index(places: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(places, device=like.device)
