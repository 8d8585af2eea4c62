"""What a coupling must beat: its marginals drawn independently, its prior without the network, and sharper logits."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from codd_ppl.compiler import ContractionPlan, compile
from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers.protocol import Denoiser, DenoiserOutput
from codd_ppl.denoisers.wrapped import WrappedDenoiser
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.errors import ConfigError
from codd_ppl.graphs import topologies
from codd_ppl.potentials import Potentials
from codd_ppl.typing import Bool, Float, Int

__all__ = ["MarginalsAlone", "PriorAlone", "Sharpened"]


class _Control(nn.Module):
    """Sizes of a coupling's control, and the coupling itself."""

    def __init__(self, coupling: CouplingLayer) -> None:
        super().__init__()
        self.coupling = coupling
        self.sites, self.vocab_size = coupling.sites, coupling.vocab_size


class MarginalsAlone(_Control):
    """Independent draws from a coupling's marginals: what it does to single tokens, without the dependence.

    Without a pool and with many sweeps that is the factorised model; with a pool it says which part of the gain is
    better marginals.
    """

    def __init__(self, coupling: CouplingLayer) -> None:
        super().__init__(coupling)
        self.plan: ContractionPlan = compile(topologies.independent(coupling.sites, coupling.vocab_size))

    def forward(
        self,
        logits: Float[Tensor, "*batch sites vocab"],
        hidden: Float[Tensor, "*batch sites hidden"] | None = None,
        tokens: Int[Tensor, "*batch sites"] | None = None,
        known: Bool[Tensor, "*batch sites"] | None = None,
    ) -> CoupledCategorical:
        """p(x_M | xt) = prod_i m_i(x_i), m the coupling's single-site marginals; arguments as a coupling's."""
        law = self.coupling(logits, hidden=hidden, tokens=tokens, known=known)
        return CoupledCategorical(self.plan, {}, law.marginals.log(), law.tokens, law.known)


class PriorAlone(_Control):
    """The prior given the known tokens, p_w(x_M | x_K); the network's logits are not read.

    NELBO_T is then the prior's own -log p(x0) for every T: a latent prior is a one-step model of its own. A coupled
    model must beat both its parts.
    """

    def forward(
        self,
        logits: Float[Tensor, "*batch sites vocab"],
        hidden: Float[Tensor, "*batch sites hidden"] | None = None,
        tokens: Int[Tensor, "*batch sites"] | None = None,
        known: Bool[Tensor, "*batch sites"] | None = None,
    ) -> CoupledCategorical:
        """The law; arguments as a coupling's."""
        start = cast(Potentials, self.coupling.potentials).evidence()
        flat = logits.new_zeros(self.vocab_size) if start is None else start.to(logits)
        free = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        tables = self.coupling.log_potentials(hidden, free if known is None else known)
        return CoupledCategorical(self.coupling.plan, tables, flat.expand_as(logits), tokens, known)


class Sharpened(WrappedDenoiser):
    """A denoiser whose logits are divided by a temperature: softmax(l / temperature).

    Args:
        denoiser: whose logits they are.
        temperature: below 1 is sharper.

    Raises:
        ConfigError: a temperature that isn't positive.
    """

    def __init__(self, denoiser: Denoiser, temperature: float) -> None:
        super().__init__(denoiser)
        if not temperature > 0:
            raise ConfigError(f"expected a temperature above 0, found {temperature}; 1 changes nothing")
        self.temperature = float(temperature)

    def forward(self, xt: Int[Tensor, "*batch sites"]) -> DenoiserOutput:
        """Sharper logits, the same hidden states."""
        output = self.denoiser(xt)
        return DenoiserOutput(output.logits / self.temperature, output.hidden)
