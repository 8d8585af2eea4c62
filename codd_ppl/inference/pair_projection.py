"""Joint laws of two tokens with given marginals, as close as possible to a given dependence; many pairs at once.

For each pair of sites, with network marginals q and s and a table K = exp(log_table), the I-projection

    p(x, y) = q(x) s(y) r(x, y),    r = u(x) K(x, y) v(y),    sum_y s r = 1,  sum_x q r = 1

is found by Sinkhorn iterations u = 1 / K (s v), v = 1 / K' (q u) (Sinkhorn 1967; Csiszar 1975). What is left of the
marginals' error after a few of them is then removed: u and v are cut until no marginal is exceeded, and the missing
mass is filled with independent tokens (Altschuler, Weed and Rigollet 2017, algorithm 2),

    r = u K v + e(x) f(y) / m,    e = 1 - u K (s v),  f = 1 - v K' (q u),  m = sum q e = sum s f

so that the marginals are exact to rounding after any number of iterations, also where no p on the support of K has
them. Pairs that share a table cost one matrix product per iteration; no pair has a table of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codd_ppl.errors import ConfigError, PotentialsError, ShapeError
from codd_ppl.inference.semirings import safe_logsumexp
from codd_ppl.typing import Bool, Float, Int

__all__ = ["PairLaws", "project_pairs"]

SPREAD = 250.0
"""Nats between the largest and the smallest entry of a table up to which float64 needs no logarithms."""


@dataclass(frozen=True, eq=False)
class PairLaws:
    """The ratios r(x, y) = p(x, y) / (q(x) s(y)) of many pairs; float64.

    Attributes:
        tables: (kinds, vocab, vocab) log-tables, entry [x, y] with x the value of the left site.
        kind: which table each pair has.
        log_left, log_right: log u and log v of each pair.
        missing_left, missing_right: e and f / m.
        residual: total variation by which the marginals were off after the last iteration; 0 is converged.
    """

    tables: Float[Tensor, "kinds vocab vocab"]
    kind: Int[Tensor, " pairs"]
    log_left: Float[Tensor, "pairs vocab"]
    log_right: Float[Tensor, "pairs vocab"]
    missing_left: Float[Tensor, "pairs vocab"]
    missing_right: Float[Tensor, "pairs vocab"]
    residual: Float[Tensor, " pairs"]

    def at(
        self, left: Int[Tensor, "*draws pairs"], right: Int[Tensor, "*draws pairs"]
    ) -> Float[Tensor, "*draws pairs"]:
        """log r at one value of each pair."""
        each = torch.arange(len(self.kind), device=self.kind.device)
        log = self.log_left[each, left] + self.tables[self.kind, left, right] + self.log_right[each, right]
        return _log(log.exp() + self.missing_left[each, left] * self.missing_right[each, right])

    def given(
        self, pairs: Int[Tensor, " n"], value: Int[Tensor, " n"], is_left: Bool[Tensor, " n"]
    ) -> Float[Tensor, "n vocab"]:
        """log r of all values of one site of some pairs, given the value of the left (else the right) site."""
        kind, side = self.kind[pairs], is_left[:, None]
        rows = torch.where(side, self.tables[kind, value], self.tables[kind, :, value])
        own = torch.where(is_left, self.log_left[pairs, value], self.log_right[pairs, value])
        other = torch.where(side, self.log_right[pairs], self.log_left[pairs])
        e = torch.where(is_left, self.missing_left[pairs, value], self.missing_right[pairs, value])
        f = torch.where(side, self.missing_right[pairs], self.missing_left[pairs])
        return _log((own[:, None] + rows + other).exp() + e[:, None] * f)

    def dense(self, pairs: Int[Tensor, " n"]) -> Float[Tensor, "n vocab vocab"]:
        """log r of some pairs, [left, right]."""
        log = self.log_left[pairs, :, None] + self.tables[self.kind[pairs]] + self.log_right[pairs, None]
        return _log(log.exp() + self.missing_left[pairs, :, None] * self.missing_right[pairs, None])


def project_pairs(
    tables: Float[Tensor, "kinds vocab vocab"],
    kind: Int[Tensor, " pairs"],
    log_left: Float[Tensor, "pairs vocab"],
    log_right: Float[Tensor, "pairs vocab"],
    iterations: int = 10,
) -> PairLaws:
    """Project the dependence of each pair's table onto its marginals (differentiable through all iterations).

    Args:
        tables: log-dependence, [x left, y right], such as pointwise mutual information; constants, and any function of
            one of the values alone, make no difference at the limit. -inf: not together, as far as the marginals allow.
        kind: which table each pair has, 0 .. kinds - 1.
        log_left, log_right: log-marginals (normalised here in float64) of each pair; -inf is legal.
        iterations: Sinkhorn iterations; the error falls by about the squared correlation of the pair with each.

    Raises:
        ConfigError: iterations < 1.
        ShapeError: shapes that don't fit, or a kind without a table.
        PotentialsError: NaN or +inf in a table.
    """
    if iterations < 1:
        raise ConfigError(f"iterations must be at least 1, found {iterations}")
    vocab = tables.shape[-1]
    shape = (len(kind), vocab)
    if (
        tuple(tables.shape[1:]) != (vocab, vocab)
        or tuple(log_left.shape) != shape
        or log_right.shape != log_left.shape
    ):
        raise ShapeError(
            f"expected tables (kinds, vocab, vocab) and marginals {shape}, found {tuple(tables.shape)}, "
            f"{tuple(log_left.shape)} and {tuple(log_right.shape)}"
        )
    if len(kind) and not 0 <= int(kind.min()) <= int(kind.max()) < len(tables):
        raise ShapeError(f"expected kinds from 0 to {len(tables) - 1}, found {kind.min()} .. {kind.max()}")
    if bool((~(tables.detach() < torch.inf)).any()):
        raise PotentialsError("a pair table holds NaN or +inf; its entries must be finite or -inf")
    tables, q, s = tables.double(), log_left.double().log_softmax(-1), log_right.double().log_softmax(-1)
    order = kind.argsort(stable=True)
    counts = torch.bincount(kind, minlength=len(tables)).tolist()
    parts: list[tuple[Tensor, ...]] = []
    for table, rows in zip(tables.unbind(0), order.split(counts), strict=True):
        if len(rows):
            parts.append(_sinkhorn(_Kernel(table), q[rows], s[rows], iterations))
    if not parts:
        empty = tables.new_zeros(0, vocab)
        return PairLaws(tables, kind, empty, empty, empty, empty, empty.sum(-1))
    back = order.argsort()
    u, v, e, f, residual = (torch.cat(pieces)[back] for pieces in zip(*parts, strict=True))
    return PairLaws(tables, kind, u, v, e, f, residual)


class _Kernel:
    """Log of a product with exp(table), for rows of weights: linear where float64 holds the table, else by logs."""

    def __init__(self, table: Tensor) -> None:
        seen = table.detach()
        self.log = table
        self.linear: Tensor | None = None
        if bool(seen.isfinite().all()) and float(seen.max() - seen.min()) <= SPREAD:
            self.top = seen.max()
            self.linear = (table - self.top).exp()

    def rows(self, weights: Tensor) -> Tensor:
        """log sum_y K[x, y] exp(weights[y])."""
        return self._product(weights, transposed=False)

    def columns(self, weights: Tensor) -> Tensor:
        """log sum_x K[x, y] exp(weights[x])."""
        return self._product(weights, transposed=True)

    def _product(self, weights: Tensor, transposed: bool) -> Tensor:
        if self.linear is None:
            table = self.log.mT if transposed else self.log
            return torch.cat([safe_logsumexp(w[:, None] + table, -1) for w in weights.split(64)])
        top = weights.detach().amax(-1, keepdim=True)
        product = (weights - top).exp() @ (self.linear if transposed else self.linear.mT)
        return product.log() + top + self.top


def _sinkhorn(kernel: _Kernel, q: Tensor, s: Tensor, iterations: int) -> tuple[Tensor, ...]:
    v = torch.zeros_like(s)
    for _ in range(iterations):
        u = _inverse(kernel.rows(s + v))
        v = _inverse(kernel.columns(q + u))
    # Cut: first the rows that are too heavy, then the columns; what is missing then is non-negative.
    over = u + kernel.rows(s + v)
    residual = (q.exp() * (over.exp() - 1).abs()).sum(-1).detach() / 2
    u = u - over.clamp_min(0.0)
    v = v - (v + kernel.columns(q + u)).clamp_min(0.0)
    e = (1 - (u + kernel.rows(s + v)).exp()).clamp_min(0.0)
    f = (1 - (v + kernel.columns(q + u)).exp()).clamp_min(0.0)
    mass = torch.maximum((q.exp() * e).sum(-1), (s.exp() * f).sum(-1))[:, None]
    return u, v, e, f * torch.where(mass > 1e-200, 1 / mass.clamp_min(1e-200), 0.0), residual


def _inverse(log: Tensor) -> Tensor:
    """-log, and 0 for a value that no table entry supports: its mass is filled in at the end."""
    empty = log == -torch.inf
    return torch.where(empty, 0.0, -torch.where(empty, 0.0, log))


def _log(ratio: Tensor) -> Tensor:
    """log, -inf with gradient 0 at 0."""
    zero = ratio == 0
    return torch.where(zero, -torch.inf, torch.where(zero, 1.0, ratio).log())
