"""Kullback-Leibler divergence between coupled categoricals."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from codd_ppl.distributions.coupled_categorical import CoupledCategorical
from codd_ppl.errors import IntractableError, ShapeError
from codd_ppl.inference import kl
from codd_ppl.typing import Float

__all__ = ["kl_divergence"]


@register_kl(CoupledCategorical, CoupledCategorical)
def kl_divergence(p: CoupledCategorical, q: CoupledCategorical) -> Float[Tensor, "*batch"]:
    """KL(p || q) in nats, +inf where p allows what q forbids.

    Exact on one graph without latents (:func:`codd_ppl.inference.kl`), and by listing the support of any two when it
    is small.

    Raises:
        ShapeError: sequences of other lengths or vocabularies.
        InfeasibleError: known tokens of p or q that are impossible.
        IntractableError: latents (or two graphs) and a large support.
    """
    if p.event_shape != q.event_shape or p.vocab_size != q.vocab_size:
        raise ShapeError(
            f"expected the same sites and vocabulary, found {tuple(p.event_shape)} x {p.vocab_size} and "
            f"{tuple(q.event_shape)} x {q.vocab_size}"
        )
    if p.plan == q.plan and not any(v.latent for v in p.plan.variables):
        return kl(p.plan, p.log_potentials, q.log_potentials)
    if p.has_enumerate_support:
        shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
        values = p.expand(shape).enumerate_support()
        log_p, log_q = p.log_prob(values), q.log_prob(values)
        gap = torch.where(log_p == -torch.inf, 0.0, log_p - log_q)
        return (log_p.exp() * gap).sum(0)
    raise IntractableError(
        "the divergence between laws with latent variables (or over two graphs) is intractable at this size; estimate "
        "it as (p.log_prob(x) - q.log_prob(x)).mean(0) with x = p.sample((100,))"
    )
