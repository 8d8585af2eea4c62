"""A plan read as a hidden Markov model: where its tables are, and what they are in linear space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.inference import kept, native
from codd_ppl.inference.tables import Tables
from codd_ppl.typing import LogPotentials

__all__ = ["HiddenMarkov", "PathModel", "hidden_markov", "linear_form", "path_model", "scaled"]

MODELS = 8
"""So many models in linear space are kept, those used last."""


@dataclass(frozen=True)
class HiddenMarkov:
    """Where the parts of a hidden Markov model are in a plan.

    Attributes:
        latents: from the root on.
        order: place among the sites of each latent's token.
        emitted: place of each latent's token among the messages of the emission step.
        emission, transition: steps that use the two tables.
    """

    latents: tuple[str, ...]
    order: tuple[int, ...]
    emitted: tuple[int, ...]
    emission: int
    transition: int


@lru_cache(maxsize=128)
def hidden_markov(plan: ContractionPlan, sites: tuple[str, ...]) -> HiddenMarkov | None:
    """A plan read as a hidden Markov model over these sites, or None."""
    if len(plan.runs) != 1 or len(plan.roots) != 1:
        return None
    (run,) = plan.runs
    latents, site = run.variables[::-1], {name: i for i, name in enumerate(sites)}
    emissions = {plan.above[name][0] for name in sites if name in plan.above}
    if plan.roots[0] != latents[0] or len(emissions) != 1 or len(plan.variables) != 2 * len(sites):
        return None
    (emission,) = emissions
    step = plan.steps[emission]
    token = {m.parent: m.children[0] for m in step.messages}
    if step.tie is None or len(step.shape) != 2 or token.keys() != set(latents) or len(sites) != len(latents):
        return None
    if plan.steps[run.start].tie is None or set(token.values()) != site.keys():
        return None
    place = {m.parent: i for i, m in enumerate(step.messages)}
    order, emitted = tuple(site[token[z]] for z in latents), tuple(place[z] for z in latents)
    return HiddenMarkov(latents, order, emitted, emission, run.start)


@dataclass(frozen=True)
class PathModel:
    """Tables in linear space: emission both ways round, transition both ways round, and the latents' evidence
    (batch or 1, sites, states)."""

    emit: Tensor
    tokens: Tensor
    move: Tensor
    back: Tensor
    latent: Tensor
    memory: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """For what follows from these tables alone."""

    @cached_property
    def messages(self) -> Tensor:
        """Of a token without evidence to its latent, then of each known value: (1 + vocab, states)."""
        return torch.cat((self.tokens.sum(0, keepdim=True), self.tokens))

    def evidence(self, cut: native.Cut) -> tuple[Tensor, int, int]:
        """Of the latents, for a part of the batch, with its strides between batch elements and sites."""
        batch, sites, states = self.latent.shape
        return (self.latent, 0, states) if batch == 1 else (cut(self.latent), sites * states, states)


_models: dict[ContractionPlan, tuple[LogPotentials, PathModel]] = {}


def path_model(
    plan: ContractionPlan,
    log_potentials: LogPotentials,
    sites: tuple[str, ...],
    batch_shape: Sequence[int],
) -> PathModel | None:
    """The tables in linear space, for the compiled loops; None where a plan isn't such a path, in reading order, with
    one small emission table and one transition table for all, or where a derivative may be asked for.

    Those of the last plans are kept, and used again for the same numbers.

    Args:
        plan, log_potentials: without evidence of the tokens.
        sites: the tokens, in reading order.
        batch_shape: of the query; that of the tables, if they have one.
    """
    if plan.junction is not None or native.library() is None:
        return None
    model = hidden_markov(plan, sites)
    if model is None or model.order != tuple(range(len(sites))):
        return None
    values = log_potentials.values()
    if torch.is_grad_enabled() and any(value.requires_grad for value in values):
        return None
    entry = _models.get(plan)
    if (
        entry is not None
        and entry[0].keys() == log_potentials.keys()
        and all(_same(value, log_potentials[key]) for key, value in entry[0].items())
    ):
        return entry[1]
    found = _laid_out(Tables(plan, log_potentials), model, sites, batch_shape)
    if found is not None and len(found.latent) == 1 and not torch.is_inference_mode_enabled():
        for old in list(_models)[: len(_models) + 1 - MODELS]:
            _models.pop(old, None)
        _models[plan] = {key: value.detach().clone() for key, value in log_potentials.items()}, found
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def _laid_out(
    tables: Tables, model: HiddenMarkov, sites: tuple[str, ...], batch_shape: Sequence[int]
) -> PathModel | None:
    emission, transition = tables.step(model.emission), tables.step(model.transition)
    (run,) = tables.plan.runs
    if (
        not (emission.single and transition.single)
        or not tables.layout.shared.issuperset(range(run.start, run.stop))
        or prod(emission.log.shape) >= kept.LARGE  # then torch's products are the faster ones
        or not native.usable(emission.log.shape[-1], emission.log)
        or tables.batch_shape not in ((), tuple(batch_shape))
        or any(v in tables.raw or tables.plan.unary.get(v) for v in sites)
        or any(not set(block).isdisjoint(sites) for block in tables.layout.blocks)
    ):
        return None
    tokens, back = linear_form(emission.log[0, 0].detach()), linear_form(transition.log[0, 0].detach())
    latent = linear_form(tables.evidence(model.latents).detach(), -1).contiguous()
    if not all(bool(torch.isfinite(table).all()) for table in (tokens, back, latent)):
        return None  # the general queries say what is wrong
    return PathModel(
        tokens.T.contiguous(), tokens.contiguous(), back.T.contiguous(), back.contiguous(), latent
    )


def linear_form(log: Tensor, dim: int | tuple[int, int] | None = None) -> Tensor:
    """exp(log), scaled to a largest entry of 1 over all entries or along some dimensions."""
    top = log.detach().amax() if dim is None else log.detach().amax(dim, keepdim=True)
    return (log - torch.where(torch.isfinite(top), top, 0.0)).exp()


def scaled(vector: Tensor) -> Tensor:
    """Rows with a largest entry of 1."""
    return vector / vector.detach().amax(-1, keepdim=True)
