"""``codd generate``: texts from prompts and templates, printed, streamed, or as JSON lines."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import reduce
from operator import and_
from typing import Any

import torch
from tokenizers import Tokenizer

from codd_ppl import CouplingLayer, FactorGraph, Sampler, constraints, topologies
from codd_ppl.attach import Source
from codd_ppl.commands.device import named_device
from codd_ppl.commands.generate_output import Output, Text, text_output
from codd_ppl.commands.generate_page import Recorder
from codd_ppl.commands.opened import open_model, source_of
from codd_ppl.commands.prompts import Task, read_tasks
from codd_ppl.errors import ConfigError
from codd_ppl.model_folder import SavedModel
from codd_ppl.sampling import (
    AnyOrder,
    BlockSampler,
    Draw,
    FirstStop,
    Latent,
    Step,
    StopRule,
    StopStrings,
    StopTokens,
    TextSampler,
    WholeTextSampler,
    WindowedCoupling,
    best_of,
    extended,
)

__all__ = ["run_generate", "sampler_of", "text_sampler_of"]


def run_generate(options: argparse.Namespace) -> None:
    """What the command line asks for.

    Raises:
        CoddError: settings out of range or against each other, a folder or file that isn't there.
    """
    for name in ("samples", "best_of", "batch_size", "length"):
        value = getattr(options, name)
        if value is not None and value < (0 if name == "length" else 1):
            raise ConfigError(f"--{name.replace('_', '-')}: expected a positive number, found {value}")
    device = named_device(options.device)
    saved, source = open_model(options.model, options, device), source_of(options.model, options)
    assert saved.tokenizer is not None
    tasks = read_tasks(options, saved, _user_turn(source) if options.chat else None)
    strings = _stop_strings(options, saved.tokenizer)
    rules: list[StopRule] = [*strings]
    if options.stop_token:
        vocab = saved.denoiser.vocab_size
        if not all(0 <= token < vocab for token in options.stop_token):
            raise ConfigError(f"--stop-token: expected ids from 0 to {vocab - 1}, found {options.stop_token}")
        rules.append(StopTokens(*options.stop_token))
    if source is not None and len(source.end) == 1:
        rules.append(StopTokens(*source.end))
    _check_constrained(options, [len(task.template) for task in tasks], saved.coupling.sites)
    sampler = text_sampler_of(options, sampler_of(options, saved), FirstStop(*rules))
    generator = torch.Generator(device).manual_seed(options.seed)
    output = text_output(options.jsonl, saved.tokenizer, saved.denoiser.mask_token_id, len(tasks))
    page = _page(options, saved)
    try:
        with output:
            each = max(1, options.batch_size // options.best_of)
            for start in range(0, len(tasks), each):  # the first texts of a long list come early
                batch = tasks[start : start + each]
                _write(batch, sampler, options.best_of, generator, output, saved.tokenizer, strings, page)
    except BrokenPipeError:  # the reader, such as head, has had enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:  # Ctrl-C keeps the texts that are whole
        if page is not None and page.texts:
            page.save(options.html, f"codd generate {options.model}")


def _user_turn(source: Source | None) -> Callable[[str], str]:
    """A prompt as the one turn of a conversation, by the network's chat template.

    Raises:
        ConfigError: a model folder, which has none.
    """
    if source is None:
        raise ConfigError(
            "--chat: expected a coupling of a pretrained network, found a model folder, without a chat template"
        )
    return lambda text: source.chat([{"role": "user", "content": text}])


def sampler_of(options: argparse.Namespace, saved: SavedModel) -> Sampler:
    """The sampler of one block; what is new in :class:`Sampler` gets its option here."""
    coupling: Any = saved.coupling
    if options.factorised:
        vocab = saved.denoiser.vocab_size
        coupling = CouplingLayer(topologies.independent(coupling.sites, vocab), vocab).to(options.device)
    wanted = _constraints(options)
    if wanted:
        coupling = constraints.constrain(coupling, reduce(and_, wanted), saved.tokenizer)
    network = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    if options.temperature == 0:
        raise ConfigError("--temperature: expected a number above 0, found 0; use --drawing mode")
    return Sampler.from_arguments(
        saved.denoiser,
        coupling,
        unmasking=options.unmasking,
        steps=options.steps,
        drawing=_drawing(options),
        active_below=options.active_below,
        **({} if options.remasking is None else {"remasking": options.remasking}),
        **{name: value for name, value in network.items() if value is not None},
    )


def _constraints(options: argparse.Namespace) -> list[constraints.Constraint]:
    found = [] if options.regex is None else [constraints.regex(options.regex)]
    found += [constraints.contains(options.contains)] if options.contains else []
    return found + ([constraints.forbids(options.forbids)] if options.forbids else [])


def _check_constrained(options: argparse.Namespace, lengths: Sequence[int], sites: int) -> None:
    if not _constraints(options):
        return
    if set(lengths) != {sites} or (options.block_length or sites) != sites:
        raise ConfigError(
            f"--regex, --contains and --forbids are about one text of the model's {sites} tokens, prompt included, "
            f"found texts of {sorted(set(lengths))} and --block-length {options.block_length}; leave out --length and "
            f"--block-length, or give a template of {sites} tokens"
        )


def _drawing(options: argparse.Namespace) -> str | Draw:
    if options.drawing_temperature is None:
        return str(options.drawing)
    with_temperature = {"latent": Latent, "any_order": AnyOrder}
    if options.drawing not in with_temperature:
        raise ConfigError(
            f"--drawing-temperature is one of --drawing {' and '.join(with_temperature)}, found {options.drawing}; "
            "--temperature sharpens the network's tokens, before they are coupled"
        )
    return with_temperature[options.drawing](options.drawing_temperature)


def text_sampler_of(options: argparse.Namespace, sampler: Sampler, stop: StopRule) -> TextSampler:
    """How texts longer than the graph are written: in blocks, or whole, in windows or on a longer graph.

    Raises:
        ConfigError: options about blocks for whole texts, or values out of range.
    """
    if options.windows or options.extend:
        if options.context is not None or options.lookahead:
            raise ConfigError(
                "--context and --lookahead are about blocks; leave them out, or leave out --windows and --extend, "
                "with which the network reads the whole text"
            )
        return WholeTextSampler(
            sampler, extended if options.extend else WindowedCoupling, guidance=options.cfg_scale, stop=stop
        )
    return BlockSampler(
        sampler, options.block_length, options.context, options.lookahead, options.cfg_scale, stop
    )


def _page(options: argparse.Namespace, saved: SavedModel) -> Recorder | None:
    if options.html is None:
        return None
    if options.best_of > 1:
        raise ConfigError("--html plays how one text was written: leave out --best-of, or --html")
    if options.html.is_dir():
        raise ConfigError(
            f"--html {options.html} is a folder; give the name of a file, {options.html / 'texts.html'}"
        )
    assert saved.tokenizer is not None
    return Recorder(saved.tokenizer, FactorGraph() if options.factorised else saved.coupling.graph)


def _write(
    batch: Sequence[Task],
    sampler: TextSampler,
    count: int,
    generator: torch.Generator,
    output: Output,
    tokenizer: Tokenizer,
    strings: Sequence[StopStrings],
    page: Recorder | None,
) -> None:
    """Write one batch and hand its texts to the output."""

    def step(step: Step) -> None:
        output.step(step)
        if page is not None:
            page.step(step)

    templates = [task.template for task in batch]
    output.begin([template for template in templates for _ in range(count)])
    if page is not None:
        page.begin(templates)
    began = time.perf_counter()
    scores: list[float | None] = [None] * len(batch)
    if count > 1:
        best = best_of(sampler, templates, count, generator, step)
        found, scores = best.generation, best.log_prob.tolist()
    else:
        found = sampler.generate(templates, generator, step)
    seconds = time.perf_counter() - began
    texts = []
    for task, tokens, length, nfe, score in zip(
        batch, found.tokens, found.lengths.tolist(), found.nfe.tolist(), scores, strict=True
    ):
        ids = tokens[:length].tolist()
        text = _decoded(ids, task.given, tokenizer, strings)
        texts.append(Text(task.prompt, task.sample, text, ids, nfe, seconds, len(batch), score))
    output.end(texts, found.calls)
    if page is not None:
        page.end(texts)


def _decoded(ids: list[int], given: int, tokenizer: Tokenizer, strings: Sequence[StopStrings]) -> str:
    """The text up to a stop string, which counts in what was written only."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    before = tokenizer.decode(ids[:given], skip_special_tokens=False)
    start = len(before) if text.startswith(before) else 0
    for stop in strings:
        text = text[:start] + stop.cut(text[start:])
    return text


def _stop_strings(options: argparse.Namespace, tokenizer: Tokenizer) -> list[StopStrings]:
    if not options.stop:
        return []
    strings = [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in options.stop]
    return [StopStrings(strings, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))]
