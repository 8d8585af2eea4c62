"""Classifier-free guidance: the network with and without the prompt, extrapolated."""

import torch

from codd_ppl.denoisers.protocol import Denoiser, DenoiserOutput
from codd_ppl.denoisers.wrapped import WrappedDenoiser
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.typing import Bool, Int, Tensor

__all__ = ["Guided", "check_guidance"]


class Guided(WrappedDenoiser):
    """Logits that lean towards the prompt (Ho and Salimans 2022, arXiv:2207.12598; LLaDA, arXiv:2502.09992):

        logits = uncond + (1 + scale) (cond - uncond)

    where ``uncond`` is the same network on the same text with the prompt masked. Both run as one batch of twice as many
    rows, one network call. A token that either run rules out (-inf) keeps the logit of the run with the prompt. Hidden
    states are those of the run with the prompt.

    Args:
        denoiser: the network.
        prompt: (rows, sites) bool, the tokens to mask in the unconditional run.
        scale: strength; 0 gives the network's own law, LLaDA's ``cfg_scale``.

    Raises:
        ConfigError: a scale below 0 or not finite.
        ShapeError: a prompt that isn't bool; on the call, texts of another shape.
    """

    def __init__(self, denoiser: Denoiser, prompt: Bool[Tensor, "rows sites"], scale: float) -> None:
        super().__init__(denoiser)
        check_guidance("scale", scale)
        if prompt.dtype != torch.bool:
            raise ShapeError(f"prompt: expected bool, found {prompt.dtype}; pass template != mask_token_id")
        self.prompt, self.scale = prompt, scale

    def forward(self, xt: Int[Tensor, "rows sites"]) -> DenoiserOutput:
        """Guided logits of every site, hidden states of the run with the prompt."""
        if xt.shape != self.prompt.shape:
            raise ShapeError(
                f"expected xt of the prompt's shape {tuple(self.prompt.shape)}, found {tuple(xt.shape)}; build Guided "
                "with the prompt of these rows"
            )
        without = torch.where(self.prompt, self.mask_token_id, xt)
        output = self.denoiser(torch.cat((xt, without)))
        cond, uncond = output.logits.chunk(2)
        finite = cond.isfinite() & uncond.isfinite()
        difference = torch.where(finite, cond, 0.0) - torch.where(finite, uncond, 0.0)
        return DenoiserOutput(cond + self.scale * difference, output.hidden.chunk(2)[0])


def check_guidance(name: str, scale: float) -> None:
    """Whether a strength of guidance can be meant.

    Raises:
        ConfigError: below 0 or not finite.
    """
    if not 0.0 <= scale < float("inf"):
        raise ConfigError(f"{name}: expected a finite number of at least 0, found {scale}; 0 is none")
