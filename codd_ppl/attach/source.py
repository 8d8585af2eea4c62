"""The network that a coupling is for: what is known of it without its weights, and how to load them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.model_folder import MODEL, load_model

__all__ = ["Source", "open_source"]


@dataclass(frozen=True, eq=False)
class Source:
    """A network by its name.

    Attributes:
        name: folder or id.
        tokenizer: of the network.
        vocab_size: columns of its logits.
        mask_token_id: of the mask.
        pad_token_id: fills contexts that are too short.
        end: tokens that end a text; what stands between documents where it has none.
        positions: the longest text that it reads; None: any.
        chat: renders a conversation by its template.
        load: its weights, on a device.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    mask_token_id: int
    pad_token_id: int
    end: list[int]
    positions: int | None
    chat: Callable[[Sequence[Mapping[str, str]]], str]
    load: Callable[[torch.device], Denoiser]


def open_source(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    mask_token_id: int | None = None,
    dtype: str | None = None,
) -> Source:
    """A model folder of this library, or a masked model of ``transformers``; its weights aren't read yet.

    Args:
        name: a folder, or an id on the hub.
        revision, trust_remote_code, mask_token_id, dtype: see
            :meth:`codd_ppl.denoisers.pretrained.PretrainedDenoiser.from_pretrained`.

    Raises:
        ConfigError: no mask, code that isn't trusted, or no tokenizer.
        DataError: nothing that can be read there.
    """
    if (Path(name) / MODEL).is_file():
        return _folder(name)
    from codd_ppl.denoisers.pretrained import PretrainedDenoiser, read_backbone

    given: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "mask_token_id": mask_token_id,
    }
    backbone = read_backbone(name, **given)
    if backbone.tokenizer is None:
        raise ConfigError(
            f"{name}: expected a tokenizer of the library tokenizers beside the model, found none"
        )
    end, vocab = backbone.end_token_id, backbone.vocab_size
    if not 0 <= backbone.mask_token_id < vocab:
        raise ConfigError(
            f"{name}: expected the mask's id below vocab_size = {vocab}, found {backbone.mask_token_id}; give the id "
            "that the model was trained with (--mask-token-id)"
        )
    if (highest := max(backbone.tokenizer.get_vocab().values())) >= vocab:
        raise ConfigError(
            f"{name}: expected a tokenizer with ids below {vocab}, the columns of the network's logits, found one up "
            f"to {highest}; use the tokenizer that the network was trained with"
        )
    pad = backbone.pad_token_id if backbone.pad_token_id is not None else end
    return Source(
        name=name,
        tokenizer=backbone.tokenizer,
        vocab_size=vocab,
        mask_token_id=backbone.mask_token_id,
        pad_token_id=0 if pad is None else pad,
        end=_blank_line(backbone.tokenizer) if end is None else [end],
        positions=backbone.positions,
        chat=backbone.chat,
        load=lambda device: _moved(PretrainedDenoiser.from_pretrained(name, **given, dtype=dtype), device),
    )


def _folder(name: str) -> Source:
    saved = load_model(name)
    if saved.tokenizer is None:
        raise DataError(f"{name} has no tokenizer.json; save the model with its tokenizer")

    def no_chat(messages: Sequence[Mapping[str, str]]) -> str:
        raise ConfigError(
            f"{name}: a model folder has no chat template; give prompts as they are (--plain-prompts)"
        )

    end = _blank_line(saved.tokenizer)
    return Source(
        name=name,
        tokenizer=saved.tokenizer,
        vocab_size=saved.denoiser.vocab_size,
        mask_token_id=saved.denoiser.mask_token_id,
        pad_token_id=end[0] if end else 0,
        end=end,
        positions=None,
        chat=no_chat,
        load=lambda device: _moved(saved.denoiser, device),
    )


def _moved(network: Any, device: torch.device) -> Any:
    return network.to(device).eval().requires_grad_(False)


def _blank_line(tokenizer: Tokenizer) -> list[int]:
    """What stands between documents where the tokenizer has no end of text."""
    return list(tokenizer.encode("\n\n", add_special_tokens=False).ids)
