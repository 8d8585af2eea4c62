"""A denoiser of a part of a text: the network reads all of it, the part's sites come out."""

import torch

from codd_ppl.denoisers.protocol import Denoiser, DenoiserOutput
from codd_ppl.denoisers.wrapped import WrappedDenoiser
from codd_ppl.errors import ShapeError
from codd_ppl.typing import Int, Tensor

__all__ = ["InContext"]


class InContext(WrappedDenoiser):
    """Logits and hidden states of a window of a text, given the text around it.

        InContext(f, before, after)(xt) = f(before + xt + after), cut to the sites of xt

    so that whatever works on sequences of the window's length (a coupling, a sampler) works inside a longer text, as
    block diffusion does (Arriola et al. 2025, arXiv:2503.09573).

    Args:
        denoiser: reads texts of any length.
        before: (rows, any) int64, the text to the left; one row for each row of the windows.
        after: (rows, any) int64, the text to the right, masks included; None: nothing.

    Raises:
        ShapeError: contexts that aren't int64 (rows, any), with the same number of rows; on the call, windows with
            another number of rows.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        before: Int[Tensor, "rows left"],
        after: Int[Tensor, "rows right"] | None = None,
    ) -> None:
        super().__init__(denoiser)
        self.before = before
        self.after = before[:, :0] if after is None else after
        for name, part in (("before", self.before), ("after", self.after)):
            if part.dtype != torch.int64 or part.dim() != 2 or len(part) != len(before):
                raise ShapeError(
                    f"{name}: expected int64 ({len(before)}, any), a row of text for each window, found {part.dtype} "
                    f"{tuple(part.shape)}; pass token ids, rows of equal length"
                )

    def forward(self, xt: Int[Tensor, "rows sites"]) -> DenoiserOutput:
        """Logits and hidden states of the window's sites."""
        if len(xt) != len(self.before):
            raise ShapeError(
                f"expected {len(self.before)} windows, one for each row of the text before them, found {len(xt)}; "
                "build InContext with the context of these rows"
            )
        output = self.denoiser(torch.cat((self.before, xt, self.after), -1))
        sites = slice(self.before.shape[-1], self.before.shape[-1] + xt.shape[-1])
        return DenoiserOutput(output.logits[:, sites], output.hidden[:, sites])
