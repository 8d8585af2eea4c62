"""Fitting what the projection aims at: how far to trust network and prior at each mask ratio."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import cast

import torch
from torch import Tensor, nn

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers.context import InContext
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.denoisers.running import device_of, evaluation_mode
from codd_ppl.errors import ConfigError, LogitsError
from codd_ppl.potentials import LogarithmicPool
from codd_ppl.potentials.statistics import check_blocks
from codd_ppl.typing import Float, Int

__all__ = ["PoolFit", "fit_pool"]

LOWEST = 1e-30
"""Probabilities below are taken as this in the fit."""


@dataclass(frozen=True)
class PoolFit:
    """Bits per masked token at each knot, means over the masked sites weighted by the knot's share in them.

    Attributes:
        knots: mask ratios.
        network, prior, pooled: cross-entropies of the text's tokens.
        sites: masked sites looked at.
    """

    knots: list[float]
    network: list[float]
    prior: list[float]
    pooled: list[float]
    sites: int


def fit_pool(
    denoiser: Denoiser | nn.Module,
    coupling: CouplingLayer,
    blocks: Int[Tensor, "blocks sites"],
    *,
    sites: int = 8192,
    batch_size: int = 32,
    penalty: float = 1e-4,
    seed: int = 0,
    contexts: Int[Tensor, "blocks left"] | None = None,
) -> PoolFit:
    """Fit the weights of ``coupling.pool`` to held-out text: minimise the cross-entropy of single masked tokens

        min E_r E_{xt | r} mean_i -log q'_i(x0_i)

    which is convex in the weights (a multinomial logistic regression); r is uniform on (0, 1). Each expert alone is in
    the family at every knot, so that on this text, between the knots' shares, the pool is not worse than either.

    Args:
        denoiser, coupling: as in :class:`codd_ppl.CoDDModule`; ``coupling.pool`` must not be None. It is changed.
        blocks: (n, sites) int64 text that neither was trained on.
        sites: masked sites to look at, about; more for smaller vocabularies costs little.
        batch_size: blocks at a time.
        penalty: of the squared distance from the pure network.
        seed: of the choice of blocks and masks.
        contexts: (n, any) int64, what the network reads to the left of each block; None: nothing.

    Raises:
        ConfigError: the coupling has no pool.
        LogitsError: NaN among the network's logits.
        ShapeError, TokenError: blocks that don't fit the coupling, or contexts that don't fit the blocks.
    """
    if getattr(coupling, "pool", None) is None:
        raise ConfigError(
            "the coupling has no pool to fit; build it with CouplingLayer(.., pool=LogarithmicPool())"
        )
    check_blocks(blocks, coupling.sites, coupling.vocab_size)
    pool = cast(LogarithmicPool, coupling.pool)
    with evaluation_mode(denoiser, coupling), torch.no_grad():
        parts = list(_features(denoiser, coupling, blocks, sites, batch_size, seed, contexts))
    features = torch.cat([part[0] for part in parts])  # (rows, 3, vocab)
    shares, target = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
    start = pool.weights.new_tensor([1.0, 0.0, 0.0])
    weights = torch.zeros_like(pool.weights).add(start).requires_grad_()

    def losses(weights: Tensor) -> Tensor:
        each = shares @ torch.cat((start[None], weights))  # (rows, 3)
        scores = torch.einsum("rk,rkv->rv", each, features)
        return nn.functional.cross_entropy(scores, target, reduction="none")

    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = losses(weights).mean() + penalty * (weights - start).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        pool.weights.copy_(weights)
        pooled = losses(weights)
        alone = [nn.functional.cross_entropy(features[:, k], target, reduction="none") for k in (0, 1)]

        def by_knot(nats: Tensor) -> list[float]:
            own = shares[:, 1:].double()
            return ((own.T @ nats.double()) / (own.sum(0).clamp(min=LOWEST) * log(2))).tolist()

        return PoolFit(
            pool.knots[1:].tolist(), by_knot(alone[0]), by_knot(alone[1]), by_knot(pooled), len(target)
        )


def _features(
    denoiser: Denoiser | nn.Module,
    coupling: CouplingLayer,
    blocks: Tensor,
    sites: int,
    batch_size: int,
    seed: int,
    contexts: Tensor | None,
) -> Iterator[tuple[Float[Tensor, "rows 3 vocab"], Float[Tensor, "rows knots"], Int[Tensor, "rows"]]]:
    """Log-marginals of network and prior at masked sites, the knots' shares, and the tokens of the text."""
    assert coupling.pool is not None
    network, generator = cast(Denoiser, denoiser), torch.Generator().manual_seed(seed)
    device = device_of(coupling.pool, torch.device("cpu"))
    count = max(1, -(-2 * sites // blocks.shape[1]))  # half of the sites are masked
    order = torch.randperm(len(blocks), generator=generator)
    order = order.repeat(-(-count // len(order)))[:count]
    ratios = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ratios = ratios[torch.randperm(count, generator=generator)]
    for start in range(0, count, batch_size):
        some = order[start : start + batch_size]
        x0 = blocks[some]
        coins = torch.rand(x0.shape, generator=generator, dtype=torch.float64)
        masked = coins < ratios[start : start + batch_size, None]
        masked[torch.arange(len(x0)), coins.argmin(-1)] = True
        x0, masked = x0.to(device), masked.to(device)
        known = ~masked
        reader = network if contexts is None else InContext(network, contexts[some].to(device))
        output = reader(torch.where(known, x0, network.mask_token_id))
        log_q = output.logits.float().log_softmax(-1)
        if bool(log_q.isnan().any()):
            raise LogitsError(
                "expected logits without NaN or +inf from the network, found some; nothing was fitted: run it in "
                "another dtype, such as bfloat16 or float32"
            )
        potentials = coupling.log_potentials(output.hidden, known)
        prior, alone = coupling.prior_marginals(potentials, torch.where(known, x0, 0), known, log_q.dtype)
        logs = torch.stack((log_q[masked], prior[masked], alone.expand_as(prior)[masked]), dim=1)
        shares = coupling.pool.shares(masked.float().mean(-1))[:, None].expand(*masked.shape, -1)[masked]
        yield logs.clamp(min=log(LOWEST)), shares, x0[masked]
