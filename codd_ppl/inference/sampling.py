"""Draws and modes: one upward pass, then values from the roots down, a level at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import PotentialsError, ShapeError
from codd_ppl.inference import clique_queries, loopy
from codd_ppl.inference.cliques import require_proper
from codd_ppl.inference.feasibility import require_feasible
from codd_ppl.inference.max_scan import MaxScan
from codd_ppl.inference.products import draw_rows
from codd_ppl.inference.scan import UpScan
from codd_ppl.inference.semirings import MaxSemiring
from codd_ppl.inference.step_tables import KeptTable
from codd_ppl.inference.tables import Tables
from codd_ppl.inference.transforms import eager, transforming
from codd_ppl.inference.tree import Upward, upward
from codd_ppl.typing import Int, LogPotentials

__all__ = ["categorical", "mode", "sample"]


CHUNK = 1 << 23
"""Largest number of weights that one step of a sample looks at at once; more draws are made in slices."""


def categorical(
    log_weights: Tensor, generator: torch.Generator | None = None, draws: int | None = None
) -> Int[Tensor, "..."]:
    """One draw per row of unnormalised log-weights, by inverting the cumulative sum in float64.

    A value of weight zero is never drawn. With ``draws`` that many per row, in a last dimension.
    """
    cumulative = torch.softmax(log_weights.detach(), -1, dtype=torch.float64).cumsum(-1)
    shape = (*cumulative.shape[:-1], 1 if draws is None else draws)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=cumulative.device)
    total = cumulative[..., -1:]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, target, right=True)
    return found[..., 0] if draws is None else found


@eager
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
        ShapeError: a sample_shape that isn't a sequence of sizes.
        PotentialsError: malformed log-potentials.
        InfeasibleError: some batch element has no possible assignment.
        IntractableError: the plan is an approximation.
    """
    if isinstance(sample_shape, int) or any(size < 0 for size in sample_shape):
        raise ShapeError(f"sample_shape: expected sizes of 0 or more, such as (5,), found {sample_shape!r}")
    if plan.junction is not None:
        return clique_queries.sample(
            plan, log_potentials, sample_shape, lambda log: categorical(log, generator)
        )
    loopy.require_exact(plan, "sample")
    with torch.no_grad():
        tables = Tables(plan, log_potentials)
        up, total = upward(tables)
        require_feasible(tables, total)
        draws = prod(sample_shape)
        each = max(1, CHUNK // max(1, tables.batch * _longest_row(up)))
        slices = [
            _decode(
                up,
                min(each, draws - start),
                lambda log, n: categorical(log, generator, n),
                lambda scan, last: _path(scan, last, generator),
                generator,
            )
            for start in range(0, max(1, draws), each)
        ]
        whole = slices[0]
        if len(slices) > 1:
            whole = [(part[0][0], torch.cat([t for _, t in part], 1)) for part in zip(*slices, strict=True)]
        return _by_name(plan, whole, (*sample_shape, *tables.batch_shape))


@eager
def mode(plan: ContractionPlan, log_potentials: LogPotentials) -> dict[str, Int[Tensor, "*batch"]]:
    """A most probable joint assignment of all variables, latents included (max-product; Viterbi on chains).

    Returns:
        Variable -> (*batch) int64; ties go to smaller values, roots first.

    Raises:
        PotentialsError: malformed log-potentials.
        InfeasibleError: some batch element has no possible assignment.
        IntractableError: the plan is an approximation.
    """
    if plan.junction is not None:
        return clique_queries.mode(plan, log_potentials)
    loopy.require_exact(plan, "mode")
    with torch.no_grad():
        tables = Tables(plan, log_potentials)
        require_proper(tables)
        up = Upward(tables, MaxSemiring())
        total = up.log_partition()  # of the roots' best scores: finite unless infeasible
        if not transforming() and bool((~(total < torch.inf)).any()):
            raise PotentialsError(f"log_potentials must be finite or -inf: {tables.bad_entries()}")
        require_feasible(tables, total)
        best = _decode(up, 1, lambda log, n: log.argmax(-1, keepdim=True).expand(*log.shape[:-1], n), _path)
        return _by_name(plan, best, tables.batch_shape)


def _by_name(
    plan: ContractionPlan, stacks: list[tuple[tuple[str, ...], Tensor]], shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """Variable -> values of this shape, from stacks (variables, draws, batch)."""
    values: dict[str, Tensor] = {}
    for names, stack in stacks:
        values.update(zip(names, stack.reshape(len(names), *shape).unbind(0), strict=True))
    return {name: values[name] for name in plan.variable}


def _path(scan: UpScan | MaxScan, last: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Drawn or best values along a path, (draws, batch) -> (steps, draws, batch)."""
    return scan.best(last[0])[:, None] if isinstance(scan, MaxScan) else scan.draw(last, generator)


def _by_rows(up: Upward, index: int) -> bool:
    """Whether a draw of this step looks at a few rows at a time in linear space, as the way up showed to be safe.

    There every weighted sum over the children came out well above the smallest number.
    """
    return (
        getattr(up.semiring, "fast", False)
        and isinstance(table := up.tables.step(index), KeptTable)
        and table.single
    )


def _longest_row(up: Upward) -> int:
    """Entries that a draw of one step looks at for each batch element, unless it goes row by row."""
    longest, others = _row_lengths(up.plan, up.scanning)
    return max([longest, *(length for i, length in others if not _by_rows(up, i))])


@lru_cache(maxsize=256)
def _row_lengths(plan: ContractionPlan, scanning: bool) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The longest on paths, at least 1, and that of each other step."""
    lengths = [len(s.messages) * prod(s.shape) // s.shape[s.parent_axis] for s in plan.steps]
    along = {i for run in plan.runs for i in range(run.start, run.stop)} if scanning else set[int]()
    longest = max((lengths[i] for i in along), default=1)
    return longest, tuple((i, n) for i, n in enumerate(lengths) if i not in along)


def _decode(
    up: Upward,
    draws: int,
    choose: Callable[[Tensor, int], Tensor],
    along: Callable[[UpScan | MaxScan, Tensor], Tensor],
    generator: torch.Generator | None = None,
) -> list[tuple[tuple[str, ...], Tensor]]:
    """Choose the roots, then every step's children given its parents.

    Returns variables and their values, (count, draws, batch), a few at a time.

    ``choose(log_weights, n)`` returns n values per row, in a last dimension; ``along(scan, last)`` those of a path
    given the values of its last variable; ``generator`` is for steps drawn row by row.
    """
    plan, batch, stacks = up.plan, up.tables.batch, _Stacks()
    for size in dict.fromkeys(plan.variable[r].cardinality for r in plan.roots):
        roots = tuple(r for r in plan.roots if plan.variable[r].cardinality == size)
        log = up.stacked(roots)  # (batch or 1, roots, size): one row serves all draws
        if log.shape[0] == batch:
            chosen = choose(log, draws).permute(1, 2, 0)
        else:
            chosen = choose(log, draws * batch).reshape(len(roots), draws, batch)
        stacks.add(roots, chosen)
    index = len(plan.steps)
    while index > 0:
        index -= 1
        found = up.scan(index)
        if found is not None:
            run = found[0].run
            stacks.add(run.variables[:-1], along(found[0], stacks.of(run.variables[-1])))
            index = run.start
            continue
        step = plan.steps[index]
        parents = torch.stack([stacks.of(m.parent) for m in step.messages], -1)
        if _by_rows(up, index):
            belief, table = up.children(index)[0], up.tables.step(index).stored[0]
            drawn = draw_rows(table, parents.flatten(1), belief.flatten(0, 1), None, generator)
            stacks.add(
                tuple(m.children[0] for m in step.messages), drawn.reshape(parents.shape).movedim(-1, 0)
            )
            continue
        log = up.tables.step(index).rows(parents)
        sizes = log.shape[3:]
        for c, belief in enumerate(up.children(index)):
            shape = [1] * len(sizes)
            shape[c] = sizes[c]
            log = log + belief.reshape(*belief.shape[:2], *shape)
        flat = choose(log.reshape(*log.shape[:3], prod(sizes)), 1)[..., 0]
        for c in range(len(sizes) - 1, -1, -1):
            digit = flat % sizes[c]
            flat = flat // sizes[c]
            stacks.add(tuple(m.children[c] for m in step.messages), digit.movedim(-1, 0))
    return stacks.found


class _Stacks:
    """Values of variables, several at a time."""

    def __init__(self) -> None:
        self.found: list[tuple[tuple[str, ...], Tensor]] = []
        self._each: dict[int, tuple[Tensor, ...]] = {}
        self._places: dict[str, tuple[int, int]] = {}

    def add(self, names: tuple[str, ...], values: Tensor) -> None:
        """(count, draws, batch)."""
        number = len(self.found)
        self.found.append((names, values))
        self._places.update((name, (number, i)) for i, name in enumerate(names))

    def of(self, name: str) -> Tensor:
        """(draws, batch)."""
        number, place = self._places[name]
        if number not in self._each:
            self._each[number] = self.found[number][1].unbind(0)
        return self._each[number][place]
