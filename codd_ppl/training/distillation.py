"""Distillation: train on what a frozen teacher writes one token at a time, instead of on text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tokenizers import Tokenizer
from torch import nn

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers.running import device_of
from codd_ppl.errors import ConfigError
from codd_ppl.spanning_tree_coupling import SpanningTreeCoupling
from codd_ppl.training.blocks import BlockLoader
from codd_ppl.training.sampled_blocks import SampledBlocks
from codd_ppl.training.tokenizer import read_tokenizer
from codd_ppl.typing import Int, Tensor

__all__ = ["DistillationDataModule"]


class DistillationDataModule(L.LightningDataModule):
    """Blocks of a teacher's own (:class:`SampledBlocks`) in the place of text; batches are x0, int64 (batch, sites).

    The loss of :class:`codd_ppl.CoDDModule` on these blocks bounds the cross-entropy of the T-step sampler on what the
    teacher writes in ``sites`` steps (at T = 1 it is that cross-entropy): the coupling learns to say in few steps what
    the network says in many. No text is needed. In a recipe::

        data:
          class_path: codd_ppl.training.DistillationDataModule
          init_args:
            denoiser: {class_path: codd_ppl.model_folder.load_denoiser, init_args: {path: runs/NAME/model}}
            block_length: 64
            path: runs/NAME/blocks.safetensors
            tokenizer: runs/NAME/model/tokenizer.json

    Blocks are drawn on first use; the validation blocks come first in the file, so that a larger ``count`` later adds
    training blocks and changes none.

    Args:
        denoiser: of the teacher. Don't train the same object: a teacher that changed is refused.
        path: of the blocks, .safetensors; what is there already is used if this teacher made it.
        coupling: of the teacher; None: the network alone.
        block_length: sites of a block; those of the coupling by default.
        count: training blocks.
        valid_count: validation blocks.
        batch_size: blocks of a batch.
        tokenizer: of the network's text, for the model folder: a ``tokenizer.json`` or a ``tokenizers.Tokenizer``.
        seed: of the draws and of the order of the training blocks.
        chunk_size: blocks that the teacher writes at once.
        device: where the teacher writes, such as "cuda"; None: where it is. It is brought back.

    Raises:
        ConfigError: a setting out of range, or sizes that differ.
        DataError: in :meth:`setup`, a file of another teacher, a damaged one, or no tokenizer.json.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        path: str | os.PathLike[str],
        coupling: CouplingLayer | SpanningTreeCoupling | None = None,
        block_length: int | None = None,
        count: int = 16384,
        valid_count: int = 512,
        batch_size: int = 64,
        tokenizer: str | Tokenizer | None = None,
        seed: int = 0,
        chunk_size: int = 256,
        device: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("count", count), ("valid_count", valid_count), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"expected {name} >= 1, found {value}")
        self.source = SampledBlocks(path, denoiser, coupling, block_length, seed, chunk_size)
        self.path = self.source.path
        self.block_length: int = self.source.sites
        self.count, self.valid_count, self.batch_size = count, valid_count, batch_size
        self.seed, self.device = seed, device
        self._tokenizer_setting = tokenizer
        self._blocks: Tensor | None = None

    # --- Lightning ------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Called in one process per machine, so that the others find the blocks in the file."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Reads the blocks and lets the teacher write those that are lacking; a second call does nothing."""
        if self._blocks is None:
            _ = self.tokenizer  # a wrong one is found at once
            shown = self.trainer is None or self.trainer.progress_bar_callback is not None
            rank_zero_info(f"{self.path}: {self.valid_count + self.count} blocks of the teacher")
            with _moved((self.source.sampler.denoiser, self.source.sampler.coupling), self.device):
                self._blocks = self.source.draw(self.valid_count + self.count, progress=shown)

    def train_dataloader(self) -> BlockLoader:
        """Shuffled batches of training blocks."""
        return self._loader(self.train_blocks(), shuffle=not getattr(self.trainer, "overfit_batches", 0))

    def val_dataloader(self) -> BlockLoader:
        """Batches of validation blocks, in their order."""
        return self._loader(self.valid_blocks(), shuffle=False)

    # --- what the teacher wrote -----------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the teacher."""
        return self.source.denoiser.vocab_size

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was given, if any.

        Raises:
            DataError: no such file, or it isn't a tokenizer's.
            ConfigError: it has another number of tokens than the teacher.
        """
        setting = self._tokenizer_setting
        if isinstance(setting, str):
            setting = self._tokenizer_setting = read_tokenizer(setting)
        if setting is not None and setting.get_vocab_size() != self.vocab_size:
            raise ConfigError(
                f"the tokenizer has {setting.get_vocab_size()} tokens, expected {self.vocab_size} as the teacher; give "
                "the one that the teacher was trained with"
            )
        return setting

    def train_blocks(self) -> Int[Tensor, "blocks sites"]:
        """The training blocks, in the order of drawing."""
        return self._drawn()[self.valid_count :]

    def valid_blocks(self) -> Int[Tensor, "blocks sites"]:
        """The validation blocks, drawn before those."""
        return self._drawn()[: self.valid_count]

    def _drawn(self) -> Tensor:
        self.setup()
        assert self._blocks is not None
        return self._blocks

    def _loader(self, blocks: Tensor, shuffle: bool) -> BlockLoader:
        return BlockLoader(
            blocks.flatten(),
            self.block_length,
            self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            replicas=1 if self.trainer is None else self.trainer.world_size,
        )


@contextmanager
def _moved(parts: Sequence[object], device: str | None) -> Iterator[None]:
    """Modules on another device for a while; where they are if that is None."""
    modules = [part for part in parts if isinstance(part, nn.Module)] if device else []
    homes = [device_of(module, torch.device("cpu")) for module in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)
