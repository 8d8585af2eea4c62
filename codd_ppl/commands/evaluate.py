"""``codd evaluate``: NELBO_T of the models of one or more folders on one text, printed and recorded."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich import print as rich_print
from tokenizers import Tokenizer

from codd_ppl import __version__
from codd_ppl.commands.device import named_device
from codd_ppl.commands.opened import open_model
from codd_ppl.commands.records import check_file
from codd_ppl.errors import ConfigError, DataError, ShapeError
from codd_ppl.evaluation import (
    MarginalsAlone,
    PriorAlone,
    Sharpened,
    nelbo_table,
    time_network,
    time_sampling,
)
from codd_ppl.evaluation.machine import describe_device
from codd_ppl.evaluation.metrics import word_perplexity
from codd_ppl.evaluation.parts import describe_coupling, describe_network, plain_notes
from codd_ppl.evaluation.record import Row, evaluation_record, save_record
from codd_ppl.evaluation.table import NelboTable
from codd_ppl.model_folder import MODEL, SavedModel
from codd_ppl.training.blocks import cut_blocks, spread_blocks
from codd_ppl.training.detokenize import detokenize_wikitext, wikitext_words
from codd_ppl.training.text_files import read_documents
from codd_ppl.training.tokenizer import encode_documents
from codd_ppl.typing import Int, Tensor

__all__ = ["model_rows", "run_evaluate"]

TIMING_BATCH = 8
SHARPER = 0.8


@dataclass(frozen=True)
class _Text:
    """Blocks to evaluate; how many tokens and words the text has (no words: not counted)."""

    blocks: Int[Tensor, "n sites"]
    tokens: int
    words: int


def run_evaluate(options: argparse.Namespace) -> None:
    """What the command line asks for; ``options.words`` are the words as typed.

    Raises:
        ConfigError, DataError, ShapeError: folders that don't go together, a text that is too short, places that can't
            be written to, a device that isn't there.
    """
    check_file(options.output, "results.json")
    check_file(options.table, "table.json")
    device = named_device(options.device)
    saved = open_model(options.model, options, device)
    assert saved.tokenizer is not None
    rows = model_rows(saved, _also(options, saved, device), options.controls)
    text = _read(options, saved.tokenizer, saved.coupling.sites)
    models = {name: row.model for name, row in rows.items()}
    table = nelbo_table(
        models,
        text.blocks,
        options.steps,
        seed=options.seed,
        batch_size=options.batch_size,
        draws=options.draws,
        reveals=options.reveals,
        progress=True,
    )
    calls: dict[str, float] = {}
    if options.timing > 0:
        found = time_sampling(
            models,
            table.steps,
            saved.coupling.sites,
            batch_size=TIMING_BATCH,
            budget=options.timing,
            seed=options.seed,
            progress=True,
        )
        table = table.with_seconds(found, timing_batch_size=TIMING_BATCH)
        bases = {name: row.model[0] for name, row in rows.items() if row.role == "factorised"}
        calls = {name: time_network(net, saved.coupling.sites, TIMING_BATCH) for name, net in bases.items()}
    for base in dict.fromkeys(row.against or name for name, row in rows.items()):
        group = {name: table.values[name] for name, row in rows.items() if base in (name, row.against)}
        seconds = {name: found for name, found in table.seconds_per_sample.items() if name in group}
        rich_print(replace(table, values=group, seconds_per_sample=seconds).render(base))
    each = text.tokens / text.words if options.wikitext else None
    if each is not None:
        _print_perplexities(table, text.words, each)
    if options.table:
        table.save(options.table)
    if options.output:
        about = {
            "files": [path.name for path in options.text],
            "blocks": len(text.blocks),
            "tokens": text.tokens,
        }
        record = evaluation_record(
            table,
            rows,
            command="codd " + shlex.join(options.words),
            device=describe_device(device),
            versions={"codd_ppl": __version__, "torch": str(torch.__version__)},
            text=about | ({"words": text.words} if options.wikitext else {}),
            vocab=saved.coupling.vocab_size,
            tokens_per_word=each,
            network_seconds=calls,
        )
        save_record(record, options.output)


def model_rows(saved: SavedModel, also: dict[str, SavedModel], controls: bool = False) -> dict[str, Row]:
    """Rows of the table: "factorised", "coupled", those of ``also`` under their names, and controls of "coupled".

    A model that holds a network of its own brings a row "factorised, NAME", which it is compared with; one that has the
    same network as the first shares it, so that it runs once. One without factors is a network alone, one row.
    """
    network = saved.denoiser
    rows = {"factorised": Row((network, None), "factorised", None, _parts(saved, network=True))}
    if saved.coupling.plan.factors:
        rows["coupled"] = Row((network, saved.coupling), "coupled", "factorised", _parts(saved))
    for name, other in also.items():
        same = _same_network(saved, other)
        used = network if same else other.denoiser
        against = "factorised" if same else f"factorised, {name}"
        alone = Row((used, None), "factorised", None, _parts(other, network=True))
        if not other.coupling.plan.factors:
            rows[name] = replace(alone, against="factorised")
            continue
        if not same:
            rows[against] = alone
        rows[name] = Row((used, other.coupling), "coupled", against, _parts(other))
    if controls:
        if saved.coupling.plan.factors:
            rows["marginals alone"] = Row((network, MarginalsAlone(saved.coupling)), "control", "factorised")
            rows["prior alone"] = Row((network, PriorAlone(saved.coupling)), "control", "factorised")
        rows[f"sharpened {SHARPER}"] = Row((Sharpened(network, SHARPER), None), "control", "factorised")
    return rows


def _parts(saved: SavedModel, network: bool = False) -> dict[str, object]:
    """What the folder holds; its notes stand where they belong: what was trained last is the coupling, if any."""
    notes = plain_notes(saved.about)
    if not network:
        return {"coupling": describe_coupling(saved.coupling), "about": notes}
    found: dict[str, object] = {"network": describe_network(saved.denoiser)}
    return found if saved.coupling.plan.factors else found | {"about": notes}


def _same_network(one: SavedModel, other: SavedModel) -> bool:
    if one.denoiser is other.denoiser:
        return True
    configs = [getattr(saved.denoiser, "config", None) for saved in (one, other)]
    if configs[0] is None or configs[0] != configs[1]:
        return False
    theirs = other.denoiser.state_dict()
    return all(value.equal(theirs[key]) for key, value in one.denoiser.state_dict().items())


def _also(options: argparse.Namespace, saved: SavedModel, device: torch.device) -> dict[str, SavedModel]:
    """The folders of ``--also NAME=FOLDER``, which must have the sites and the vocabulary of the first."""
    found: dict[str, SavedModel] = {}
    taken = {"factorised", "coupled", "marginals alone", "prior alone", f"sharpened {SHARPER}"}
    first = options.model
    for word in options.also:
        name, _, folder = (part.strip() for part in word.partition("="))
        if not name or not folder or name in taken or name.startswith("factorised, "):
            raise ConfigError(
                f"--also: expected NAME=FOLDER with a name that is not taken ({', '.join(sorted(taken))}), found "
                f"{word!r}; give e.g. --also product=runs/product/model"
            )
        taken.add(name)
        other = open_model(Path(folder), options, device)
        assert saved.tokenizer is not None and other.tokenizer is not None
        if other.coupling.sites != saved.coupling.sites:
            raise ShapeError(
                f"--also {word}: expected {saved.coupling.sites} sites as in {first}, found {other.coupling.sites}; "
                "bits per token compare on the same blocks only: evaluate it by itself"
            )
        if other.tokenizer.get_vocab() != saved.tokenizer.get_vocab():
            raise ConfigError(
                f"--also {word}: expected the vocabulary of {first} ({saved.coupling.vocab_size} tokens), found "
                f"another one ({other.coupling.vocab_size}); bits per token compare for one tokenizer only: evaluate "
                "it by itself"
            )
        found[name] = other
    return found


def _read(options: argparse.Namespace, tokenizer: Tokenizer, sites: int) -> _Text:
    paths, wikitext = options.text, options.wikitext
    for path in paths:
        if (path / MODEL).is_file():
            raise ConfigError(
                f"{path} is a model folder where a text is expected; add it with --also NAME={path}"
            )
    documents = read_documents(paths, options.fields, "" if wikitext else None, None)
    words = sum(map(wikitext_words, documents))
    if wikitext:
        documents = [detokenize_wikitext(document) for document in documents]
    tokens = encode_documents(tokenizer, documents, "\n\n")
    found = spread_blocks(cut_blocks(tokens, sites), options.blocks)
    if not len(found):
        names = ", ".join(map(str, paths))
        raise DataError(
            f"{names}: expected at least one block of {sites} tokens, found {len(tokens)}; give more text"
        )
    return _Text(found, len(tokens), words)


def _print_perplexities(table: NelboTable, words: int, each: float) -> None:
    print(f"perplexity per word ({words:,} words as WikiText counts them, {each:.3f} tokens each)")
    for name in table.models:
        row = [f"T={T}: {word_perplexity(table.mean(name, T), each):.4g}" for T in table.steps]
        print(f"{name:>16}  " + "  ".join(row))
