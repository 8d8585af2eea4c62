"""What a coupling adds to a step of decoding: network, factorised step, coupled step, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from rich.table import Table

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.denoisers.running import device_of
from codd_ppl.errors import ConfigError
from codd_ppl.evaluation.timing import wait_for
from codd_ppl.graphs import topologies
from codd_ppl.sampling import Coupling, Draw, Sampler

__all__ = ["DecodingTime", "decoding_table", "time_decoding"]


@dataclass(frozen=True)
class DecodingTime:
    """Seconds of one reverse step for a batch.

    Attributes:
        drawing: name of the way to draw.
        batch_size: sequences.
        network: one call of the network.
        factorised: a step of the factorised sampler.
        coupled: a step of the coupled one.
    """

    drawing: str
    batch_size: int
    network: float
    factorised: float
    coupled: float

    @property
    def coupling(self) -> float:
        """Seconds that the coupling adds to a step."""
        return self.coupled - self.factorised

    @property
    def overhead(self) -> float:
        """coupled / factorised - 1."""
        return self.coupled / self.factorised - 1.0


@torch.no_grad()
def time_decoding(
    denoiser: Denoiser,
    coupling: Coupling,
    drawings: dict[str, Draw],
    batch_sizes: Sequence[int] = (1, 8, 32),
    steps: int = 4,
    repeats: int = 9,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> list[DecodingTime]:
    """Whole texts are written from nothing, in ``steps`` steps that reveal the same number of sites each, by the
    factorised sampler and by the coupled one with every way to draw, in turn; medians over the repetitions.

    Raises:
        ConfigError: no way to draw, no batch size, or numbers below 1.
    """
    if not drawings or not batch_sizes or min(*batch_sizes, steps, repeats) < 1:
        raise ConfigError(
            f"expected ways to draw, batch sizes, steps and repeats of at least 1, found {list(drawings)}, "
            f"{list(batch_sizes)}, {steps} and {repeats}"
        )
    device = device_of(denoiser, default=torch.device("cpu"))
    sites, vocab = coupling.sites, coupling.vocab_size
    alone = CouplingLayer(topologies.independent(sites, vocab), vocab).to(device)
    samplers = {"": Sampler(denoiser, alone, "random_order", steps)}
    samplers |= {
        n: Sampler(denoiser, coupling, "random_order", steps, drawing=d) for n, d in drawings.items()
    }
    found = []
    for batch in batch_sizes:
        template = torch.full((batch, sites), denoiser.mask_token_id, device=device)
        jobs: dict[str | None, Callable[[torch.Generator], object]] = {None: _call(denoiser, template)}
        jobs |= {name: _generation(sampler, template) for name, sampler in samplers.items()}
        taken: dict[str | None, list[float]] = {name: [] for name in jobs}
        for repeat in range(repeats + 1):  # the first isn't counted
            for name, job in jobs.items():
                generator = torch.Generator(device).manual_seed(seed + repeat)
                wait_for(device)
                start = clock()
                job(generator)
                wait_for(device)
                taken[name] += [clock() - start] if repeat else []
        network, factorised = median(taken[None]), median(taken[""]) / steps
        found += [
            DecodingTime(name, batch, network, factorised, median(taken[name]) / steps) for name in drawings
        ]
    return found


def decoding_table(times: Sequence[DecodingTime]) -> Table:
    """A line for each way to draw and batch size, in milliseconds a step."""
    table = Table(title="a step of decoding, ms for the batch")
    for name in ("drawing", "batch", "network", "factorised step", "coupled step", "coupling", "overhead"):
        table.add_column(name, justify="left" if name == "drawing" else "right")
    for row in times:
        seconds = (row.network, row.factorised, row.coupled, row.coupling)
        cells = [f"{1000 * value:.2f}" for value in seconds]
        table.add_row(row.drawing, str(row.batch_size), *cells, f"{100 * row.overhead:.0f} %")
    return table


def _generation(sampler: Sampler, template: torch.Tensor) -> Callable[[torch.Generator], object]:
    return lambda generator: sampler.generate(template, generator)


def _call(denoiser: Denoiser, template: torch.Tensor) -> Callable[[torch.Generator], object]:
    return lambda _: denoiser(template)
