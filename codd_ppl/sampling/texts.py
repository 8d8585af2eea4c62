"""Batches of texts of different lengths: rows of equal shape run together, without padding."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.errors import ShapeError, TokenError
from codd_ppl.sampling.step import OnStep
from codd_ppl.typing import Int, Tensor

__all__ = ["TextGeneration", "TextSampler", "alike", "check_texts"]


@dataclass(frozen=True)
class TextGeneration:
    """What a sampler wrote into texts of any lengths.

    Attributes:
        tokens: one (sites,) int64 for each text, every masked site written.
        history: one (sites,) int64 for each text, the reverse step of its block in which a site was written; -1 where
            the template gave the token, or where the text had ended before.
        lengths: (texts,) int64, sites up to and with the stop that ended a text; all of them where none did.
        nfe: (texts,) int64, network calls that a text took part in.
        calls: network calls in all; texts of equal shape share theirs.
    """

    tokens: tuple[Int[Tensor, " any"], ...]
    history: tuple[Int[Tensor, " any"], ...]
    lengths: Int[Tensor, " texts"]
    nfe: Int[Tensor, " texts"]
    calls: int


@runtime_checkable
class TextSampler(Protocol):
    """Writes texts of any lengths: :class:`BlockSampler`, :class:`WholeTextSampler`, or one of your own."""

    def generate(
        self,
        templates: Sequence[Tensor] | Tensor,
        generator: torch.Generator | None = None,
        on_step: OnStep | None = None,
    ) -> TextGeneration:
        """Write the masked sites of every template."""


def alike(keys: Sequence[Hashable]) -> list[tuple[int, ...]]:
    """Places of equal keys, in the order in which the keys come first.

    Rows of one shape make one batch. Nothing is padded, so that no network needs to know about padding: what a row's
    law is doesn't depend on which rows it comes with.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return [tuple(places) for places in groups.values()]


def check_texts(
    templates: Sequence[Tensor] | Tensor, denoiser: Denoiser, device: torch.device
) -> list[Int[Tensor, " any"]]:
    """The rows as int64 tensors on the device.

    Raises:
        ShapeError: no int64 rows of at least one site.
        TokenError: ids that are neither in the vocabulary nor the mask token.
    """
    vocab, mask = denoiser.vocab_size, denoiser.mask_token_id
    rows = list(templates)
    for i, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.dtype != torch.int64 or row.dim() != 1 or not len(row):
            found = f"{row.dtype} {tuple(row.shape)}" if isinstance(row, Tensor) else type(row).__name__
            raise ShapeError(
                f"templates[{i}]: expected int64 (sites,) with at least one site, found {found}; pass a list of "
                "one-dimensional tensors of token ids, or one tensor (batch, sites)"
            )
        wrong = (row != mask) & ((row < 0) | (row >= vocab))
        if bool(wrong.any()):
            raise TokenError(
                f"templates[{i}]: expected ids in 0..{vocab - 1}, or the mask token {mask}, found "
                f"{int(row[wrong][0])} at site {int(wrong.nonzero()[0])}; encode the text with the denoiser's own "
                "tokenizer"
            )
    return [row.to(device) for row in rows]
