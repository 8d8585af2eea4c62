"""The I-projection of a law along a hidden Markov model of a small vocabulary, by compiled passes.

Site by site, to the right: w_i = q_i / c_i, m_i = (w_i u_i) P^T, f_{i+1} = (f_i m_i l_i) T, in the letters of
:mod:`codd_ppl.inference.hidden_path`, with u_i the evidence of the token's values. None where the passes can't be had.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from codd_ppl.inference import native
from codd_ppl.inference.hidden_path import Arguments, HiddenPath
from codd_ppl.inference.path_model import linear_form
from codd_ppl.typing import Float

__all__ = ["project_path", "project_path_pooled"]


def project_path(
    path: HiddenPath,
    log_targets: Float[Tensor, "*batch sites vocab"],
    sweeps: int,
    tolerance: float,
    start: Float[Tensor, "*batch sites vocab"] | None,
) -> HiddenPath | None:
    """The I-projection onto these marginals at the free sites, as :func:`codd_ppl.inference.projection.project`.

    Args:
        path: the prior given the known tokens.
        log_targets: log q, normalised; 0 where the token is known.
        sweeps, tolerance: as there.
        start: log-weights to begin with, from :func:`codd_ppl.inference.first_weights.first_weights`; None: all 1.
    """
    learned = log_targets.requires_grad or (start is not None and start.requires_grad)
    if (torch.is_grad_enabled() and learned) or log_targets.dtype != path.said.dtype:
        return None
    free, own = path.free[..., None], path.weight
    log_targets = log_targets.reshape(*path.free.shape, -1)
    start = None if start is None else start.reshape(log_targets.shape)
    possible = None if own is None else own > 0
    quotient = log_targets.exp().contiguous()
    if possible is not None:
        quotient = torch.where(possible, quotient, 0.0)
    now, weights = path, start
    if start is not None:
        first = linear_form(start, -1) if own is None else own * linear_form(start, -1)
        now = replace(path, said=torch.where(free, first @ path.model.tokens, path.said))
    for _ in range(sweeps):
        if now.right is None:
            return None
        said, cavity = now.said.clone(), torch.ones_like(quotient)
        left = now.to_the_right(cavity, own, quotient, said)
        if left is None:
            return None
        fitted = log_targets - cavity.log()
        if own is not None and possible is not None:
            fitted = torch.where(free, torch.where(possible, fitted - own.log(), -torch.inf), 0.0)
        before, weights = weights, fitted
        now = HiddenPath(path.model, path.tokens, path.free, quotient / cavity, said, left, fitted)
        if before is not None and tolerance > 0 and _change(weights, before) <= tolerance:
            break
    return now


def project_path_pooled(
    path: HiddenPath,
    log_network: Float[Tensor, "*batch sites vocab"],
    knots: Float[Tensor, " shares"],
    weights: Float[Tensor, "knots 3"],
) -> HiddenPath | None:
    """The same in one sweep onto a logarithmic pool (:class:`codd_ppl.potentials.LogarithmicPool`) of the network's

    and the prior's marginals: these are read off messages that go to the right along with those of the fit. For
    tokens without evidence of their own.

    Args:
        path: the prior given the known tokens.
        log_network: log-marginals of the network, normalised.
        knots, weights: of the pool.
    """
    learned = torch.is_grad_enabled() and (log_network.requires_grad or weights.requires_grad)
    alone = None if path.weight is not None or learned else path.unconditional().log_marginals
    if alone is None or path.right is None or log_network.dtype != path.said.dtype:
        return None
    (batch, sites, states), model, vocab = path.said.shape, path.model, path.model.emit.shape[1]
    right, network = path.right, log_network.reshape(batch, sites, vocab).contiguous()
    knots, weights = (t.detach().to(network).contiguous() for t in (knots, weights))
    said, left, weight = path.said.clone(), torch.empty_like(path.said), torch.ones_like(network)
    log_weights, wide = torch.zeros_like(network), max(states, vocab)

    def part(cut: native.Cut) -> Arguments:
        own, apart = cut(said), 0 if len(alone) == 1 else sites * vocab
        count = len(own)
        return (
            sites, count, states, vocab, model.emit, model.tokens, model.move, *model.evidence(cut), cut(path.free),
            cut(right), len(weights), knots, weights, cut(network), cut(alone) if apart else alone, apart, own,
            cut(left), own.new_empty(count * states), cut(weight), cut(log_weights), own.new_empty(count * 3),
            own.new_empty(count * (4 * wide + 2) + 2 * vocab), path.tokens.new_empty(count),
        )  # fmt: skip

    if path.run("path_pool", part) <= path.limit:
        return None
    return HiddenPath(model, path.tokens, path.free, weight, said, left, log_weights)


def _change(weights: Tensor, before: Tensor) -> float:
    difference = weights - before
    return float(torch.where(torch.isfinite(difference), difference, 0.0).abs().amax())
