"""The model that a command line names: a model folder, or a coupling that ``codd attach`` wrote and its backbone."""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from pathlib import Path

import torch

from codd_ppl.attach import Source, open_source
from codd_ppl.coupling import CouplingLayer
from codd_ppl.coupling_files import CONFIG
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.model_folder import SavedModel, load_model

__all__ = ["open_model", "source_of"]


def open_model(
    path: Path, options: argparse.Namespace, device: torch.device, tokenizer: bool = True
) -> SavedModel:
    """Network, coupling and tokenizer on a device.

    Args:
        path: a model folder, or a folder of a coupling, which names its backbone.
        options: with what :func:`codd_ppl.commands.backbone_options.add_backbone_options` adds.
        device: where to put them.
        tokenizer: whether one is needed.

    Raises:
        DataError: nothing that can be read there, or no tokenizer where one is needed.
        ConfigError: a coupling without a backbone, or with another one than it was made for.
    """
    source = source_of(path, options)
    if source is None:
        saved = load_model(path)
        if tokenizer and saved.tokenizer is None:
            raise DataError(f"{path} has no tokenizer.json; save the model with its tokenizer")
        return SavedModel(saved.denoiser.to(device), saved.coupling.to(device), saved.tokenizer, saved.about)
    coupling = CouplingLayer.from_pretrained(path, tokenizer=source.tokenizer).to(device)
    if coupling.vocab_size != source.vocab_size:
        raise ConfigError(
            f"{path}: expected a network with the coupling's {coupling.vocab_size} tokens, found {source.name} with "
            f"{source.vocab_size}; give the backbone that the coupling was made for"
        )
    about = (coupling.loaded_config or {}).get("about", {})
    return SavedModel(_network(source, device), coupling, source.tokenizer, about)


def source_of(path: Path, options: argparse.Namespace) -> Source | None:
    """The backbone of a coupling's folder: ``--backbone``, or the one that it names; None for other folders.

    Raises:
        ConfigError: neither says which.
    """
    if not (path / CONFIG).is_file():
        if options.backbone is not None:
            raise ConfigError(
                f"--backbone {options.backbone}: expected the folder of a coupling with it, which has {CONFIG}, found "
                f"{path}; a model folder has a network of its own"
            )
        return None
    try:
        named = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("backbone")
    except ValueError as error:
        raise DataError(f"{path / CONFIG}: expected JSON, but {error}; write the coupling again") from error
    name = options.backbone or named
    if name is None:
        raise ConfigError(f"{path} doesn't say which network it is for: give --backbone")
    return _source(name, options.revision, options.trust_remote_code, options.dtype)


@lru_cache(maxsize=1)
def _source(name: str, revision: str | None, trust: bool, dtype: str | None) -> Source:
    return open_source(name, revision, trust, dtype=dtype)


@lru_cache(maxsize=1)
def _network(source: Source, device: torch.device) -> Denoiser:
    """Loaded once, for all couplings of a command."""
    return source.load(device)
