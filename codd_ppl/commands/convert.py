"""``codd convert``: a coupling's folder from the file of another library."""

from __future__ import annotations

import argparse
import hashlib
import shlex
from pathlib import Path

import torch

from codd_ppl.attach.settings import LARGE
from codd_ppl.convert import hidden_markov_coupling, read_hidden_markov
from codd_ppl.coupling_files import CONFIG
from codd_ppl.errors import ConfigError
from codd_ppl.folders import check_target
from codd_ppl.training.tokenizer import read_tokenizer

__all__ = ["run_convert"]


def run_convert(options: argparse.Namespace) -> None:
    """What the command line asks for; ``options.words`` are the words as typed.

    Raises:
        ConfigError, DataError: a file, tokenizer or place that can't be used; nothing is written.
    """
    check_target(options.out, CONFIG)
    if options.combine == "product" and options.candidates:
        raise ConfigError("--candidates belongs to the projection: leave it out, or --combine product")
    given = options.tokenizer
    tokenizer = (
        None if given is None else read_tokenizer(given / "tokenizer.json" if given.is_dir() else given)
    )
    tables = read_hidden_markov(options.model, options.trust_pickle)
    states, vocab = tables.emission.shape
    if tokenizer is not None and (highest := max(tokenizer.get_vocab().values())) >= vocab:
        raise ConfigError(
            f"--tokenizer {given}: expected ids below {vocab}, the categories of {options.model}, found one up to "
            f"{highest}; give the tokenizer of the network that the circuit was trained for"
        )
    candidates = options.candidates or (256 if vocab > LARGE and options.combine == "projected" else None)
    coupling = hidden_markov_coupling(tables, options.sites, options.combine, candidates)
    about = {
        "command": "codd " + shlex.join(options.words),
        "converted": {
            "file": options.model.name,
            "sha256": _sha256(options.model),
            "library": "PyJuice",
            "sites": tables.sites,
            "states": states,
            "distribution": tables.distribution,
        },
    }
    dtype = torch.float16 if options.weights == "float16" else None
    coupling.save_pretrained(options.out, options.backbone, tokenizer, about, dtype)
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(
        f"{options.out}: a hidden Markov model of {states} states over {vocab} tokens, {coupling.sites} sites, "
        f"{size / 1e6:.1f} MB"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
