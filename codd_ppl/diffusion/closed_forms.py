"""The factorization gap in closed form, for joint distributions small enough to write down as a table.

A joint is a tensor of probabilities with one axis per site: ``joint[x_0, x_1, ...]``. All results are
in nats and float64; divide by ``math.log(2)`` for bits.

The best denoiser that draws tokens independently predicts every exact conditional marginal, and its
bound is still too high by the *factorization gap*: the total correlation of what each step reveals,

    best factorised NELBO_T = H(x0) + E sum_k TC(X_S | known)

while a perfect joint denoiser has NELBO_T = H(x0) for every T.
"""

import math

import torch

from codd_ppl.diffusion.enumeration import LogProbFn, pattern_weights, reveal_patterns
from codd_ppl.diffusion.schedules import LinearSchedule, Schedule, check_steps
from codd_ppl.errors import ConfigError
from codd_ppl.typing import Bool, Float, Int, Tensor

__all__ = [
    "best_factorised_log_prob",
    "best_factorised_nelbo",
    "entropy",
    "even_parity",
    "factorization_gap",
    "markov_chain",
    "parity_gap",
    "perfect_log_prob",
    "product_of_marginals",
    "subset_entropies",
    "total_correlation",
    "two_tokens_gap",
]

LINEAR = LinearSchedule()


def even_parity(bits: int) -> Float[Tensor, "..."]:
    """The uniform joint over the strings of ``bits`` bits with an even number of ones."""
    ones = sum(torch.meshgrid(*[torch.arange(2)] * bits, indexing="ij"), torch.zeros((), dtype=torch.long))
    return (ones % 2 == 0).double() / 2 ** (bits - 1)


def markov_chain(
    initial: Float[Tensor, "vocab"], transition: Float[Tensor, "vocab vocab"], sites: int
) -> Float[Tensor, "..."]:
    """The joint of a Markov chain: initial[x_0] transition[x_0, x_1] transition[x_1, x_2] ..."""
    joint = initial.double()
    for _ in range(sites - 1):
        joint = joint.unsqueeze(-1) * transition.double()
    return joint


def entropy(joint: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """H(X) = -sum p log p of the whole table."""
    return -torch.special.xlogy(_checked(joint), _checked(joint)).sum()


def subset_entropies(joint: Float[Tensor, "..."]) -> Float[Tensor, "subsets"]:
    """H(X_A) for each of the 2^sites sets A of sites; bit i of the index says that site i is in A."""
    joint = _checked(joint)
    sites = joint.ndim
    result = []
    for index in range(2**sites):
        outside = [i for i in range(sites) if not index >> i & 1]
        marginal = joint.sum(outside) if outside else joint
        result.append(-torch.special.xlogy(marginal, marginal).sum())
    return torch.stack(result)


def total_correlation(joint: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """TC(X) = sum_i H(X_i) - H(X) >= 0; for two sites the mutual information."""
    entropies = subset_entropies(joint)
    return entropies[[1 << i for i in range(joint.ndim)]].sum() - entropies[-1]


def product_of_marginals(joint: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The law of independent tokens with the joint's marginals: prod_i P(x_i), of the joint's shape.

    Of all products q it has the least KL(joint || q), which is the total correlation.
    """
    joint, result = joint.double(), torch.ones((), dtype=torch.float64)
    for axis in range(joint.ndim):
        others = [i for i in range(joint.ndim) if i != axis]
        result = result.unsqueeze(-1) * (joint.sum(others) if others else joint)
    return result


def factorization_gap(
    joint: Float[Tensor, "..."], steps: int | float, schedule: Schedule = LINEAR
) -> Float[Tensor, ""]:
    """E sum_k TC(X_S | known): what the best factorised denoiser loses over T steps.

    Formula: sum over S inside M of w[|M|, |S|] (sum_{i in S} H(X_i | X_K) - H(X_S | X_K)), K the
    sites outside M, w from `pattern_weights`. It is 0 for ``steps=math.inf``.

    Raises:
        ConfigError: not a joint distribution, too many sites, or bad ``steps``.
    """
    entropies = subset_entropies(joint)
    masked, revealed = reveal_patterns(joint.ndim)
    weights = pattern_weights(joint.ndim, steps, schedule)[masked.sum(-1), revealed.sum(-1)]
    bit = 1 << torch.arange(joint.ndim)
    known = (~masked * bit).sum(-1)
    given = entropies[known]
    singles = torch.where(revealed, entropies[known.unsqueeze(-1) | bit] - given.unsqueeze(-1), 0).sum(-1)
    together = entropies[known | (revealed * bit).sum(-1)] - given
    return (weights * (singles - together)).sum()


def best_factorised_nelbo(
    joint: Float[Tensor, "..."], steps: int | float, schedule: Schedule = LINEAR
) -> Float[Tensor, ""]:
    """Expected NELBO_T of the best factorised denoiser: H(x0) + `factorization_gap`."""
    return entropy(joint) + factorization_gap(joint, steps, schedule)


def two_tokens_gap(
    mutual_information: Float[Tensor, ""] | float, steps: int, schedule: Schedule = LINEAR
) -> Float[Tensor, ""]:
    """Gap of two tokens: I(X1; X2) times the chance that one step reveals both; linear: I / T."""
    alphas = schedule.grid(steps, dtype=torch.float64)
    return torch.as_tensor(mutual_information, dtype=torch.float64) * ((alphas[:-1] - alphas[1:]) ** 2).sum()


def parity_gap(bits: int, steps: int, schedule: Schedule = LINEAR) -> Float[Tensor, ""]:
    """Gap of n bits of even parity: log 2 times the chance that the last step to reveal anything reveals several.

    Linear schedule: log 2 (1 - n sum_k (1/T) ((k-1)/T)^(n-1)).

    Raises:
        ConfigError: fewer than 1 bit or step.
    """
    check_steps(steps)
    if bits < 1:
        raise ConfigError(f"expected at least 1 bit, found {bits}; pass the length of the strings")
    alphas = schedule.grid(steps, dtype=torch.float64)
    last_alone = bits * ((alphas[:-1] - alphas[1:]) * alphas[1:] ** (bits - 1)).sum()
    return math.log(2) * (1 - last_alone)


def perfect_log_prob(joint: Float[Tensor, "..."], mask_token_id: int) -> LogProbFn:
    """The perfect joint denoiser log p(x_S | x_K) of this joint, for `nelbo_exact`."""
    joint = _checked(joint)

    def subset_log_prob(x0: Tensor, xt: Tensor, revealed: Tensor) -> Tensor:
        known = xt != mask_token_id
        return _log_marginal(joint, x0, known | revealed) - _log_marginal(joint, x0, known)

    return subset_log_prob


def best_factorised_log_prob(joint: Float[Tensor, "..."], mask_token_id: int) -> LogProbFn:
    """The best factorised denoiser sum_{i in S} log p(x_i | x_K) of this joint, for `nelbo_exact`."""
    perfect = perfect_log_prob(joint, mask_token_id)

    def subset_log_prob(x0: Tensor, xt: Tensor, revealed: Tensor) -> Tensor:
        singles = torch.eye(x0.shape[-1], dtype=torch.bool, device=x0.device)
        return torch.stack([perfect(x0, xt, revealed & site) for site in singles]).sum(0)

    return subset_log_prob


def _log_marginal(
    joint: Tensor, x: Int[Tensor, "n sites"], sites: Bool[Tensor, "n sites"]
) -> Float[Tensor, "n"]:
    """log P(X_A = x_A) for one set A per row."""
    states = torch.cartesian_prod(*[torch.arange(size) for size in joint.shape]).reshape(-1, joint.ndim)
    agrees = ((x.unsqueeze(1) == states) | ~sites.unsqueeze(1)).all(-1)
    return (agrees.to(joint.dtype) @ joint.flatten()).log()


def _checked(joint: Tensor) -> Float[Tensor, "..."]:
    """``joint`` as float64, if it is a probability table."""
    total = float(joint.sum())
    if joint.ndim < 1 or bool((joint < 0).any()) or not math.isclose(total, 1.0, abs_tol=1e-5):
        raise ConfigError(
            f"expected joint to be a table of probabilities with one axis per site, found shape "
            f"{tuple(joint.shape)}, least entry {float(joint.min()):.6g}, sum {total:.6g}; "
            f"divide it by its sum"
        )
    return joint.double()
