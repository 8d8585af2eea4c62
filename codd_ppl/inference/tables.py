"""Log-potentials checked against a plan and laid out for its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.compiler.plan import Run
from codd_ppl.errors import PotentialsError
from codd_ppl.inference.kept import keepable
from codd_ppl.inference.step_tables import KeptTable, StepTable
from codd_ppl.typing import LogPotentials

__all__ = ["Layout", "StepTable", "Tables", "layout"]

Key = str | tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """What a set of keys means for a plan, worked out once for each plan and set of keys.

    Attributes:
        shapes: key -> the sizes that its tensor ends with.
        source: factor -> the key that holds its table, and its place in it if the key is a tuple of factors.
        shared: the steps whose messages all use the table of their tie.
        blocks: the keys that are tuples of variables, each with the place of every variable in it.
    """

    shapes: Mapping[Key, tuple[int, ...]]
    source: Mapping[str, tuple[Key, int | None]]
    shared: frozenset[int]
    blocks: Mapping[tuple[str, ...], Mapping[str, int]]


@lru_cache(maxsize=256)
def layout(plan: ContractionPlan, keys: tuple[Key, ...]) -> Layout:
    """Read the keys of log-potentials.

    Raises:
        PotentialsError: an unknown key, or a factor without a table.
    """
    shapes = {key: _event_shape(plan, key) for key in keys}
    blocks, source = {}, dict[str, tuple[Key, int | None]]()
    for key in keys:
        if isinstance(key, tuple):
            places = {name: i for i, name in enumerate(key)}
            if key[0] in plan.variable:
                blocks[key] = places
            else:
                source.update({name: (key, i) for name, i in places.items()})
    source.update({f.name: (f.name, None) for f in plan.factors if f.name in shapes})
    for f in plan.factors:
        if f.name not in source and f.tie in shapes and f.tie is not None:
            source[f.name] = (f.tie, None)
    missing = [f for f in plan.factors if f.name not in source]
    if missing:
        f = missing[0]
        shape = ", ".join(str(plan.variable[v].cardinality) for v in f.scope)
        tie = f" (or its tie {f.tie!r})" if f.tie else ""
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PotentialsError(
            f"log_potentials lacks factor {f.name!r}{tie}{more}; expected a tensor of shape (*batch, {shape})"
        )
    shared = frozenset(
        i
        for i, step in enumerate(plan.steps)
        if step.tie is not None and all(source[m.factor] == (step.tie, None) for m in step.messages)
    )
    return Layout(shapes, source, shared, blocks)


class Tables:
    """Log-potentials of one query: validated, with the batch flattened to one dimension.

    Args:
        plan: the compiled graph.
        log_potentials: factor or tie name -> (*batch, *cardinalities); variable name -> (*batch, cardinality);
            tuple of variable names -> (*batch, len, cardinality); tuple of factor names -> (*batch, len,
            *cardinalities). Evidence given twice for a variable is multiplied; a factor's own table goes before that
            in a tuple, and that before its tie's.

    Raises:
        PotentialsError: unknown key, missing factor, wrong shape or dtype, batch shapes that don't broadcast.
    """

    def __init__(self, plan: ContractionPlan, log_potentials: LogPotentials) -> None:
        self.plan = plan
        self.keys = tuple(log_potentials)
        self.layout = layout(plan, self.keys)
        self.shapes = self.layout.shapes
        shapes = {}
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
            shape = tuple(value.shape)
            lead = len(shape) - len(event)
            if lead < 0 or shape[lead:] != event:
                raise PotentialsError(
                    f"log_potentials[{key!r}]: expected shape (*batch, {', '.join(map(str, event))}), found {shape}"
                )
            shapes[key] = shape[:lead]
        self.raw = dict(log_potentials)
        tensors = list(self.raw.values())
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = torch.float32 if not tensors else tensors[0].dtype
        for dtype in {value.dtype for value in tensors[1:]}:
            self.dtype = torch.promote_types(self.dtype, dtype)
        if self.dtype in (torch.float16, torch.bfloat16):
            self.dtype = torch.float32
        try:
            several = {shape for shape in shapes.values() if shape}
            one = len(several) <= 1
            self.batch_shape = next(iter(several), ()) if one else tuple(torch.broadcast_shapes(*several))
        except RuntimeError as error:
            found = ", ".join(f"{k!r}: {s}" for k, s in shapes.items() if s)
            raise PotentialsError(f"batch shapes must broadcast; found {found}") from error
        self.batch = prod(self.batch_shape)
        self._cache: dict[object, Tensor | StepTable] = {}

    def users(self, keys: Sequence[Key]) -> frozenset[str]:
        """The factors whose tables these keys hold."""
        return _users(self.plan, self.keys, tuple(keys))

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

    def factor(self, name: str) -> Tensor:
        """The table of a factor, (batch or 1, *cardinalities)."""
        key, place = self.layout.source[name]
        return self.flat(key) if place is None else self.flat(key)[:, place]

    def evidence(self, names: tuple[str, ...]) -> Tensor:
        """Unary log-evidence of variables of one cardinality, stacked: (batch or 1, len(names), cardinality)."""
        cached = self._cache.get(("evidence", names))
        if isinstance(cached, Tensor):
            return cached
        block, places = _evidence_source(self.plan, self.keys, names)
        size = self.plan.variable[names[0]].cardinality
        if places is None:
            none = torch.zeros(1, size, dtype=self.dtype, device=self.device)
            result = torch.stack(torch.broadcast_tensors(*[self._single(v, none) for v in names]), dim=1)
        elif block is None:
            result = torch.zeros((), dtype=self.dtype, device=self.device).expand(1, len(names), size)
        else:
            result = picked(self.flat(block), places)
        self._cache["evidence", names] = result
        return result

    def _single(self, name: str, none: Tensor) -> Tensor:
        parts = [self.flat(name)] if name in self.raw else []
        parts += [self.flat(b)[:, at[name]] for b, at in self.layout.blocks.items() if name in at]
        for factor in self.plan.unary.get(name, ()):
            # A unary factor named like its variable is that variable's evidence, which was counted above.
            if factor.name != name or name not in self.raw:
                parts.append(self.factor(factor.name))
        return sum(parts[1:], parts[0]) if parts else none

    def step(self, index: int) -> StepTable:
        """Tables of one step, canonical layout; tied tables are laid out once for all steps.

        The linear form of a large one lives as long as the caller's tensor (:mod:`codd_ppl.inference.kept`).
        """
        step = self.plan.steps[index]
        shared = index in self.layout.shared
        key = ("tie", step.tie, step.parent_axis) if shared else ("step", index)
        cached = self._cache.get(key)
        if isinstance(cached, StepTable):
            return cached
        source, place = (step.tie or "", None) if shared else self.layout.source[step.messages[0].factor]
        raw = self.raw[source] if place is None and (shared or len(step.messages) == 1) else None
        if raw is not None and raw.dim() == len(self.shapes[source]) and keepable(raw):
            result = self._cache[key] = KeptTable(raw, step.parent_axis, self.dtype)
            return result
        if shared:
            log = self.flat(step.tie or "")[:, None]
        else:
            tables = [self.factor(m.factor) for m in step.messages]
            log = (
                tables[0][:, None]
                if len(tables) == 1
                else torch.stack(torch.broadcast_tensors(*tables), dim=1)
            )
        laid_out = self._cache[key] = StepTable(log.movedim(2 + step.parent_axis, -1))
        return laid_out

    @property
    def differentiable(self) -> bool:
        """Whether a derivative may be asked for."""
        return any(value.requires_grad for value in self.raw.values())

    def run(self, run: Run) -> tuple[list[Tensor], tuple[int, ...], bool, Tensor | None]:
        """Tables of a run's steps in log space.

        Returns:
            (batch or 1, child, parent) for each step, or a single one that all of them share; for each step its place
            among the factors of the run in the order they were given; whether the parent's axis comes first there; the
            stacked tables (batch or 1, steps, child, parent) if they were given like that.
        """
        first = self.plan.steps[run.start]
        if self.layout.shared.issuperset(range(run.start, run.stop)):
            return [self.step(run.start).log[:, 0]], (), first.parent_axis == 0, None
        names = [step.messages[0].factor for step in self.plan.steps[run.start : run.stop]]
        rows: dict[Key, tuple[Tensor, ...]] = {}
        result, order = [], []
        for key, place in (self.layout.source[name] for name in names):
            if key not in rows:
                rows[key] = (self.flat(key),) if place is None else self.flat(key).unbind(1)
            table = rows[key][place or 0]
            result.append(table.transpose(1, 2) if first.parent_axis == 0 else table)
            order.append(place)
        given = tuple(p for p in order if p is not None)
        flipped = first.parent_axis == 0
        if len(rows) > 1 or sorted(given) != list(range(len(names))):
            return result, tuple(range(len(names))), flipped, None
        block = self.flat(next(iter(rows)))
        return result, given, flipped, block.transpose(2, 3) if flipped else block

    def bad_entries(self) -> str:
        """Names of the keys that hold NaN or +inf, for an error message."""
        found = []
        for key, value in self.raw.items():
            if bool(value.isnan().any()):
                found.append(f"{key!r} holds NaN")
            elif bool((value == torch.inf).any()):
                found.append(f"{key!r} holds +inf")
        return "; ".join(found) or "the sum of finite log-potentials overflows"


@lru_cache(maxsize=256)
def _users(plan: ContractionPlan, all_keys: tuple[Key, ...], keys: tuple[Key, ...]) -> frozenset[str]:
    wanted = set(keys)
    return frozenset(name for name, (key, _) in layout(plan, all_keys).source.items() if key in wanted)


def picked(block: Tensor, places: tuple[int, ...]) -> Tensor:
    """Rows (batch, len(places), n) of a block; a view where they follow each other."""
    first, count = places[0], len(places)
    if places == tuple(range(first, first + count)):
        return block[:, first : first + count]
    if places == tuple(range(first, first - count, -1)):
        return block[:, first - count + 1 : first + 1].flip(1)
    return block.index_select(1, index(places, block.device))


@lru_cache(maxsize=1024)
def index(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Places as an index tensor; the last thousand are kept."""
    with torch.inference_mode(False):
        return torch.tensor(places, device=device)


@lru_cache(maxsize=512)
def _evidence_source(
    plan: ContractionPlan, keys: tuple[Key, ...], names: tuple[str, ...]
) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """The one block that holds all evidence of these variables, and their places in it.

    (None, ()) where there is no evidence; (.., None) where it comes from several places.
    """
    blocks = [key for key in keys if isinstance(key, tuple) and key[0] in plan.variable]
    found = [b for b in blocks if not set(b).isdisjoint(names)]
    if any(plan.unary.get(v) for v in names) or not set(keys).isdisjoint(names):
        return None, None
    if not found:
        return None, ()
    places = {v: i for i, v in enumerate(found[0])}
    if len(found) > 1 or any(v not in places for v in names):
        return None, None
    return found[0], tuple(places[v] for v in names)


@lru_cache(maxsize=512)
def _event_shape(plan: ContractionPlan, key: Key) -> tuple[int, ...]:
    """The cardinalities that a key's tensor ends with."""
    if isinstance(key, tuple):
        found = {_event_shape(plan, name) for name in key if name in plan.variable}
        if not found:
            found = {_event_shape(plan, name) for name in key if name in plan.factor}
        known = plan.variable if key and key[0] in plan.variable else plan.factor
        if len(found) != 1 or any(name not in known for name in key) or len(set(key)) != len(key):
            raise PotentialsError(
                f"log_potentials key {key!r}: a tuple must name distinct variables of equal cardinality, "
                "or distinct factors with tables of equal shape"
            )
        return (len(key), *found.pop())
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
