"""Wall clock of sampling, for several models side by side."""

import math
import time
from collections.abc import Mapping, Sequence
from statistics import median

import torch
from rich.console import Console
from rich.progress import Progress

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.denoisers.running import device_of
from codd_ppl.diffusion.schedules import Schedule
from codd_ppl.errors import ConfigError
from codd_ppl.evaluation.likelihood import Model
from codd_ppl.graphs import topologies
from codd_ppl.sampling import Sampler, UnmaskingPolicy

__all__ = ["time_network", "time_sampling", "wait_for"]


def time_sampling(
    models: Mapping[str, Model],
    steps: Sequence[int],
    sites: int,
    batch_size: int = 8,
    repeats: int = 3,
    unmasking: str | UnmaskingPolicy = "random",
    schedule: Schedule | None = None,
    budget: float = math.inf,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, dict[int, float]]:
    """Seconds per sample of every model at every number of steps: medians of interleaved repetitions.

    Each repetition generates ``batch_size`` sequences from nothing, with every model at every T in turn, so that
    whatever else the machine does falls on all of them alike; before, every model runs once at its smallest T,
    which is not counted. The result is the time divided by ``batch_size``, for ``NelboTable.with_seconds``.

    Args:
        models: name -> (denoiser, coupling), as for `nelbo_table`; coupling None: independent tokens.
        steps: numbers of reverse steps.
        sites: length of the sequences.
        batch_size: sequences per call; a larger one costs less per sample.
        repeats: repetitions, of which the median is taken.
        unmasking: as for `Sampler`.
        budget: seconds after which no further repetition is begun; there is always one.
        schedule: noise schedule; linear if None.
        seed: of the draws.
        progress: show a progress bar on standard error.

    Raises:
        ConfigError: no model, no steps, or ``batch_size`` or ``repeats`` below 1.
        ShapeError: a coupling for another number of sites.
    """
    if not models or not steps or batch_size < 1 or repeats < 1:
        raise ConfigError(
            f"expected models, steps, batch_size >= 1 and repeats >= 1, found {len(models)} models, {len(steps)} "
            f"numbers of steps, batch_size={batch_size}, repeats={repeats}; give at least one of each"
        )
    samplers: dict[tuple[str, int], Sampler] = {}
    grid = sorted(set(steps))
    for name, (denoiser, coupling) in models.items():
        if coupling is None:
            vocab = denoiser.vocab_size
            device = device_of(denoiser, default=torch.device("cpu"))
            coupling = CouplingLayer(topologies.independent(sites, vocab), vocab).to(device)
        for T in grid:
            samplers[name, T] = Sampler(denoiser, coupling, unmasking, T, schedule)
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in samplers}
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        task = bar.add_task("seconds per sample", total=repeats * len(samplers))
        for name in models:
            _generate(samplers[name, grid[0]], sites, batch_size, seed)
        begin = time.perf_counter()
        for repeat in range(repeats):
            if repeat > 0 and time.perf_counter() - begin > budget:
                break
            for key, sampler in samplers.items():
                taken[key].append(_generate(sampler, sites, batch_size, seed + repeat) / batch_size)
                bar.advance(task)
    result: dict[str, dict[int, float]] = {name: {} for name in models}
    for (name, T), values in taken.items():
        result[name][T] = median(values)
    return result


@torch.no_grad()
def time_network(denoiser: Denoiser, sites: int, batch_size: int = 8, repeats: int = 15) -> float:
    """Seconds of one call of the network for each of ``batch_size`` sequences: the median of ``repeats`` calls.

    Raises:
        ConfigError: ``batch_size`` or ``repeats`` below 1.
    """
    if batch_size < 1 or repeats < 1:
        raise ConfigError(
            f"expected batch_size and repeats >= 1, found {batch_size} and {repeats}; give at least 1"
        )
    device = device_of(denoiser, default=torch.device("cpu"))
    xt = torch.full((batch_size, sites), denoiser.mask_token_id, device=device)
    taken = []
    for _ in range(repeats + 1):  # the first isn't counted
        wait_for(device)
        start = time.perf_counter()
        denoiser(xt)
        wait_for(device)
        taken.append((time.perf_counter() - start) / batch_size)
    return median(taken[1:])


def _generate(sampler: Sampler, sites: int, batch_size: int, seed: int) -> float:
    """Seconds for one batch from an empty template."""
    device = device_of(sampler.denoiser, default=torch.device("cpu"))
    template = torch.full((batch_size, sites), sampler.denoiser.mask_token_id, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    wait_for(device)
    start = time.perf_counter()
    sampler.generate(template, generator)
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Let queued work of an accelerator finish, so that it is counted where it belongs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
