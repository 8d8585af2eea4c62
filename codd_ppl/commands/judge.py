"""``codd judge``: samples of a model under an autoregressive judge, coupled and independent, printed and recorded."""

from __future__ import annotations

import argparse

from rich import print as rich_print

from codd_ppl.commands.device import named_device
from codd_ppl.commands.records import check_file, made_by
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.evaluation.files import write_whole
from codd_ppl.evaluation.sample_quality import judge_samplers, judge_text, quality_table, samples_record
from codd_ppl.judge import CausalJudge
from codd_ppl.model_folder import load_model
from codd_ppl.training.blocks import cut_blocks, spread_blocks
from codd_ppl.training.text_files import read_documents
from codd_ppl.training.tokenizer import encode_documents

__all__ = ["run_judge"]


def run_judge(options: argparse.Namespace) -> None:
    """What the command line asks for.

    Raises:
        ConfigError, DataError: folders that don't go together, too little text, a place that can't be written to.
    """
    check_file(options.output, "samples.json")
    if options.samples < 2:
        raise ConfigError(
            f"--samples: expected at least 2 to say how exact a mean is, found {options.samples}"
        )
    device = named_device(options.device)
    saved, judge = load_model(options.model), CausalJudge.load(options.judge).to(device)
    if saved.tokenizer is None or judge.tokenizer is None:
        which = options.model if saved.tokenizer is None else options.judge
        raise DataError(f"{which} has no tokenizer.json; save it with its tokenizer")
    if saved.tokenizer.get_vocab() != judge.tokenizer.get_vocab():
        raise ConfigError(
            f"--judge {options.judge}: expected the vocabulary of {options.model} ({saved.coupling.vocab_size} "
            f"tokens), found another one ({judge.vocab_size}); train the judge with --data.tokenizer "
            f"{options.model}/tokenizer.json"
        )
    sites = saved.coupling.sites
    tokens = encode_documents(
        saved.tokenizer, read_documents(options.text, options.fields, None, None), "\n\n"
    )
    blocks = spread_blocks(cut_blocks(tokens, sites), options.samples)
    if len(blocks) < 2:
        names = ", ".join(map(str, options.text))
        raise DataError(
            f"{names}: expected at least two blocks of {sites} tokens, found {len(tokens)} tokens; give more text"
        )
    rows = [judge_text(blocks, judge, options.ngram)]
    rows += judge_samplers(
        saved.denoiser.to(device),
        saved.coupling.to(device),
        judge,
        options.steps,
        options.samples,
        options.batch_size,
        options.order,
        options.drawing,
        options.ngram,
        options.seed,
        progress=True,
    )
    rich_print(quality_table(rows))
    if options.output is not None:
        record = samples_record(
            rows,
            **made_by(options.words, device),
            judge=judge.about,
            text=[path.name for path in options.text],
            sites=sites,
        )
        write_whole(options.output, record)
