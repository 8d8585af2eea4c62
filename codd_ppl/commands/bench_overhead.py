"""``codd bench overhead``: what a coupling costs beside a network of a given shape, printed and written as JSON.

The path on CUDA has not been run yet.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction

import torch
from rich import print as rich_print

from codd_ppl.commands.device import named_device
from codd_ppl.commands.records import check_file, made_by
from codd_ppl.errors import ConfigError
from codd_ppl.evaluation.backbone_shape import named_shape
from codd_ppl.evaluation.files import write_whole
from codd_ppl.evaluation.machine import free_bytes
from codd_ppl.evaluation.overhead import Overhead, Skipped, overhead_record, overhead_table
from codd_ppl.evaluation.overhead_timing import time_overhead
from codd_ppl.evaluation.overhead_variants import DRAWINGS, bytes_needed, drawing_at, variants
from codd_ppl.evaluation.shape_network import ShapeNetwork

__all__ = ["layers_to_run", "run_bench_overhead"]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

ON_CPU = 2
"""Layers that ``--scale auto`` runs on a CPU, where a step with all of them takes a minute."""


def run_bench_overhead(options: argparse.Namespace) -> None:
    """What the command line asks for.

    Raises:
        ConfigError: settings out of range, an unknown network, or one that doesn't fit into memory.
    """
    check_file(options.output, "overhead.json")
    _check(options)
    shape, device = named_shape(options.backbone_config), named_device(options.device)
    if device.type != "cpu" and options.clock == "cpu":
        raise ConfigError(f"--clock cpu counts the host's work, not that of {device}; use --clock wall")
    dtype, sites = getattr(torch, options.dtype), options.length

    def needed(layers: int, batch: int) -> int:
        network = shape.bytes_needed(layers, batch, sites, options.prompt + sites, dtype)
        return network + bytes_needed(shape.vocab_size, options.states, sites, batch)

    free, smallest = free_bytes(device), min(options.batch_size)
    most = shape.layers if device.type != "cpu" else min(ON_CPU, shape.layers)
    layers = layers_to_run(options.scale, shape.layers, most, lambda n: needed(n, smallest), free)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        network = ShapeNetwork(shape, layers, options.prompt, device, dtype)
        drawings = {name: drawing_at(name, options.drawing_temperature) for name in options.drawing}
        sizes = (sites, shape.vocab_size, options.states, options.candidates)
        couplings = variants(*sizes, drawings, device, options.seed)
        rows, left_out = list[Overhead | Skipped](), dict[str, str]()
        for batch in options.batch_size:
            if needed(layers, batch) > free:
                why = f"it needs {needed(layers, batch) / 1e9:.1f} GB, {free / 1e9:.1f} GB were free"
                left_out[str(batch)] = why
                rich_print(f"batch {batch} is left out: {why}")
                continue
            settings = (batch, options.repeats, CLOCKS[options.clock], options.seed)
            found = time_overhead(network, couplings, options.states, *settings)
            rich_print(overhead_table(shape.name, found))
            rows += found
        made = made_by(options.words, device)
    finally:
        torch.set_num_threads(before)
    if options.output is not None:
        networks = {row.network.batch_size: row.network for row in rows}
        record = {
            **made,
            "backbone": asdict(shape),
            "weights": "random: they change no time, nor does the content of the logits",
            "head": "reads the sites that are written, not the prompt",
            "layers": layers,
            "dtype": options.dtype,
            "states": options.states,
            "sites": sites,
            "prompt": options.prompt,
            "clock": options.clock,
            "drawing_temperature": options.drawing_temperature,
            "network": [
                {
                    "batch_size": batch,
                    "seconds_measured_by_layers": {str(n): value for n, value in times.seconds.items()},
                    "seconds_extrapolated": times.extrapolated,
                    "misfit": times.misfit,
                }
                for batch, times in networks.items()
            ],
            "left_out": left_out,
            "couplings": [overhead_record(row) for row in rows],
        }
        write_whole(options.output, json.dumps(record, indent=1) + "\n")


def layers_to_run(scale: str, layers: int, most: int, needed: Callable[[int], int], free: int) -> int:
    """How many layers a network is built with.

    Args:
        scale: "auto", or a share of the layers such as "1/8", rounded, one at least.
        layers: of the whole network.
        most: that "auto" may take; less where memory asks for it, halved until it fits.
        needed: bytes for so many layers.
        free: bytes that there are.

    Raises:
        ConfigError: no share above 0 and up to 1, or more bytes needed than there are.
    """
    if scale == "auto":
        count = most
        while count > 1 and needed(count) > free:
            count //= 2
    else:
        try:
            share = Fraction(scale)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not 0 < share <= 1:
            raise ConfigError(
                f"--scale: expected auto, or a share of the layers such as 1 or 1/8, found {scale!r}; give a number "
                "above 0 and up to 1"
            )
        count = max(1, round(share * layers))
    if needed(count) > free:
        raise ConfigError(
            f"--scale {scale}: expected {needed(count) / 1e9:.1f} GB for {count} of {layers} layers and the coupling, "
            f"found {free / 1e9:.1f} GB free; give a smaller --scale, fewer --states or a smaller --batch-size"
        )
    return count


def _check(options: argparse.Namespace) -> None:
    least = {
        "--states": options.states,
        "--length": options.length,
        "--batch-size": min(options.batch_size),
        "--candidates": min(options.candidates),
        "--repeats": options.repeats,
        "--threads": options.threads,
    }
    for name, value in least.items():
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, found {value}")
    if options.prompt < 0:
        raise ConfigError(f"--prompt: expected at least 0, found {options.prompt}")
    for name in options.drawing:
        if name not in DRAWINGS:
            raise ConfigError(f"--drawing: expected one of {', '.join(DRAWINGS)}, found {name!r}")
