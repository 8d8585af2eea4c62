"""Measuring :class:`codd_ppl.evaluation.overhead.Overhead`: everything in turn, in one process.

On CUDA the clock is read when the queue is empty, before a step and after it: a step takes as long as a caller waits
for its tokens, the host's work included. The logits of random weights are noise: which tokens are candidates, and what
they weigh, changes no time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers.protocol import Denoiser, DenoiserOutput
from codd_ppl.errors import ConfigError
from codd_ppl.evaluation.backbone_shape import BackboneShape
from codd_ppl.evaluation.footprint import Footprint, footprint
from codd_ppl.evaluation.overhead import NetworkTime, Overhead, Skipped
from codd_ppl.evaluation.overhead_variants import Variant
from codd_ppl.evaluation.shape_network import ShapeNetwork
from codd_ppl.evaluation.timing import wait_for
from codd_ppl.graphs import topologies
from codd_ppl.inference.kept import MEMORY
from codd_ppl.sampling import Sampler

__all__ = ["network_flops", "time_overhead"]

SLOW, PATIENCE = 2.0, 10.0
"""A coupling whose draw takes longer than so many calls of the network, and seconds, isn't measured any further."""

Job = Callable[[], object]


@torch.no_grad()
def time_overhead(
    network: ShapeNetwork,
    variants: Sequence[Variant],
    states: int,
    batch: int,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> list[Overhead | Skipped]:
    """Each coupling beside the network, for one batch size.

    Args:
        network: perhaps with fewer layers than its shape has.
        variants: couplings of the network's vocabulary, on its device.
        states: of their latents.
        batch: sequences.
        repeats: of which medians are taken; before, everything is run once.
        clock: seconds.
        seed: of the draws.

    Raises:
        ConfigError: no couplings, or numbers below 1.
    """
    if not variants or min(states, batch, repeats) < 1:
        raise ConfigError(
            f"expected couplings, states, batch and repeats of at least 1, found {len(variants)} couplings, {states}, "
            f"{batch} and {repeats}"
        )
    device, sites, vocab = network.head.device, variants[0].coupling.sites, network.vocab_size
    template = torch.full((batch, sites), network.mask_token_id, device=device)
    whole = network.shape.layers

    def write(denoiser: Denoiser, coupling: CouplingLayer, **how: Any) -> Job:
        sampler = Sampler(denoiser, coupling, "random_order", 1, **how)
        return lambda: sampler.generate(template, torch.Generator(device).manual_seed(seed))

    def calls(layers: int) -> Job:
        return lambda: network(template, layers)

    depths = {network.layers} if network.layers == whole else {0, 1, 2, network.layers}
    taken = _in_turn({n: calls(n) for n in depths if n <= network.layers}, repeats, clock, device)
    times = NetworkTime(batch, whole, {n: median(taken[n]) for n in sorted(taken)})
    given = _Given(network, network(template))
    alone = CouplingLayer(topologies.independent(sites, vocab), vocab).to(device)
    draws, steps = {"": write(given, alone)}, {"": write(network, alone)}
    draws[""]()
    plain, rows = footprint(draws[""], device), dict[str, Overhead | Skipped]()
    looks = dict[str, tuple[int, Footprint]]()
    for variant in variants:
        draw = write(given, variant.coupling, drawing=variant.draw)
        found = _look(draw, max(PATIENCE, SLOW * times.measured), clock, device)
        if isinstance(found, str):
            rows[variant.name] = Skipped(variant.name, times, found)
            continue
        looks[variant.name], draws[variant.name] = found, draw
        steps[variant.name] = write(network, variant.coupling, drawing=variant.draw)
    alone_taken = _in_turn(draws, repeats, clock, device)
    step_taken = _in_turn(steps, repeats, clock, device)
    work = network_flops(network.shape, sites, network.prompt)
    for variant in variants:
        name = variant.name
        if name not in looks:
            continue
        ratios = [c / s - 1 for c, s in zip(step_taken[name], step_taken[""], strict=True)]
        rows[name] = Overhead(
            variant=name,
            network=times,
            step=median(step_taken[""]),
            coupled_step=median(step_taken[name]),
            lowest=min(ratios),
            highest=max(ratios),
            draw=median(alone_taken[""]),
            coupled_draw=median(alone_taken[name]),
            weight_bytes=sum(p.nbytes for p in variant.coupling.parameters()),
            kept_bytes=looks[name][0],
            footprint=plain,
            coupled_footprint=looks[name][1],
            flops=batch * variant.flops(states),
            network_flops=batch * work,
        )
    return [rows[variant.name] for variant in variants]


@torch.no_grad()
def network_flops(shape: BackboneShape, sites: int, prompt: int) -> int:
    """Floating-point operations of a call of the whole network for one sequence, counted without running it."""
    nowhere = torch.device("meta")
    network = ShapeNetwork(shape, shape.layers, prompt, nowhere, torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, sites, dtype=torch.int64, device=nowhere))
    return int(counter.get_total_flops())


class _Given:
    """A denoiser that says the same whatever it is asked."""

    def __init__(self, network: ShapeNetwork, output: DenoiserOutput) -> None:
        self.vocab_size, self.mask_token_id = network.vocab_size, network.mask_token_id
        self.hidden_size, self.output = network.hidden_size, output

    def __call__(self, xt: Tensor) -> DenoiserOutput:
        return self.output


def _look(
    draw: Job, most: float, clock: Callable[[], float], device: torch.device
) -> tuple[int, Footprint] | str:
    """Bytes that a first draw leaves behind, and what a later one does; or why it isn't to be measured."""
    MEMORY.clear()
    try:
        kept = footprint(draw, device).kept_bytes
        seconds = _seconds(draw, clock, device)
        if seconds > most:
            return f"a draw takes {seconds:.1f} s, more than {PATIENCE:g} s and {SLOW:g} calls of the network"
        return kept, footprint(draw, device)
    except torch.OutOfMemoryError:
        return "it needs more memory than the device has left"


def _in_turn(
    jobs: Mapping[Any, Job], repeats: int, clock: Callable[[], float], device: torch.device
) -> dict[Any, list[float]]:
    """Seconds of each job, one after the other in each round; the first round isn't counted."""
    taken: dict[Any, list[float]] = {name: [] for name in jobs}
    for count in range(repeats + 1):
        for name, job in jobs.items():
            seconds = _seconds(job, clock, device)
            taken[name] += [seconds] if count else []
    return taken


def _seconds(job: Job, clock: Callable[[], float], device: torch.device) -> float:
    wait_for(device)
    start = clock()
    job()
    wait_for(device)
    return clock() - start
