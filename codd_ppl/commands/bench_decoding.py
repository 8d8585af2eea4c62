"""``codd bench decoding``: what a coupling adds to a step, printed and written as JSON."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

import torch
from rich import print as rich_print

from codd_ppl.commands.device import named_device
from codd_ppl.commands.opened import open_model
from codd_ppl.commands.records import check_file, made_by
from codd_ppl.data import demo_model_path
from codd_ppl.errors import ConfigError
from codd_ppl.evaluation.decoding_time import decoding_table, time_decoding
from codd_ppl.evaluation.files import write_whole
from codd_ppl.sampling import drawing_method

__all__ = ["run_bench_decoding"]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def run_bench_decoding(options: argparse.Namespace) -> None:
    """What the command line asks for.

    Raises:
        ConfigError, DataError: settings out of range, a folder that is no model, a place that can't be written to.
    """
    check_file(options.output, "decoding.json")
    if options.threads < 1:
        raise ConfigError(f"--threads: expected at least 1, found {options.threads}")
    drawings = {name: drawing_method(name) for name in options.drawing}
    device = named_device(options.device)
    folder = options.model or demo_model_path()
    saved = open_model(folder, options, device, tokenizer=False)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        found = time_decoding(
            saved.denoiser,
            saved.coupling,
            drawings,
            options.batch_size,
            options.steps,
            options.repeats,
            CLOCKS[options.clock],
        )
        made = made_by(options.words, device)
    finally:
        torch.set_num_threads(before)
    rich_print(decoding_table(found))
    if options.output is not None:
        record = {
            **made,
            "model": "demo" if options.model is None else str(folder),
            "sites": saved.coupling.sites,
            "vocab": saved.coupling.vocab_size,
            "steps": options.steps,
            "seconds_per_step": [{**asdict(row), "overhead": row.overhead} for row in found],
        }
        write_whole(options.output, json.dumps(record, indent=1) + "\n")
