"""The T-step bound without noise: every masked set M and every revealed set S inside it, summed.

There are 3^sites pairs (M, S), so this is for sequences of about ten sites: the oracle of the tests
and of the notebooks. The weight of a pair depends on the two sizes only, which makes every number
of steps, and the limit of infinitely many, one small table.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from codd_ppl.diffusion.schedules import Schedule
from codd_ppl.errors import ConfigError
from codd_ppl.typing import Bool, Float, Int, Tensor

__all__ = ["LogProbFn", "log_prob_fn", "nelbo_exact", "pattern_weights", "reveal_patterns"]

MAX_SITES = 12

LogProbFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x0, xt, revealed), each (n, sites) -> log p(x0 at the revealed sites | xt), (n) nats."""


def pattern_weights(
    sites: int, steps: int | float, schedule: Schedule
) -> Float[Tensor, "sites_plus_1 sites_plus_1"]:
    """Weight of a pair S inside M in the bound, by their sizes: entry [|M|, |S|], float64.

        w[m, s] = sum_k (1 - alpha_k)^m alpha_k^(L-m) r_k^s (1 - r_k)^(m-s)

    With ``steps=math.inf`` only single tokens are revealed, and for every schedule
    w[m, 1] = integral of t^(m-1) (1-t)^(L-m) dt = (m-1)! (L-m)! / L!: the MDLM bound, which is
    also the average over all orders of one-token-at-a-time prediction.

    Raises:
        ConfigError: ``steps`` is neither a whole number >= 1 nor infinite.
    """
    weights = torch.zeros(sites + 1, sites + 1, dtype=torch.float64)
    if steps == math.inf:
        for m in range(1, sites + 1):
            weights[m, 1] = math.exp(math.lgamma(m) + math.lgamma(sites - m + 1) - math.lgamma(sites + 1))
        return weights
    alpha = schedule.grid(steps, dtype=torch.float64)[1:]  # type: ignore[arg-type]  # checked there
    rate = schedule.reveal_rates(steps, dtype=torch.float64)  # type: ignore[arg-type]
    for m in range(sites + 1):
        chance = (1 - alpha) ** m * alpha ** (sites - m)
        for s in range(m + 1):
            weights[m, s] = (chance * rate**s * (1 - rate) ** (m - s)).sum()
    return weights


def reveal_patterns(sites: int) -> tuple[Bool[Tensor, "pairs sites"], Bool[Tensor, "pairs sites"]]:
    """All pairs (M, S): masked sets and non-empty revealed sets inside them, 3^sites - 2^sites of each.

    Raises:
        ConfigError: more than 12 sites, too many to enumerate.
    """
    if not 1 <= sites <= MAX_SITES:
        raise ConfigError(
            f"expected 1 to {MAX_SITES} sites to enumerate, found {sites}; "
            f"use noise() and coupled_nelbo() to estimate longer ones"
        )
    state = torch.cartesian_prod(*[torch.arange(3)] * sites).reshape(-1, sites)  # 0 known, 1 masked, 2 in S
    state = state[(state == 2).any(-1)]
    return state > 0, state == 2


def nelbo_exact(
    x0: Int[Tensor, "*batch sites"],
    steps: int | float,
    schedule: Schedule,
    log_prob_fn: LogProbFn,
    mask_token_id: int,
    rows_per_call: int = 4096,
) -> Float[Tensor, "*batch"]:
    """NELBO_T in closed form, nats per sequence; ``steps=math.inf`` gives the continuous-time bound.

    Formula: sum over S inside M of w[|M|, |S|] * -log p(x_S | x outside M), see `pattern_weights`.
    ``log_prob_fn`` is called on at most about ``rows_per_call`` rows at once; gradients flow.

    Raises:
        ConfigError: too many sites, or bad ``steps``.
    """
    sites = x0.shape[-1]
    masked, revealed = reveal_patterns(sites)
    weights = pattern_weights(sites, steps, schedule)[masked.sum(-1), revealed.sum(-1)]
    needed = weights > 0
    masked, revealed, weights = (table[needed].to(x0.device) for table in (masked, revealed, weights))
    sequences = x0.reshape(-1, sites)
    n = len(sequences)
    size = max(1, rows_per_call // max(n, 1))
    total = torch.zeros(n, dtype=torch.float64, device=x0.device)
    for m, s, w in zip(masked.split(size), revealed.split(size), weights.split(size), strict=True):
        clean = sequences.expand(len(m), n, sites)
        xt = torch.where(m.unsqueeze(1), mask_token_id, clean)
        rows = (clean, xt, s.unsqueeze(1).expand(len(m), n, sites))
        log_probs = log_prob_fn(*(row.reshape(-1, sites) for row in rows)).reshape(len(m), n)
        total = total - w @ log_probs.double()
    return total.reshape(x0.shape[:-1])


def log_prob_fn(
    denoiser: Callable[[Tensor], Any], coupling: Callable[..., Any] | None, mask_token_id: int
) -> LogProbFn:
    """The `LogProbFn` of a denoiser with a coupling (None: independent tokens), for `nelbo_exact`."""

    def subset_log_prob(x0: Tensor, xt: Tensor, revealed: Tensor) -> Tensor:
        output = denoiser(xt)
        if coupling is None:
            singles = output.logits.log_softmax(-1).gather(-1, x0.unsqueeze(-1)).squeeze(-1)
            return torch.where(revealed, singles, 0).sum(-1)
        dist = coupling(output.logits, hidden=output.hidden, tokens=xt, known=xt != mask_token_id)
        return dist.log_prob(x0, sites=revealed)

    return subset_log_prob
