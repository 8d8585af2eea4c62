"""Exact sum-product where every batch element has a tree of its own over the same sites.

    p(x) = 1/Z  prod_i exp(log_evidence_i[x_i])  prod_{i with a parent} exp(table_i[x_i, x_parent(i)])

A compiled plan is one graph for the whole batch; here the graph is data. The sites of all trees that are equally far
from their root form a level, and a level is one batched step: as many steps as the deepest tree has levels, whatever
the number of trees. Everything is in log space and differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from codd_ppl.errors import InfeasibleError, PotentialsError, ShapeError
from codd_ppl.inference.dynamic_forest import DynamicForest
from codd_ppl.inference.sampling import categorical
from codd_ppl.inference.semirings import safe_logsumexp
from codd_ppl.typing import Bool, Float, Int

__all__ = [
    "DynamicForest",
    "EdgeTables",
    "SharedTables",
    "Tables",
    "clamp",
    "log_partition",
    "log_prob",
    "marginals",
    "sample",
]


@runtime_checkable
class EdgeTables(Protocol):
    """Tables of edges, made when they are needed."""

    def log_tables(self, rows: Tensor, /) -> Tensor:
        """(edges) batch element * sites + site of the children -> (edges, vocab, vocab), oriented (child, parent)."""


@dataclass(frozen=True, eq=False)
class SharedTables:
    """A few tables, and which of them each site shares with its parent: by the distance of the two, for instance.

    Args:
        tables: (kinds, vocab, vocab) log-potentials, oriented (child, parent); -inf is legal.
        kind: (*batch, sites) int64; not read at roots.
    """

    tables: Float[Tensor, "kinds vocab vocab"]
    kind: Int[Tensor, "*batch sites"]

    def log_tables(self, rows: Int[Tensor, " edges"], /) -> Float[Tensor, "edges vocab vocab"]:
        """The table of each edge."""
        return self.tables[self.kind.reshape(-1)[rows]]


Tables = Tensor | EdgeTables
"""(*batch, sites, vocab, vocab), oriented (child, parent) and not read at roots; or an object that makes them."""


def log_partition(
    forest: DynamicForest, log_evidence: Float[Tensor, "*batch sites vocab"], tables: Tables
) -> Float[Tensor, "*batch"]:
    """log Z of each batch element; its gradient in the evidence is the marginals.

    Args:
        forest: one forest for each batch element.
        log_evidence: -inf: impossible.
        tables: log-potentials of the edges, see :data:`Tables`.

    Returns:
        (*batch) nats; -inf (gradient 0) where nothing is possible.

    Raises:
        ShapeError: evidence or tables that don't fit the forest.
        PotentialsError: NaN or +inf.
    """
    return _Upward(forest, log_evidence, tables).total


def marginals(
    forest: DynamicForest, log_evidence: Float[Tensor, "*batch sites vocab"], tables: Tables
) -> Float[Tensor, "*batch sites vocab"]:
    """Probability of each value at each site, by one pass down.

    Raises:
        ShapeError, PotentialsError: as in :func:`log_partition`.
        InfeasibleError: nothing is possible in some batch element.
    """
    up = _Upward(forest, log_evidence, tables)
    up.require_feasible()
    found: list[Tensor] = []
    for index, level in enumerate(forest.levels):
        log = up.beliefs[index]
        if not index:
            found.append(_probabilities(log, -1))
            continue
        given = _probabilities(up.table(level.rows) + log[..., None], -2)  # p(child | parent)
        found.append((given @ found[-1][level.above][..., None])[..., 0])
    place = torch.cat([level.rows for level in forest.levels]).argsort()
    return torch.cat(found)[place].reshape(log_evidence.shape)


def sample(
    forest: DynamicForest,
    log_evidence: Float[Tensor, "*batch sites vocab"],
    tables: Tables,
    sample_shape: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Int[Tensor, "*shape sites"]:
    """Exact joint draws, (*sample_shape, *batch, sites); the upward pass is shared by all of them.

    Raises:
        ShapeError, PotentialsError, InfeasibleError: as in :func:`marginals`.
    """
    with torch.no_grad():
        up = _Upward(forest, log_evidence, tables)
        up.require_feasible()
        draws = int(torch.Size(sample_shape).numel())
        found: list[Tensor] = []
        for index, level in enumerate(forest.levels):
            log = up.beliefs[index].expand(draws, *up.beliefs[index].shape)
            if index:
                given = up.table(level.rows).mT  # (edges, parent, child)
                edge = torch.arange(len(level.rows), device=log.device)
                log = log + given[edge, found[-1][:, level.above]]
            found.append(categorical(log, generator))
        place = torch.cat([level.rows for level in forest.levels]).argsort()
        return torch.cat(found, -1)[:, place].reshape(*sample_shape, *log_evidence.shape[:-1])


def clamp(
    log_evidence: Float[Tensor, "*batch sites vocab"],
    value: Int[Tensor, "*batch sites"],
    sites: Bool[Tensor, "*batch sites"],
) -> Float[Tensor, "*batch sites vocab"]:
    """Evidence that allows the given value only, at the given sites."""
    values = torch.arange(log_evidence.shape[-1], device=log_evidence.device)
    return torch.where(sites[..., None] & (values != value[..., None]), -torch.inf, log_evidence)


def log_prob(
    forest: DynamicForest,
    log_evidence: Float[Tensor, "*batch sites vocab"],
    tables: Tables,
    value: Int[Tensor, "*batch sites"],
    sites: Bool[Tensor, "*batch sites"],
) -> Float[Tensor, "*batch"]:
    """log p(x_S) with the other sites summed out: log Z(S clamped) - log Z.

    Raises:
        ShapeError, PotentialsError, InfeasibleError: as in :func:`marginals`.
    """
    free = _Upward(forest, log_evidence, tables)
    free.require_feasible()
    return log_partition(forest, clamp(log_evidence, value, sites), tables) - free.total


class _Upward:
    """Beliefs of the sites given all that hangs on them, level by level."""

    def __init__(self, forest: DynamicForest, log_evidence: Tensor, tables: Tables) -> None:
        _check(forest, log_evidence, tables)
        self.forest, self.tables = forest, tables
        vocab = log_evidence.shape[-1]
        evidence = log_evidence.reshape(-1, vocab)
        beliefs: list[Tensor] = []
        message: Tensor | None = None
        for index in range(len(forest.levels) - 1, -1, -1):
            level = forest.levels[index]
            belief = evidence[level.rows]
            if message is not None:
                belief = belief.index_add(0, forest.levels[index + 1].above, message)
            beliefs.append(belief)
            if index:
                message = safe_logsumexp(self.table(level.rows) + belief[..., None], -2)
        self.beliefs = beliefs[::-1]
        batch = log_evidence.shape[:-2]
        total = evidence.new_zeros(batch.numel())
        if self.beliefs:
            roots = safe_logsumexp(self.beliefs[0], -1)
            total = total.index_add(0, forest.levels[0].rows // forest.sites, roots)
        self.total = total.reshape(batch)

    def table(self, rows: Tensor) -> Tensor:
        if isinstance(self.tables, Tensor):
            return self.tables.reshape(-1, *self.tables.shape[-2:])[rows]
        return self.tables.log_tables(rows)

    def require_feasible(self) -> None:
        bad = (self.total == -torch.inf).nonzero()
        if len(bad):
            raise InfeasibleError(
                f"no assignment is possible in batch element {tuple(bad[0].tolist())}: the evidence and the tables "
                "rule out every value; look for sites whose evidence is -inf throughout"
            )


def _probabilities(log: Tensor, dim: int) -> Tensor:
    """Normalised; zero where every entry is -inf."""
    total = safe_logsumexp(log, dim).unsqueeze(dim)
    return (log - torch.where(total == -torch.inf, 0.0, total)).exp()


def _check(forest: DynamicForest, log_evidence: Tensor, tables: Tables) -> None:
    shape = tuple(forest.parents.shape)
    if not log_evidence.is_floating_point() or tuple(log_evidence.shape[:-1]) != shape:
        raise ShapeError(
            f"expected floating log_evidence of shape {(*shape, 'vocab')}, one row for each site of each forest, found "
            f"{log_evidence.dtype} {tuple(log_evidence.shape)}; expand the parents or the evidence"
        )
    vocab = log_evidence.shape[-1]
    if isinstance(tables, Tensor) and tuple(tables.shape) != (*shape, vocab, vocab):
        raise ShapeError(
            f"expected tables of shape {(*shape, vocab, vocab)}, oriented (child, parent), found {tuple(tables.shape)}"
            "; tables that edges have in common go into SharedTables"
        )
    if isinstance(tables, SharedTables) and (
        tuple(tables.tables.shape[1:]) != (vocab, vocab) or tuple(tables.kind.shape) != shape
    ):
        raise ShapeError(
            f"expected shared tables (kinds, {vocab}, {vocab}) and kind {shape}, found {tuple(tables.tables.shape)} "
            f"and {tuple(tables.kind.shape)}"
        )
    given = tables if isinstance(tables, Tensor) else getattr(tables, "tables", None)
    for name, tensor in (("log_evidence", log_evidence), ("tables", given)):
        if isinstance(tensor, Tensor) and bool((~(tensor.detach() < torch.inf)).any()):
            raise PotentialsError(f"{name} holds NaN or +inf; log-potentials must be finite or -inf")
