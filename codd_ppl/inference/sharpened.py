"""Draws whose tokens are sharpened given the latents: z ~ p(z), x ~ p(x | z)^(1/tau), normalised for each z.

Tempering p(x) itself is #P-hard where latents are summed out, since a power of a sum is no product. Given z nothing is
left to sum: the power of a product of factors is the product of their powers, on the same graph.
"""

from __future__ import annotations

import torch

from codd_ppl.compiler import ContractionPlan
from codd_ppl.inference.evidence import condition
from codd_ppl.inference.sampling import sample
from codd_ppl.typing import Int, LogPotentials, Tensor

__all__ = ["sample_sharpened"]


def sample_sharpened(
    plan: ContractionPlan,
    log_potentials: LogPotentials,
    temperature: float,
    generator: torch.Generator | None = None,
) -> dict[str, Int[Tensor, "*batch"]]:
    """One such draw of all variables; with temperature 1 an exact joint draw.

    Args:
        plan, log_potentials: as in :func:`codd_ppl.inference.log_partition`.
        temperature: tau > 0.
        generator: torch's global one by default.

    Returns:
        Variable -> (*batch) int64.

    Raises:
        PotentialsError, InfeasibleError, IntractableError: as in :func:`codd_ppl.inference.sample`.
    """
    with torch.no_grad():
        latents = [v.name for v in plan.variables if v.latent]
        if latents:
            drawn = sample(plan, log_potentials, (), generator)
            log_potentials = condition(plan, log_potentials, {name: drawn[name] for name in latents})
        return sample(plan, {key: t / temperature for key, t in log_potentials.items()}, (), generator)
