"""What denoisers that hold another one have in common."""

from torch import nn

from codd_ppl.denoisers.protocol import Denoiser

__all__ = ["WrappedDenoiser"]


class WrappedDenoiser(nn.Module):
    """Vocabulary, mask and width are those of the denoiser inside."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    @property
    def vocab_size(self) -> int:
        """Of the denoiser inside."""
        return self.denoiser.vocab_size

    @property
    def mask_token_id(self) -> int:
        """Of the denoiser inside."""
        return self.denoiser.mask_token_id

    @property
    def hidden_size(self) -> int:
        """Of the denoiser inside."""
        return self.denoiser.hidden_size
