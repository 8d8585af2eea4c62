"""Blocks that a frozen teacher writes one token at a time, kept in a file that can be added to."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.denoisers.running import device_of
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.fingerprint import fingerprint
from codd_ppl.graphs import topologies
from codd_ppl.sampling import RandomOrder, Sampler
from codd_ppl.spanning_tree_coupling import SpanningTreeCoupling
from codd_ppl.typing import Int, Tensor

__all__ = ["SampledBlocks"]

FORMAT = "codd_ppl sampled blocks 1"
SAVE_SECONDS = 30.0
"""What was drawn is written at most this long after; a power cut costs no more."""


class SampledBlocks:
    """Blocks x with the law of the teacher's one-token-at-a-time generation,

        p(x) = E_order prod_i p(x_order(i) | x_order(1), .., x_order(i-1)),    order a uniformly random permutation,

    where no token is drawn beside another one (:class:`codd_ppl.Sampler` with ``random_order`` and as many steps as
    sites: so many network calls a chunk).

    ``path`` holds the tokens (safetensors, ``blocks``) and, in its metadata, what made them. Chunk k is a function of
    teacher, ``seed`` and k alone (on one kind of device), and what was drawn is kept when drawing is interrupted: going
    on, or asking for more blocks later, gives what one uninterrupted run gives. The file is replaced by renaming.

    Args:
        path: where the blocks are kept; ends in .safetensors.
        denoiser: the network, in whatever mode; it is run in eval mode without gradient.
        coupling: of the teacher, on the same device; None: the network alone.
        sites: tokens of a block; those of the coupling by default.
        seed: of all draws.
        chunk_size: blocks that are drawn at once.

    Raises:
        ConfigError: a setting out of range, sizes that differ, or a teacher that isn't an ``nn.Module``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        denoiser: nn.Module,
        coupling: CouplingLayer | SpanningTreeCoupling | None = None,
        sites: int | None = None,
        seed: int = 0,
        chunk_size: int = 256,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix != ".safetensors":
            raise ConfigError(f"expected a path that ends in .safetensors, found {self.path}; rename it")
        if chunk_size < 1 or seed < 0:
            raise ConfigError(f"expected chunk_size >= 1 and seed >= 0, found {chunk_size} and {seed}")
        for part in (denoiser, coupling):
            if part is not None and not isinstance(part, nn.Module):
                raise ConfigError(
                    f"expected an nn.Module, whose weights tell one teacher from another, found {type(part).__name__}"
                )
        self.denoiser = cast(Denoiser, denoiser)
        if coupling is None:
            if sites is None or sites < 1:
                raise ConfigError(f"expected sites >= 1 for a teacher without a coupling, found {sites}")
            vocab = self.denoiser.vocab_size
            whole: CouplingLayer | SpanningTreeCoupling = CouplingLayer(
                topologies.independent(sites, vocab), vocab
            )
        else:
            whole = coupling
        if sites not in (None, whole.sites):
            raise ConfigError(
                f"expected sites = {whole.sites} as in the coupling's graph, found {sites}; leave sites out"
            )
        self.coupling, self.sites, self.seed, self.chunk_size = coupling, whole.sites, seed, chunk_size
        self.sampler = Sampler(self.denoiser, whole, RandomOrder(), steps=whole.sites)

    def settings(self) -> dict[str, Any]:
        """What the blocks follow from: compared with what the file says before anything is drawn or used."""
        return {
            "sites": self.sites,
            "vocab_size": self.denoiser.vocab_size,
            "seed": self.seed,
            "chunk_size": self.chunk_size,
            "denoiser": fingerprint(cast(nn.Module, self.denoiser)),
            "coupling": None if self.coupling is None else fingerprint(self.coupling),
        }

    def draw(self, count: int, progress: bool = False) -> Int[Tensor, "blocks sites"]:
        """The first ``count`` blocks, int64 on the CPU: those of the file, and what it lacks drawn and added to it.

        Args:
            count: how many; a few more may be kept, as chunks are kept whole.
            progress: show a progress bar on standard error.

        Raises:
            ConfigError: ``count`` below 1.
            DataError: the file is damaged, or of another teacher or other settings; nothing is changed.
        """
        if count < 1:
            raise ConfigError(f"expected at least 1 block, found {count}")
        settings = self.settings()
        chunks = [self._read(settings)]
        rows = kept = len(chunks[0])
        clock = time.monotonic()
        with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
            task = bar.add_task("blocks of the teacher", total=count, completed=rows)
            try:
                while rows < count:
                    chunks.append(self._chunk(rows // self.chunk_size))
                    rows += self.chunk_size
                    bar.update(task, completed=rows)
                    if time.monotonic() - clock > SAVE_SECONDS:
                        kept, clock = self._save(torch.cat(chunks), settings), time.monotonic()
            finally:  # Ctrl-C and errors of the teacher included
                if rows > kept:
                    self._save(torch.cat(chunks), settings)
        return torch.cat(chunks)[:count]

    def _chunk(self, number: int) -> Int[Tensor, "blocks sites"]:
        device = device_of(self.denoiser, torch.device("cpu"))
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + number)
        template = torch.full((self.chunk_size, self.sites), self.denoiser.mask_token_id)
        return self.sampler.generate(template, generator).tokens.cpu()

    # --- the file ---------------------------------------------------------------------------------------

    def _read(self, settings: Mapping[str, Any]) -> Int[Tensor, "blocks sites"]:
        """All blocks of the file, whole chunks; none where there is no file."""
        if not self.path.exists():
            return torch.zeros(0, self.sites, dtype=torch.int64)
        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                known, there, digest = about["format"], dict(about["settings"]), about["sha256"]
                blocks = file.get_tensor("blocks")
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise self._refuse(
                f"it is damaged, or holds something else ({type(error).__name__}: {error})"
            ) from error
        if known != FORMAT:
            raise self._refuse(f"it has the format {known!r}, not {FORMAT!r}")
        other = [
            f"{name} = {there.get(name)!r} there, {settings.get(name)!r} now"
            for name in {**settings, **there}
            if there.get(name) != settings.get(name)
        ]
        if other:
            raise self._refuse(f"it was made otherwise: {'; '.join(other)}")
        if _digest(blocks) != digest:
            raise self._refuse("it is damaged (its tokens are not those that were written)")
        return blocks.long()

    def _refuse(self, why: str) -> DataError:
        return DataError(
            f"{self.path}: expected blocks of this teacher and these settings, but {why}; nothing was changed: give "
            "another path, bring back teacher and settings, or delete the file to draw anew"
        )

    def _save(self, blocks: Int[Tensor, "blocks sites"], settings: Mapping[str, Any]) -> int:
        """Write all blocks, unless another process has written as many; the number that the file has now."""
        there = len(self._read(settings))
        if there >= len(blocks):
            return there
        small = blocks.to(torch.int16 if self.denoiser.vocab_size <= 2**15 else torch.int32)
        about = json.dumps({"format": FORMAT, "settings": settings, "sha256": _digest(small)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            save_file({"blocks": small}, draft, {"about": about})
            os.replace(draft, self.path)
        finally:
            draft.unlink(missing_ok=True)
        return len(blocks)


def _digest(blocks: Tensor) -> str:
    return hashlib.sha256(blocks.contiguous().numpy().data).hexdigest()
