"""A network with its coupling and tokenizer, by names: what a benchmark is run on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers.backbone import positions
from codd_ppl.denoisers.pretrained import PretrainedDenoiser
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.evaluation.machine import found_device
from codd_ppl.graphs import topologies
from codd_ppl.model_folder import MODEL, load_model
from codd_ppl.sampling.extension import extended

__all__ = ["HarnessModel", "load_harness_model"]


@dataclass(frozen=True)
class HarnessModel:
    """What :func:`load_harness_model` read.

    Attributes:
        denoiser, coupling: on one device, the coupling with at least as many sites as a block.
        tokenizer: of the network; it neither cuts nor pads.
        words: the tokenizer of ``transformers``, with its chat template; None for a model folder.
        max_length: largest number of tokens that the network reads; None: any.
        ends: ids of the tokens that end a text; may be none.
        block_length: sites of a block.
    """

    denoiser: Denoiser
    coupling: CouplingLayer
    tokenizer: Tokenizer
    words: Any
    max_length: int | None
    ends: tuple[int, ...]
    block_length: int


def load_harness_model(
    backbone: str,
    coupling: str | None = None,
    factorised: bool = False,
    block_length: int | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    coupling_revision: str | None = None,
    **settings: Any,
) -> HarnessModel:
    """Read a network and what belongs to it.

    Args:
        backbone: folder or hub id of a masked model of ``transformers``, or a model folder of codd_ppl, which brings
            its own coupling.
        coupling: folder or hub id of a coupling (``save_pretrained``), in place of the backbone's own.
        factorised: draw tokens independently, in windows as long as those of the coupling, if there is one.
        block_length: sites of a block; None: those of the coupling, without one 32 or what the network can read. A
            coupling with fewer is put on a longer graph (:func:`codd_ppl.sampling.extended`).
        device: of network and coupling.
        revision, coupling_revision: on the hub.
        settings: of :meth:`PretrainedDenoiser.from_pretrained`: ``trust_remote_code``, ``mask_token_id``, ``dtype``, ..

    Raises:
        DataError: nothing to read there, or a network without a tokenizer.
        ConfigError: a coupling for another network or vocabulary, one that can't be so long, settings that a model
            folder doesn't have, or a device that isn't there.
    """
    where = found_device(str(device), "device")
    own: CouplingLayer | None = None
    denoiser: Any
    if (Path(backbone) / MODEL).is_file():
        given = [
            name for name, value in [("revision", revision), *settings.items()] if value not in (None, False)
        ]
        if given:
            raise ConfigError(
                f"{', '.join(given)}: expected for networks of transformers only, and {backbone} is a model folder of "
                "codd_ppl, which holds all that it needs; leave them out"
            )
        saved = load_model(backbone)
        denoiser, own, tokenizer = saved.denoiser, saved.coupling, saved.tokenizer
    else:
        denoiser = PretrainedDenoiser.from_pretrained(backbone, revision, **settings)
        tokenizer = denoiser.tokenizer
    if tokenizer is None:
        raise DataError(
            f"{backbone}: expected a network with its tokenizer (tokenizer.json), found none; save the tokenizer into "
            "its folder"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = getattr(getattr(denoiser, "model", None), "config", None)
    words = getattr(denoiser, "words", None)
    longest = _max_length(config, words)
    if coupling is not None:
        name = None if Path(backbone).is_dir() else backbone  # a folder has any name; the vocabulary tells
        own = CouplingLayer.from_pretrained(
            coupling, coupling_revision, name, tokenizer, unembedding=_unembedding(denoiser)
        )
    if own is None or factorised:
        vocab = denoiser.vocab_size
        sites = own.sites if own is not None else block_length or min(32, longest or 32)
        own = CouplingLayer(topologies.independent(sites, vocab), vocab).eval()
    length = own.sites if block_length is None else block_length
    layer = extended(own, length) if length > own.sites else own
    ends = getattr(config, "eos_token_id", None)
    return HarnessModel(
        denoiser.to(where),
        layer.to(where),
        tokenizer,
        words,
        longest,
        tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (int(ends),),
        length,
    )


def _unembedding(denoiser: Any) -> Any:
    """For couplings whose emissions are tied to it; None where the network shows none."""
    if not isinstance(denoiser, PretrainedDenoiser):
        return denoiser.unembedding
    head = getattr(denoiser.model, "get_output_embeddings", lambda: None)()
    return None if head is None else head.weight


def _max_length(config: Any, words: Any) -> int | None:
    """The smallest that is said; tokenizers say a huge number where they don't know."""
    said = [positions(config), getattr(words, "model_max_length", None)]
    numbers = [value for value in said if isinstance(value, int) and 0 < value < 10**9]
    return min(numbers, default=None)
