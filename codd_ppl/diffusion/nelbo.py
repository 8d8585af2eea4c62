"""The T-step bound of masked diffusion, estimated from one noised batch.

    NELBO_T(x0) = sum_{k=1..T} E_{xt_k ~ q} E_S [ -log p(x_S | xt_k) ]   >=   -log p(x0)

where step k masks each token with probability 1 - alpha_k and S holds each masked site with
probability r_k, whatever the values. One noised batch draws one step k per sequence and weighs it
by T. Both estimators below are unbiased for every single sequence, differentiable, and in nats.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from codd_ppl.diffusion.masking import mask_tokens, reveal, stratified_times
from codd_ppl.diffusion.schedules import Schedule, check_steps
from codd_ppl.errors import ShapeError
from codd_ppl.typing import Bool, Float, Int, Tensor

__all__ = [
    "NoisedBatch",
    "SetDistribution",
    "SubsetDistribution",
    "coupled_nelbo",
    "factorised_nelbo",
    "noise",
]


@runtime_checkable
class SubsetDistribution(Protocol):
    """What the bound asks of a denoiser's output: the exact marginal of any set of masked sites."""

    def log_prob(self, value: Tensor, /, sites: Tensor | None = None) -> Tensor:
        """log p(x_S | xt), (*batch) nats, S given as a bool mask over the sites."""


@runtime_checkable
class SetDistribution(SubsetDistribution, Protocol):
    """A law for each set of sites, none the marginal of a larger set's (spanning trees).

    ``log_prob(x, sites=S)`` is that of S. The bound holds for such laws too: a step draws one set, whatever the values.
    But whoever draws tokens must choose S first, and draw from ``restrict(S)``.
    """

    def restrict(self, sites: Tensor) -> Any:
        """The law of the masked ones of ``sites``, (*batch, sites) bool; what it draws elsewhere is not used."""


@dataclass(frozen=True)
class NoisedBatch:
    """One draw of the noise: step k per sequence, xt ~ q(xt_k | x0), and the set S revealed by step k."""

    x0: Int[Tensor, "*batch sites"]
    xt: Int[Tensor, "*batch sites"]
    known: Bool[Tensor, "*batch sites"]
    revealed: Bool[Tensor, "*batch sites"]
    step: Int[Tensor, "*batch"]
    rate: Float[Tensor, "*batch"]
    steps: int

    @property
    def masked(self) -> Bool[Tensor, "*batch sites"]:
        """The sites that xt hides."""
        return ~self.known


def noise(
    x0: Int[Tensor, "*batch sites"],
    steps: int,
    schedule: Schedule,
    mask_token_id: int,
    generator: torch.Generator | None = None,
) -> NoisedBatch:
    """Draw what one loss evaluation needs: a step, a noised sequence and a revealed set per sequence.

    The steps k = 1..T are spread evenly over the batch with one random offset; each alone is uniform.
    A late step (small k) may mask or reveal nothing; its loss is then 0, as the bound demands.

    Raises:
        ConfigError: ``steps`` < 1.
        ShapeError: ``x0`` has no sites dimension or isn't integer.
        TokenError: ``x0`` holds the mask token already.
    """
    check_steps(steps)
    if x0.ndim < 1 or x0.is_floating_point():
        raise ShapeError(
            f"expected x0 of integer tokens, (*batch, sites), found {x0.dtype} {tuple(x0.shape)}; pass token ids"
        )
    batch = x0.shape[:-1]
    times = stratified_times(batch.numel(), generator, x0.device).reshape(batch)
    step = (times * steps).long().clamp(max=steps - 1) + 1
    alpha = schedule.grid(steps).to(x0.device)[step]
    rate = schedule.reveal_rates(steps).to(x0.device)[step - 1]
    xt = mask_tokens(x0, alpha, mask_token_id, generator)
    known = xt != mask_token_id
    return NoisedBatch(x0, xt, known, reveal(~known, rate, generator), step, rate, steps)


def factorised_nelbo(
    noised: NoisedBatch, logits: Float[Tensor, "*batch sites vocab"]
) -> Float[Tensor, "*batch"]:
    """The bound of the factorised denoiser: T r_k sum_{i masked} -log softmax(l_i)[x0_i], in nats.

    A sum over sites needs no draw of S: each masked site is in S with probability r_k, so the
    expectation over S is exact. As T grows this is the MDLM bound (arXiv:2406.07524).

    Raises:
        ShapeError: ``logits`` don't fit ``noised``.
    """
    log_probs = _token_log_probs(noised, logits)
    cross_entropy = -torch.where(noised.masked, log_probs, 0).sum(-1)
    return noised.steps * noised.rate.to(log_probs.dtype) * cross_entropy


def coupled_nelbo(
    noised: NoisedBatch, logits: Float[Tensor, "*batch sites vocab"], dist: SubsetDistribution
) -> Float[Tensor, "*batch"]:
    """The bound of a coupled denoiser with these logits, in nats, as a paired difference.

        factorised_nelbo + T ( -log p(x_S | xt) + sum_{i in S} log softmax(l_i)[x0_i] )

    The bracket is what the coupling changes on the revealed set S; for independent sites it is 0 and
    the result is `factorised_nelbo`. The first term carries most of the noise and needs no draw of S.

    Raises:
        ShapeError: ``logits`` don't fit ``noised``.
    """
    log_probs = _token_log_probs(noised, logits)
    independent = torch.where(noised.revealed, log_probs, 0).sum(-1)
    joint = dist.log_prob(noised.x0, sites=noised.revealed)
    # A token that the network rules out is ruled out by both: the first term is infinite, their difference no number.
    change = torch.where(independent == -torch.inf, 0.0, independent - joint)
    return factorised_nelbo(noised, logits) + noised.steps * change


def _token_log_probs(noised: NoisedBatch, logits: Tensor) -> Float[Tensor, "*batch sites"]:
    """log softmax(l_i)[x0_i] for every site, in float32 or better."""
    if logits.shape[:-1] != noised.x0.shape:
        raise ShapeError(
            f"expected logits of shape {(*noised.x0.shape, 'vocab')}, found {tuple(logits.shape)}; "
            f"call the denoiser on noised.xt"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return logits.log_softmax(-1).gather(-1, noised.x0.long().unsqueeze(-1)).squeeze(-1)
