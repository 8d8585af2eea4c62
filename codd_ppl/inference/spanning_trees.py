"""Sums, draws and maxima over all spanning trees of a weighted graph, for a batch of graphs at once.

The weight of a tree T is prod_{ij in T} beta_ij. Their sum is a determinant of the reduced Laplacian (Kirchhoff 1847,
the matrix-tree theorem), computed by taking the sites out one by one (:mod:`codd_ppl.inference.star_mesh`), so that no
spread of the weights costs digits. Run backwards the same draws a tree exactly, also in n steps: let T' be a tree of
the graph without site k, directed to the root. Each of its edges i -> j goes through k with chance
(beta_ik beta_kj / d_k) / beta'_ij; those then point to k, and k points to a site j of the part that still reaches the
root, with chance proportional to beta_kj. (The trees over the parts that hang on k sum to the mass of the root's part,
by Cayley's formula for weighted rooted forests.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codd_ppl.errors import InfeasibleError, PotentialsError, ShapeError
from codd_ppl.inference import star_mesh
from codd_ppl.inference.sampling import categorical
from codd_ppl.inference.semirings import safe_logsumexp
from codd_ppl.typing import Bool, Float, Int

__all__ = ["edge_marginals", "log_partition", "maximum_spanning_forest", "sample"]


def log_partition(
    log_beta: Float[Tensor, "*batch sites sites"], members: Bool[Tensor, "*batch sites"] | None = None
) -> Float[Tensor, "*batch"]:
    """log sum_T prod_{ij in T} beta_ij over the spanning trees T of the members.

    Its gradient is the :func:`edge_marginals`, half of each in (i, j), half in (j, i); it can be differentiated again.

    Args:
        log_beta: symmetric; -inf: no edge. The diagonal is not read.
        members: the sites that take part, for each graph its own; None: all. One member, or none, has one tree, the
            empty one, of weight 1.

    Returns:
        (*batch) nats, of the dtype of ``log_beta`` (float64 inside); -inf (gradient 0) where the members hang not
        together.

    Raises:
        ShapeError: not square, not floating, or members of another shape.
        PotentialsError: NaN, +inf or an asymmetric matrix.
    """
    weights, inside = _checked(log_beta, members)
    total: Tensor = _LogPartition.apply(weights, inside)
    return total.reshape(log_beta.shape[:-2]).to(log_beta.dtype)


def edge_marginals(
    log_beta: Float[Tensor, "*batch sites sites"], members: Bool[Tensor, "*batch sites"] | None = None
) -> Float[Tensor, "*batch sites sites"]:
    """Chance that each edge is in the tree: beta_ij R_ij with R the effective resistance; symmetric.

    Each graph's sum over i < j is the number of its members less one.

    Raises:
        ShapeError, PotentialsError: as in :func:`log_partition`.
        InfeasibleError: the members of some graph don't hang together.
    """
    weights, inside = _checked(log_beta, members)
    _require_connected(star_mesh.log_total(star_mesh.eliminate(weights, inside), inside), log_beta.shape[:-2])
    return star_mesh.edge_marginals(weights, inside).reshape(log_beta.shape).to(log_beta.dtype)


def sample(
    log_beta: Float[Tensor, "*batch sites sites"],
    members: Bool[Tensor, "*batch sites"] | None = None,
    sample_shape: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Int[Tensor, "*shape sites"]:
    """Exact draws of a spanning tree, as the parent of each site (-1: the root, the first member; -1: no member).

    n steps, each for the whole batch and all draws; the elimination is shared by the draws.

    Raises:
        ShapeError, PotentialsError: as in :func:`log_partition`.
        InfeasibleError: the members of some graph don't hang together.
    """
    weights, inside = _checked(log_beta, members)
    weights = weights.detach()
    gone = star_mesh.eliminate(weights, inside)
    _require_connected(star_mesh.log_total(gone, inside), log_beta.shape[:-2])
    batch, n = inside.shape
    draws = int(torch.Size(sample_shape).numel())
    active = (inside & ~star_mesh.roots(inside)).expand(draws, batch, n)
    # Path weights through every site k that was taken out, from i: beta_ik, to j: beta_kj / d_k.
    row, degree = gone.log_rows, gone.log_degrees
    onward = torch.where(
        degree == -torch.inf, -torch.inf, row - torch.where(degree == -torch.inf, 0.0, degree)
    )
    parents = torch.full((draws, batch, 1), -1, dtype=torch.int64, device=weights.device)
    for k in range(1, n):
        here = active[..., k, None]
        target = parents.clamp_min(0)
        rest = n - k
        at = target[:, :, None].expand(draws, batch, rest, k)
        through = row[:, k:, :k] + onward[:, k:, :k].expand(draws, batch, rest, k).gather(-1, at)
        direct = weights[:, :k, :k].expand(draws, batch, k, k).gather(-1, target[..., None])[..., 0]
        total = safe_logsumexp(torch.cat([direct[:, :, None], through], 2), 2)
        chance = (through[:, :, 0] - torch.where(total == -torch.inf, 0.0, total)).exp()
        coin = torch.rand(chance.shape, generator=generator, dtype=torch.float64, device=chance.device)
        via = here & (parents >= 0) & (coin < chance)
        reaches = _reaching(parents, ~via)
        choice = torch.where(reaches, row[:, k, :k].expand(draws, batch, k), -torch.inf)
        found = categorical(torch.where(here, choice, 0.0), generator)[..., None]
        parents = torch.cat([torch.where(via, k, parents), torch.where(here, found, -1)], -1)
    return parents.reshape(*sample_shape, *log_beta.shape[:-1])


def maximum_spanning_forest(
    scores: Float[Tensor, "*batch sites sites"], members: Bool[Tensor, "*batch sites"] | None = None
) -> Int[Tensor, "*batch sites"]:
    """The spanning forest of largest total score, as the parent of each site (-1: a root, or no member).

    Prim's algorithm, n steps for the whole batch. Scores may be negative; only -inf parts the members into trees,
    each rooted at its first site. Chow and Liu (1968): with mutual information as the score it is the best tree law.

    Raises:
        ShapeError, PotentialsError: as in :func:`log_partition`.
    """
    weights, inside = _checked(scores.detach(), members)
    batch, n = inside.shape
    each = torch.arange(batch, device=weights.device)
    best = torch.full((batch, n), -torch.inf, dtype=weights.dtype, device=weights.device)
    towards = torch.full((batch, n), -1, dtype=torch.int64, device=weights.device)
    parents = towards
    left = inside
    first = torch.arange(n, 0, -1, device=weights.device)
    for _ in range(n):
        open_ = left & (best > -torch.inf)
        grow = open_.any(-1)
        site = torch.where(
            grow,
            torch.where(open_, best, -torch.inf).argmax(-1),
            torch.where(left, first, 0).argmax(-1),  # the first member that is left starts a tree
        )
        chosen = torch.nn.functional.one_hot(site, n).bool() & left
        parents = torch.where(chosen & grow[:, None], towards, parents)
        left = left & ~chosen
        row = torch.where(chosen.any(-1, keepdim=True), weights[each, site], -torch.inf)
        better = row > best
        best, towards = torch.where(better, row, best), torch.where(better, site[:, None], towards)
    return parents.reshape(scores.shape[:-1])


class _LogPartition(torch.autograd.Function):
    """The elimination forward, the edge marginals backward."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(weights, inside)
        return star_mesh.log_total(star_mesh.eliminate(weights, inside), inside)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, inside = ctx.saved_tensors
        return grad[:, None, None] * star_mesh.edge_marginals(weights, inside) / 2, None


def _reaching(parents: Tensor, keeps: Tensor) -> Tensor:
    """Sites whose way to the root passes only sites that keep their parent; by doubling the steps."""
    k = parents.shape[-1]
    to = torch.where(parents < 0, torch.arange(k, device=parents.device), parents)
    for _ in range(k.bit_length()):
        keeps = keeps & keeps.gather(-1, to)
        to = to.gather(-1, to)
    return keeps


def _require_connected(total: Tensor, batch_shape: tuple[int, ...]) -> None:
    torn = (total.reshape(batch_shape) == -torch.inf).nonzero()
    if len(torn):
        raise InfeasibleError(
            f"the members of batch element {tuple(torn[0].tolist())} don't hang together, so that no tree spans them; "
            "give every pair a small weight, or ask for maximum_spanning_forest"
        )


def _checked(log_beta: Tensor, members: Tensor | None) -> tuple[Tensor, Tensor]:
    """(batch, n, n) float64 without edges to others than members, and the members (batch, n)."""
    shape = tuple(log_beta.shape)
    if not log_beta.is_floating_point() or len(shape) < 2 or shape[-1] != shape[-2] or not shape[-1]:
        raise ShapeError(
            f"expected edge weights as floating (*batch, sites, sites), sites >= 1, found {log_beta.dtype} {shape}"
        )
    if members is None:
        members = torch.ones(shape[:-1], dtype=torch.bool, device=log_beta.device)
    if members.dtype != torch.bool or tuple(members.shape) != shape[:-1]:
        raise ShapeError(
            f"expected members as bool {shape[:-1]}, found {members.dtype} {tuple(members.shape)}"
        )
    n = shape[-1]
    inside = members.reshape(-1, n)
    weights = log_beta.double().reshape(-1, n, n)
    edges = inside[:, :, None] & inside[:, None] & ~torch.eye(n, dtype=torch.bool, device=weights.device)
    weights = torch.where(edges, weights, -torch.inf)
    seen = weights.detach()
    if bool((~(seen < torch.inf)).any()):
        raise PotentialsError(
            "edge weights hold NaN or +inf; log-weights must be finite, or -inf for no edge"
        )
    gap = torch.where(seen == seen.mT, 0.0, (seen - seen.mT).abs())
    if bool((gap > 1e-4 * (1 + torch.where(seen == -torch.inf, 0.0, seen.abs()))).any()):
        raise PotentialsError(
            "edge weights are not symmetric, but spanning trees have no direction; pass (log_beta + log_beta.mT) / 2"
        )
    return (weights + weights.mT) / 2, inside
