"""Batches of blocks cut from one long row of tokens that lies in memory.

A plain iterable instead of a ``torch.utils.data.DataLoader``: one indexing operation makes a batch, so
worker processes would only add work, and Lightning asks for them on every machine with many cores.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from codd_ppl.errors import ConfigError, DataError
from codd_ppl.typing import Int, Tensor

__all__ = ["BlockLoader", "cut_blocks", "spread_blocks"]


def cut_blocks(tokens: Int[Tensor, "tokens"], block_length: int) -> Int[Tensor, "blocks sites"]:
    """Consecutive blocks of ``block_length`` tokens; what is left over at the end is dropped."""
    count = len(tokens) // block_length
    return tokens[: count * block_length].view(count, block_length)


def spread_blocks(blocks: Int[Tensor, "blocks sites"], count: int) -> Int[Tensor, "some sites"]:
    """At most ``count`` blocks, evenly spread over the text."""
    if len(blocks) <= count:
        return blocks
    return blocks[torch.linspace(0, len(blocks) - 1, count).round().long()]


class BlockLoader:
    """Batches (batch, sites) of blocks: every block once per pass, the last batch may be smaller.

    With ``shuffle`` the order is a new one in each pass, and a function of ``seed`` and the number of the
    pass alone (so a resumed run goes on as it would have). With ``random_offsets`` too, a pass draws as
    many blocks as there are, but each starts anywhere in the text instead of at a multiple of the length.

    ``replicas`` processes share a pass: process ``rank`` takes every ``replicas``-th block of the same
    order, and the order starts again from the front until all have equally many.

    Raises:
        ConfigError: ``batch_size`` below 1, or ``random_offsets`` without ``shuffle``.
        DataError: fewer tokens than one block.
    """

    def __init__(
        self,
        tokens: Int[Tensor, "tokens"],
        block_length: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        random_offsets: bool = False,
        seed: int = 0,
        rank: int = 0,
        replicas: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"expected batch_size >= 1, found {batch_size}")
        if random_offsets and not shuffle:
            raise ConfigError("random_offsets needs shuffle: blocks in order have no random start")
        if len(tokens) < block_length:
            raise DataError(f"expected at least block_length = {block_length} tokens, found {len(tokens)}")
        self.windows = tokens.unfold(0, block_length, 1)  # every stretch of block_length tokens, as a view
        self.blocks = len(tokens) // block_length
        self.block_length = block_length
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.random_offsets = random_offsets
        self.seed = seed
        self.rank = rank
        self.replicas = replicas
        self.epoch = 0
        self._done = 0  # batches of the current pass that were taken
        self._skip = 0  # batches of the next pass that were taken before a checkpoint
        if shuffle:
            self.sampler = self  # Lightning calls sampler.set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Which pass comes next; without this call, passes are counted."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Where the current pass stands, for Lightning's checkpoints."""
        return {"done": self._done % max(1, len(self))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on in the middle of a pass: the batches that were taken already are left out once."""
        self._skip = state["done"]

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.blocks / self.replicas) / self.batch_size)

    def __iter__(self) -> Iterator[Int[Tensor, "batch sites"]]:
        # A generator on purpose: the order is made when the first batch is asked for, not before, since
        # Lightning calls iter() long before set_epoch().
        starts = torch.from_numpy(self._starts())
        self.epoch += 1
        skip, self._skip = self._skip, 0
        self._done = skip
        for some in starts.split(self.batch_size)[skip:]:
            self._done += 1
            yield self.windows[some]

    def _starts(self) -> np.ndarray:
        """Where the blocks of this pass and this process start."""
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.random_offsets:
            starts = rng.integers(0, len(self.windows), size=self.blocks)
        else:
            order = rng.permutation(self.blocks) if self.shuffle else np.arange(self.blocks)
            starts = order * self.block_length
        return np.resize(starts, math.ceil(self.blocks / self.replicas) * self.replicas)[
            self.rank :: self.replicas
        ]
