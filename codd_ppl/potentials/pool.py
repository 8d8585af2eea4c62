"""What the network and the prior say of a site, pooled: where the prior knows more, the target should too."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.inference import native
from codd_ppl.inference.projection import broadcasts
from codd_ppl.inference.transforms import transforming
from codd_ppl.typing import Bool, Float

__all__ = ["LogarithmicPool"]


class LogarithmicPool(nn.Module):
    """Target marginals of the projection, a logarithmic opinion pool (Genest and Zidek 1986):

        log q'_i = a(r) log q_i + b(r) log p_w(x_i | x_K) + c(r) log p_w(x_i) + const

    with q the network's marginals, p_w the prior's given the known tokens, and p_w(x_i) its marginals with nothing
    known, whose weight takes out what the two others count twice. The weights depend on the mask ratio r alone, linear
    between a few knots; at r = 0 they are (1, 0, 0), so that the pure network is left as the masks vanish. They start
    there for all r; :func:`codd_ppl.training.fit_pool` fits them to text, a convex problem.

    Args:
        knots: mask ratios in (0, 1], increasing, at which the weights are free.

    Raises:
        ConfigError: knots out of order or range.
    """

    knots: Tensor

    def __init__(self, knots: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 1.0)) -> None:
        super().__init__()
        ratios = [0.0, *map(float, knots)]
        if len(ratios) < 2 or ratios[-1] > 1 or any(a >= b for a, b in pairwise(ratios)):
            raise ConfigError(f"expected knots to increase within (0, 1], found {tuple(knots)}")
        self.register_buffer("knots", torch.tensor(ratios))
        self.weights = nn.Parameter(torch.tensor([[1.0, 0.0, 0.0]]).repeat(len(ratios) - 1, 1))

    def at(self, ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch 3"]:
        """Weights of network, prior and unconditional prior at some mask ratios."""
        shares = self.shares(ratio).to(self.weights)
        return nn.functional.pad(shares[..., :1], (0, 2)) + shares[..., 1:] @ self.weights

    def shares(self, ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch knots"]:
        """How much of each knot is in the weights at a mask ratio, that at 0 first: linear interpolation."""
        low, high = self.knots[:-1].to(ratio), self.knots[1:].to(ratio)
        passed = ((ratio[..., None] - low) / (high - low)).clamp(0, 1)  # of the way between neighbours
        return nn.functional.pad(passed, (1, 0), value=1.0) - nn.functional.pad(passed, (0, 1))

    def forward(
        self,
        network: Float[Tensor, "*batch sites vocab"],
        prior: Float[Tensor, "*batch sites vocab"],
        unconditional: Float[Tensor, "*#batch sites vocab"],
        masked: Bool[Tensor, "*batch sites"],
    ) -> Float[Tensor, "*batch sites vocab"]:
        """log q', normalised at the masked sites, 0 elsewhere; what network or prior rule out stays ruled out.

        Args:
            network, prior, unconditional: normalised log-marginals.
            masked: sites to pool; their share is the mask ratio.

        Raises:
            ShapeError: prior or masked of another batch, sites or vocabulary than the network's.
        """
        shape = network.shape
        fits = unconditional.shape[-2:] == shape[-2:] and broadcasts(unconditional.shape, shape)
        if prior.shape != shape or masked.shape != shape[:-1] or masked.dtype != torch.bool or not fits:
            found = ", ".join(f"{tuple(t.shape)}" for t in (network, prior, unconditional))
            raise ShapeError(
                "pool: expected network and prior of one shape (*batch, sites, vocab), unconditional of one that "
                f"broadcasts to it and masked as bool (*batch, sites), found {found} and {masked.dtype} "
                f"{tuple(masked.shape)}; expand() what all of a batch share"
            )
        logs = (network, prior, unconditional)
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (self.weights, *logs))
        if not (recorded or transforming()) and len({t.dtype for t in logs}) == 1 and native.possible(*logs):
            return self._compiled(*logs, masked)
        ratio = masked.to(torch.promote_types(network.dtype, torch.float32)).mean(-1)
        weights = self.at(ratio)[..., None, None, :].to(network.dtype)
        out = (network == -torch.inf) | (prior == -torch.inf) | ~masked[..., None]
        total = torch.zeros_like(network)
        for k, log in enumerate(logs):
            total = total + weights[..., k] * torch.where(out, 0.0, log)
        ruled_out = out & masked[..., None]
        # Where nothing is left the network has its way: the projection will say that it can't be met.
        empty = ruled_out.all(-1, keepdim=True)
        total = torch.where(empty, network, torch.where(ruled_out, -torch.inf, total))
        return torch.where(masked[..., None], total.log_softmax(-1), 0.0)

    def _compiled(self, network: Tensor, prior: Tensor, alone: Tensor, masked: Tensor) -> Tensor:
        """The same by the loop of ``native.c``."""
        sites, vocab = network.shape[-2:]
        each = 0 if alone.numel() == sites * vocab else sites * vocab
        given = (network, prior, alone.expand_as(network) if each else alone)
        network, prior, alone = (t.reshape(-1, sites, vocab).contiguous() for t in given)
        masked = masked.reshape(-1, sites).contiguous()
        knots, weights = self.knots.to(network.dtype), self.weights.detach().to(network.dtype).contiguous()
        result = torch.empty_like(network)

        def part(cut: native.Cut) -> tuple[Tensor | int, ...]:
            own = cut(network)
            return (
                len(own), sites, vocab, len(weights), knots, weights, cut(masked), own, cut(prior),
                cut(alone) if each else alone, each, cut(result), own.new_empty(vocab),
            )  # fmt: skip

        native.call_in_parts("pool", len(result), sites * vocab, part)
        return result.view(given[0].shape)

    def extra_repr(self) -> str:
        """Weights by mask ratio."""
        rows = zip(self.knots[1:].tolist(), self.weights.tolist(), strict=True)
        return "; ".join(f"r={r:g}: " + "/".join(f"{w:.2f}" for w in row) for r, row in rows)
