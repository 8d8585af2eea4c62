"""What one reverse step knows: the network's answer and the coupled law at xt, computed when first asked for."""

from collections.abc import Sequence

from codd_ppl.denoisers.protocol import Denoiser, DenoiserOutput
from codd_ppl.sampling.logits import LogitsTransform
from codd_ppl.sampling.protocol import Coupling, JointDistribution, WarmCoupling
from codd_ppl.typing import Float, Tensor

__all__ = ["Prediction"]


class Prediction:
    """The network and the coupled distribution at one xt, each computed at most once, when first asked for.

    Args:
        denoiser, coupling: as the sampler's.
        xt, masked: (batch, sites) tokens and which of them are masked.
        start: an earlier law to start the projection from.
        logits: transforms of the network's logits, in order.

    Attributes:
        made: the coupled law, None as long as nobody asked.
        calls: of the network, 0 or 1.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        coupling: Coupling,
        xt: Tensor,
        masked: Tensor,
        start: JointDistribution | None = None,
        logits: Sequence[LogitsTransform] = (),
    ) -> None:
        self._denoiser, self._coupling, self._xt, self._masked = denoiser, coupling, xt, masked
        self._start, self._transforms = start, logits
        self._output: DenoiserOutput | None = None
        self.made: JointDistribution | None = None
        self.calls = 0

    @property
    def output(self) -> DenoiserOutput:
        """What the network said, its logits transformed."""
        if self._output is None:
            output = self._denoiser(self._xt)
            self.calls += 1
            logits = output.logits
            for transform in self._transforms:
                logits = transform(logits)
            self._output = DenoiserOutput(logits=logits, hidden=output.hidden)
        return self._output

    @property
    def dist(self) -> JointDistribution:
        """The coupled law."""
        if self.made is None:
            output, known, coupling = self.output, ~self._masked, self._coupling
            if self._start is not None and isinstance(coupling, WarmCoupling):
                self.made = coupling(
                    output.logits, hidden=output.hidden, tokens=self._xt, known=known, start=self._start
                )
            else:
                self.made = coupling(output.logits, hidden=output.hidden, tokens=self._xt, known=known)
        return self.made

    def joint(self) -> JointDistribution:
        """The coupled law."""
        return self.dist

    def coupled(self) -> Float[Tensor, "batch sites vocab"]:
        """Its marginals."""
        return self.dist.marginals

    def network(self) -> Float[Tensor, "batch sites vocab"]:
        """The network's own, after the transforms."""
        return self.output.logits.softmax(-1)
