"""Log-potentials checked against a plan and laid out for its steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.compiler.plan import Run
from codd_ppl.errors import PotentialsError
from codd_ppl.typing import LogPotentials

__all__ = ["StepTable", "Tables"]

Key = str | tuple[str, ...]


@dataclass(frozen=True)
class StepTable:
    """The tables of one step as (batch or 1, messages or 1, *children, parent), in log and in scaled linear space."""

    log: Tensor

    @cached_property
    def scale(self) -> Tensor:
        """Largest log-potential for each parent value, (batch or 1, messages or 1, parent); 0 where all are -inf."""
        top = self.log.detach().flatten(2, -2).amax(2)
        return torch.where(torch.isfinite(top), top, 0.0)

    @cached_property
    def linear(self) -> Tensor:
        """exp(log - scale): every column's largest entry is 1."""
        scale = self.scale.reshape(*self.scale.shape[:2], *[1] * (self.log.dim() - 3), self.scale.shape[-1])
        return (self.log - scale).exp()

    def rows(self, values: Tensor) -> Tensor:
        """Log rows for given parent values: (*sample, batch, messages) -> (*sample, batch, messages, *children)."""
        table = self.log.movedim(-1, 2)
        batch = torch.arange(table.shape[0], device=values.device)[:, None]
        message = torch.arange(table.shape[1], device=values.device)
        return table[batch, message, values]


class Tables:
    """Log-potentials of one query: validated, with the batch flattened to one dimension.

    Args:
        plan: the compiled graph.
        log_potentials: factor or tie name -> (*batch, *cardinalities); variable name -> (*batch, cardinality);
            tuple of variable names -> (*batch, len, cardinality). Evidence given twice for a variable is multiplied;
            a factor's own table goes before its tie's.

    Raises:
        PotentialsError: unknown key, missing factor, wrong shape or dtype, batch shapes that don't broadcast.
    """

    def __init__(self, plan: ContractionPlan, log_potentials: LogPotentials) -> None:
        self.plan = plan
        self.shapes = {key: _event_shape(plan, key) for key in log_potentials}
        for key, value in log_potentials.items():
            event = self.shapes[key]
            if not isinstance(value, Tensor):
                raise PotentialsError(
                    f"log_potentials[{key!r}]: expected a torch.Tensor, found {type(value).__name__}"
                )
            if not value.is_floating_point():
                raise PotentialsError(
                    f"log_potentials[{key!r}]: expected a floating dtype, found {value.dtype}"
                )
            if value.dim() < len(event) or tuple(value.shape[value.dim() - len(event) :]) != event:
                raise PotentialsError(
                    f"log_potentials[{key!r}]: expected shape (*batch, {', '.join(map(str, event))}), "
                    f"found {tuple(value.shape)}"
                )
        self.raw = dict(log_potentials)
        self.own = frozenset(key for key in self.raw if key in plan.factor)
        tensors = list(self.raw.values())
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = torch.float32 if not tensors else tensors[0].dtype
        for value in tensors[1:]:
            self.dtype = torch.promote_types(self.dtype, value.dtype)
        if self.dtype in (torch.float16, torch.bfloat16):
            self.dtype = torch.float32
        shapes = {k: tuple(v.shape[: v.dim() - len(self.shapes[k])]) for k, v in self.raw.items()}
        try:
            self.batch_shape = tuple(torch.broadcast_shapes(*shapes.values())) if shapes else ()
        except RuntimeError as error:
            found = ", ".join(f"{k!r}: {s}" for k, s in shapes.items() if s)
            raise PotentialsError(f"batch shapes must broadcast; found {found}") from error
        self.batch = prod(self.batch_shape)
        self._places: dict[tuple[str, ...], dict[str, int]] = {}
        self._blocks = [key for key in self.raw if isinstance(key, tuple)]
        self._check_complete()
        self._cache: dict[object, Tensor | StepTable] = {}

    def _check_complete(self) -> None:
        missing = [f.name for f in self.plan.factors if f.name not in self.raw and f.tie not in self.raw]
        if missing:
            f = self.plan.factor[missing[0]]
            shape = ", ".join(str(self.plan.variable[v].cardinality) for v in f.scope)
            tie = f" (or its tie {f.tie!r})" if f.tie else ""
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise PotentialsError(
                f"log_potentials lacks factor {f.name!r}{tie}{more}; expected a tensor of shape (*batch, {shape})"
            )

    # -- layout ------------------------------------------------------------------------------------

    def flat(self, key: Key) -> Tensor:
        """The tensor of a key as (batch or 1, *event)."""
        if key not in self._cache:
            value, event = self.raw[key].to(self.dtype), self.shapes[key]
            if value.dim() == len(event):
                self._cache[key] = value[None]
            else:
                self._cache[key] = value.expand(*self.batch_shape, *event).reshape(self.batch, *event)
        result = self._cache[key]
        assert isinstance(result, Tensor)
        return result

    def evidence(self, names: tuple[str, ...]) -> Tensor:
        """Unary log-evidence of variables of one cardinality, stacked: (batch or 1, len(names), cardinality)."""
        cached = self._cache.get(("evidence", names))
        if isinstance(cached, Tensor):
            return cached
        blocks = [key for key in self._blocks if not self._place(key).keys().isdisjoint(names)]
        alone = not any(v in self.raw or self.plan.unary.get(v) for v in names)
        size = self.plan.variable[names[0]].cardinality
        if alone and not blocks:
            result = torch.zeros((), dtype=self.dtype, device=self.device).expand(1, len(names), size)
        elif alone and len(blocks) == 1 and self._place(blocks[0]).keys() >= set(names):
            block = self.flat(blocks[0])
            places = [self._place(blocks[0])[v] for v in names]
            result = block if names == blocks[0] else block[:, torch.tensor(places, device=self.device)]
        else:
            result = torch.stack(torch.broadcast_tensors(*[self._single(v, size) for v in names]), dim=1)
        self._cache["evidence", names] = result
        return result

    def _place(self, block: tuple[str, ...]) -> dict[str, int]:
        if block not in self._places:
            self._places[block] = {v: i for i, v in enumerate(block)}
        return self._places[block]

    def _single(self, name: str, size: int) -> Tensor:
        parts = [self.flat(name)] if name in self.raw else []
        parts += [self.flat(b)[:, self._place(b)[name]] for b in self._blocks if name in self._place(b)]
        for factor in self.plan.unary.get(name, ()):
            # A unary factor named like its variable is that variable's evidence, which was counted above.
            if factor.name != name or name not in self.raw:
                parts.append(self.flat(factor.name if factor.name in self.raw else factor.tie or ""))
        return (
            sum(parts[1:], parts[0]) if parts else torch.zeros(1, size, dtype=self.dtype, device=self.device)
        )

    def step(self, index: int) -> StepTable:
        """Tables of one step, canonical layout; tied tables are laid out once for all steps."""
        step = self.plan.steps[index]
        names = [m.factor for m in step.messages]
        shared = step.tie is not None and step.tie in self.raw and not any(n in self.raw for n in names)
        key = ("tie", step.tie, step.parent_axis) if shared else ("step", index)
        cached = self._cache.get(key)
        if isinstance(cached, StepTable):
            return cached
        if shared:
            log = self.flat(step.tie or "")[:, None]
        else:
            tables = [self.flat(n if n in self.raw else step.tie or "") for n in names]
            log = (
                tables[0][:, None]
                if len(tables) == 1
                else torch.stack(torch.broadcast_tensors(*tables), dim=1)
            )
        result = StepTable(log.movedim(2 + step.parent_axis, -1))
        self._cache[key] = result
        return result

    def run(self, run: Run) -> list[StepTable]:
        """Tables of a run's steps; a single one if all of them share it."""
        tie = self.plan.steps[run.start].tie
        if tie is not None and tie in self.raw and not (self.own & self.plan.run_factors[run.start]):
            return [self.step(run.start)]
        return [self.step(i) for i in range(run.start, run.stop)]

    def bad_entries(self) -> str:
        """Names of the keys that hold NaN or +inf, for an error message."""
        found = []
        for key, value in self.raw.items():
            if bool(value.isnan().any()):
                found.append(f"{key!r} holds NaN")
            elif bool((value == torch.inf).any()):
                found.append(f"{key!r} holds +inf")
        return "; ".join(found) or "the sum of finite log-potentials overflows"


@lru_cache(maxsize=512)
def _event_shape(plan: ContractionPlan, key: Key) -> tuple[int, ...]:
    """The cardinalities that a key's tensor ends with."""
    if isinstance(key, tuple):
        sizes = {plan.variable[v].cardinality for v in key if v in plan.variable}
        if (
            not key
            or any(v not in plan.variable for v in key)
            or len(sizes) != 1
            or len(set(key)) != len(key)
        ):
            raise PotentialsError(
                f"log_potentials key {key!r}: a tuple must name distinct variables of equal cardinality"
            )
        return (len(key), *sizes)
    if key in plan.factor:
        return tuple(plan.variable[v].cardinality for v in plan.factor[key].scope)
    if key in plan.variable:
        return (plan.variable[key].cardinality,)
    if key in plan.ties:
        return tuple(plan.variable[v].cardinality for v in plan.factor[plan.ties[key][0]].scope)
    names = [*plan.ties, *(f.name for f in plan.factors if f.tie is None)]
    raise PotentialsError(
        f"log_potentials has the unknown key {key!r}; expected names of factors, ties or variables, "
        f"such as {', '.join(map(repr, names[:6])) or repr(plan.variables[0].name)}"
    )
