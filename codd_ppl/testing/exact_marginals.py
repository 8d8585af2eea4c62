"""The perfect network of a joint that is small enough to write down."""

from __future__ import annotations

import torch
from torch import nn

from codd_ppl.denoisers import DenoiserOutput
from codd_ppl.diffusion.closed_forms import total_correlation
from codd_ppl.errors import ConfigError
from codd_ppl.testing.oracles import enumerate_sequences
from codd_ppl.typing import Float, Int, Tensor

__all__ = ["ExactMarginals"]


class ExactMarginals(nn.Module):
    """A denoiser that knows a joint: softmax(l_i) = p(x_i | known tokens) at every site, by enumeration.

    No network predicts single tokens better, so that what it loses with independent draws is the factorization gap.
    Its logits are log-probabilities in the joint's dtype: -inf where a token is impossible, and everywhere at a
    masked site if the known tokens are.

    Args:
        joint: probabilities with one axis per site, equally many values on each; the mask token is their number.

    Raises:
        ConfigError: not a table of probabilities, or sites of different cardinalities.
    """

    joint: Float[Tensor, "sequences"]
    states: Int[Tensor, "sequences sites"]
    one_hot: Float[Tensor, "sequences sites vocab"]

    def __init__(self, joint: Float[Tensor, "..."]) -> None:
        super().__init__()
        if len(set(joint.shape)) != 1:
            raise ConfigError(
                f"expected a joint with equally many values on each axis, found shape {tuple(joint.shape)}"
            )
        total_correlation(joint)  # its check: a table of probabilities
        self.vocab_size, self.sites, self.mask_token_id = joint.shape[0], joint.ndim, joint.shape[0]
        self.hidden_size = 0
        self.register_buffer("states", enumerate_sequences(self.vocab_size, self.sites))
        self.register_buffer("joint", joint.flatten())
        self.register_buffer("one_hot", nn.functional.one_hot(self.states, self.vocab_size).to(joint.dtype))

    def forward(self, xt: Int[Tensor, "*batch sites"]) -> DenoiserOutput:
        """Log-marginals of every site of ``xt``; hidden states of width 0."""
        known = xt != self.mask_token_id
        agrees = ((xt.unsqueeze(-2) == self.states) | ~known.unsqueeze(-2)).all(-1)
        possible = agrees * self.joint
        weights = torch.einsum("...s,siv->...iv", possible, self.one_hot)
        logits = (
            weights / possible.sum(-1)[..., None, None].clamp(min=torch.finfo(weights.dtype).tiny)
        ).log()
        return DenoiserOutput(logits, weights.new_zeros(*xt.shape, 0))
