"""Draws and modes: one upward pass, then values from the roots down, a level at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import PotentialsError
from codd_ppl.inference.queries import require_feasible
from codd_ppl.inference.semirings import MaxSemiring
from codd_ppl.inference.tables import Tables
from codd_ppl.inference.tree import Upward, upward
from codd_ppl.typing import Int, LogPotentials

__all__ = ["categorical", "mode", "sample"]


def categorical(log_weights: Tensor, generator: torch.Generator | None = None) -> Int[Tensor, "..."]:
    """One draw per row of unnormalised log-weights, by inverting the cumulative sum in float64.

    A value of weight zero is never drawn.
    """
    cumulative = torch.softmax(log_weights.detach(), -1, dtype=torch.float64).cumsum(-1)
    shape = (*cumulative.shape[:-1], 1)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=cumulative.device)
    total = cumulative[..., -1:]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[..., 0]


def sample(
    plan: ContractionPlan,
    log_potentials: LogPotentials,
    sample_shape: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> dict[str, Int[Tensor, "..."]]:
    """Exact joint draws of all variables; the upward pass is shared by all of them.

    Args:
        plan, log_potentials: as in :func:`codd_ppl.inference.log_partition`.
        sample_shape: leading shape of independent draws.
        generator: torch's global one by default.

    Returns:
        Variable -> (*sample_shape, *batch) int64.

    Raises:
        PotentialsError: malformed log-potentials.
        InfeasibleError: some batch element has no possible assignment.
    """
    with torch.no_grad():
        tables = Tables(plan, log_potentials)
        up, total = upward(tables)
        require_feasible(tables, total)
        return _decode(up, tuple(sample_shape), lambda log: categorical(log, generator))


def mode(plan: ContractionPlan, log_potentials: LogPotentials) -> dict[str, Int[Tensor, "*batch"]]:
    """A most probable joint assignment of all variables, latents included (max-product; Viterbi on chains).

    Returns:
        Variable -> (*batch) int64; ties go to smaller values, roots first.

    Raises:
        PotentialsError: malformed log-potentials.
        InfeasibleError: some batch element has no possible assignment.
    """
    with torch.no_grad():
        tables = Tables(plan, log_potentials)
        up = Upward(tables, MaxSemiring())
        total = up.log_partition()  # of the roots' best scores: finite unless infeasible
        if bool((~(total < torch.inf)).any()):
            raise PotentialsError(f"log_potentials must be finite or -inf: {tables.bad_entries()}")
        require_feasible(tables, total)
        return _decode(up, (), lambda log: log.argmax(-1))


def _decode(
    up: Upward, sample_shape: tuple[int, ...], choose: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Choose the roots, then every step's children given its parents."""
    plan, tables = up.plan, up.tables
    lead = (*sample_shape, tables.batch)
    values: dict[str, Tensor] = {}
    for size in dict.fromkeys(plan.variable[r].cardinality for r in plan.roots):
        roots = tuple(r for r in plan.roots if plan.variable[r].cardinality == size)
        log = up.stacked(roots)
        chosen = choose(log.expand(*lead, len(roots), size))
        values.update(zip(roots, chosen.unbind(-1), strict=True))
    for index in range(len(plan.steps) - 1, -1, -1):
        step = plan.steps[index]
        parents = torch.stack([values[m.parent] for m in step.messages], -1)
        log = tables.step(index).rows(parents)
        sizes = log.shape[len(lead) + 1 :]
        for c, belief in enumerate(up.children[index]):
            shape = [1] * len(sizes)
            shape[c] = sizes[c]
            log = log + belief.reshape(*belief.shape[:2], *shape)
        flat = choose(log.reshape(*log.shape[: len(lead) + 1], prod(sizes)))
        for c in range(len(sizes) - 1, -1, -1):
            digit = flat % sizes[c]
            flat = flat // sizes[c]
            values.update(zip([m.children[c] for m in step.messages], digit.unbind(-1), strict=True))
    return {name: values[name].reshape((*sample_shape, *tables.batch_shape)) for name in plan.variable}
