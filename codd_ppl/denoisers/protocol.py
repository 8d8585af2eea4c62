"""What the rest of the library asks of a denoiser: three sizes and one call.

Any object that has them will do: a subclass of ``torch.nn.Module``, a wrapper around a pretrained model,
or a lookup table in a test. Nothing needs to be inherited.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from codd_ppl.typing import Float, Int, Tensor

__all__ = ["Denoiser", "DenoiserOutput"]


@dataclass(frozen=True)
class DenoiserOutput:
    """What a denoiser says about every site.

    ``logits`` are the unary potentials l_i: softmax(l_i) is the predicted distribution of token x0_i
    given xt. At known sites they have no meaning and nothing reads them. ``hidden`` are the states h_i
    that contextual couplings read.
    """

    logits: Float[Tensor, "*batch sites vocab"]
    hidden: Float[Tensor, "*batch sites hidden"]


@runtime_checkable
class Denoiser(Protocol):
    """A network for p(x0_i | xt), the same for every time t (absorbing diffusion needs no time input).

    ``vocab_size`` counts the real tokens, ``0 .. vocab_size - 1``, which the logits cover;
    ``mask_token_id`` marks a masked site in xt and is none of the tokens that may be predicted there
    (for our own networks it is ``vocab_size``); ``hidden_size`` is the width of the hidden states.
    """

    @property
    def vocab_size(self) -> int:
        """Number of tokens the logits cover."""

    @property
    def mask_token_id(self) -> int:
        """The id that marks a masked site."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""

    def __call__(self, xt: Int[Tensor, "*batch sites"]) -> DenoiserOutput:
        """Logits and hidden states of every site of ``xt``."""
