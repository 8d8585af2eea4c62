"""The three laws of masked diffusion as distributions over partly masked sequences.

Given x_k, one step chooses a set S of the masked sites, each with probability r_k, and writes tokens there:

    noise   q(x_k | x0)           each token stays with probability alpha_k
    model   p(x_{k-1} | x_k)      = Bernoulli(S; r_k) p(x_S | x_k)      tokens from the coupled denoiser
    guide   q(x_{k-1} | x_k, x0)  = Bernoulli(S; r_k) [x_S = x0_S]      tokens from the data

`codd_ppl.diffusion.process` puts them together.
"""

from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch.distributions import constraints
from torch.types import _size

from codd_ppl.diffusion.nelbo import SetDistribution
from codd_ppl.errors import ShapeError
from codd_ppl.typing import Bool, Float, Int, Tensor

__all__ = ["MaskedSequences", "NoisedSequence", "PosteriorReveal", "RevealStep"]


class MaskedSequences(TorchDistribution):
    """Base of the three distributions below: sequences of tokens, some of them the mask token."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, batch_shape: tuple[int, ...], sites: int, mask_token_id: int) -> None:
        self.mask_token_id = mask_token_id
        super().__init__(torch.Size(batch_shape), torch.Size((sites,)), validate_args=False)

    def _coins(self, sample_shape: _size, chance: Float[Tensor, "*#batch"]) -> Bool[Tensor, "..."]:
        """One coin per site, heads with probability ``chance``."""
        return torch.rand(self._extended_shape(sample_shape), device=chance.device) < chance.unsqueeze(-1)


def _chance(value: Float[Tensor, "*#batch"] | float, tokens: Tensor) -> Float[Tensor, "*#batch"]:
    """A probability as a floating-point tensor beside ``tokens``."""
    value = torch.as_tensor(value, device=tokens.device)
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def _coins_log_prob(heads: Tensor, flipped: Tensor, chance: Tensor) -> Float[Tensor, "*#batch"]:
    """Log-probability that of the coins at the sites ``flipped`` those at ``heads`` show heads."""
    up, thrown = (sites.sum(-1).to(chance.dtype) for sites in (heads & flipped, flipped))
    return torch.xlogy(up, chance) + torch.xlogy(thrown - up, 1 - chance)


class NoisedSequence(MaskedSequences):
    """The noise q(x_k | x0): each token of x0 stays with probability ``alpha``, else is masked."""

    def __init__(
        self,
        x0: Int[Tensor, "*#batch sites"],
        alpha: Float[Tensor, "*#batch"] | float,
        mask_token_id: int,
    ) -> None:
        self.x0, self.alpha = x0, _chance(alpha, x0)
        batch_shape = torch.broadcast_shapes(x0.shape[:-1], self.alpha.shape)
        super().__init__(batch_shape, x0.shape[-1], mask_token_id)

    def sample(self, sample_shape: _size = ()) -> Int[Tensor, "*shape sites"]:
        """Draw x_k."""
        return torch.where(self._coins(sample_shape, self.alpha), self.x0, self.mask_token_id)

    def log_prob(self, xk: Int[Tensor, "*#batch sites"]) -> Float[Tensor, "*#batch"]:
        """log q(x_k | x0); -inf if x_k holds a token that x0 doesn't."""
        stays = xk != self.mask_token_id
        possible = (~stays | (xk == self.x0)).all(-1)
        coins = _coins_log_prob(stays, torch.ones_like(stays), self.alpha)
        return torch.where(possible, coins, -torch.inf)


class PosteriorReveal(MaskedSequences):
    """One step of the guide, q(x_{k-1} | x_k, x0): each masked site shows its token with probability ``rate``."""

    def __init__(
        self,
        xt: Int[Tensor, "*#batch sites"],
        x0: Int[Tensor, "*#batch sites"],
        rate: Float[Tensor, "*#batch"] | float,
        mask_token_id: int,
    ) -> None:
        self.xt, self.x0, self.rate = xt, x0, _chance(rate, xt)
        batch_shape = torch.broadcast_shapes(xt.shape[:-1], x0.shape[:-1], self.rate.shape)
        super().__init__(batch_shape, xt.shape[-1], mask_token_id)

    def sample(self, sample_shape: _size = ()) -> Int[Tensor, "*shape sites"]:
        """Draw x_{k-1}."""
        revealed = self._coins(sample_shape, self.rate) & (self.xt == self.mask_token_id)
        return torch.where(revealed, self.x0, self.xt)

    def log_prob(self, xnext: Int[Tensor, "*#batch sites"]) -> Float[Tensor, "*#batch"]:
        """log q(x_{k-1} | x_k, x0); -inf if x_{k-1} contradicts x_k or x0."""
        masked, revealed = self.xt == self.mask_token_id, xnext != self.mask_token_id
        possible = torch.where(masked, ~revealed | (xnext == self.x0), xnext == self.xt).all(-1)
        return torch.where(possible, _coins_log_prob(revealed, masked, self.rate), -torch.inf)


class RevealStep(MaskedSequences):
    """One step of the model, p(x_{k-1} | x_k): reveal a random set S, with tokens from the coupled denoiser.

    Args:
        xt: x_k, (*batch, sites).
        rate: chance that a masked site is revealed, one number or (*batch).
        joint: the distribution of the masked sites given x_k, a `CoupledCategorical` or anything with
            ``sample(sample_shape)`` and ``log_prob(x, sites=S)``, the exact marginal of a set of sites; or a
            `SetDistribution`, which has a law for each set.
        mask_token_id: the id that stands for a masked site.

    Raises:
        ShapeError: not one joint distribution per sequence.
    """

    def __init__(
        self,
        xt: Int[Tensor, "*#batch sites"],
        rate: Float[Tensor, "*#batch"] | float,
        joint: Any,
        mask_token_id: int,
    ) -> None:
        self.xt, self.rate, self.joint = xt, _chance(rate, xt), joint
        batch_shape = torch.broadcast_shapes(xt.shape[:-1], self.rate.shape)
        if batch_shape != joint.batch_shape:
            raise ShapeError(
                f"expected joint.batch_shape {tuple(batch_shape)} as of xt and rate, found "
                f"{tuple(joint.batch_shape)}; make one joint distribution per sequence"
            )
        super().__init__(batch_shape, xt.shape[-1], mask_token_id)

    def sample(self, sample_shape: _size = ()) -> Int[Tensor, "*shape sites"]:
        """Draw x_{k-1}: a joint sample of all masked sites, of which S is kept (of S, if each set has its own law)."""
        if isinstance(self.joint, SetDistribution):
            revealed = self._coins(sample_shape, self.rate) & (self.xt == self.mask_token_id)
            joint: Any = self.joint
            tokens = joint.expand(revealed.shape[:-1]).restrict(revealed).sample()
            return torch.where(revealed, tokens, self.xt)
        with torch.no_grad():
            tokens = self.joint.sample(torch.Size(sample_shape))
        revealed = self._coins(sample_shape, self.rate) & (self.xt == self.mask_token_id)
        return torch.where(revealed, tokens, self.xt)

    def log_prob(self, xnext: Int[Tensor, "*#batch sites"]) -> Float[Tensor, "*#batch"]:
        """Bernoulli(S; r) + log p(x_S | x_k); -inf if x_{k-1} changes a token that x_k knows."""
        masked, shown = self.xt == self.mask_token_id, xnext != self.mask_token_id
        possible = (masked | (xnext == self.xt)).all(-1)
        revealed = masked & shown
        # Only the tokens of S are read; elsewhere stand values that every joint accepts.
        tokens = torch.where(revealed, xnext, torch.where(masked, 0, self.xt))
        log_prob = _coins_log_prob(shown, masked, self.rate) + self.joint.log_prob(tokens, sites=revealed)
        return torch.where(possible, log_prob, -torch.inf)
