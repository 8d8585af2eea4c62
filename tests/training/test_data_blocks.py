"""Blocks and batches: every block once, seeded orders, random starts, and shares of several processes."""

import pytest
import torch

from codd_ppl.errors import ConfigError, DataError
from codd_ppl.training.blocks import BlockLoader, cut_blocks

TOKENS = torch.arange(103)


def starts(loader: BlockLoader) -> list[int]:
    """The first token of each block of a pass: with TOKENS, where it starts."""
    batches = list(loader)
    assert len(batches) == len(loader)
    blocks = torch.cat(batches)
    assert torch.equal(blocks, blocks[:, :1] + torch.arange(loader.block_length))
    return blocks[:, 0].tolist()


def test_blocks_in_order() -> None:
    blocks = cut_blocks(TOKENS, 10)
    assert blocks.shape == (10, 10) and torch.equal(blocks.flatten(), TOKENS[:100])
    batches = list(BlockLoader(TOKENS, 10, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2] and torch.equal(torch.cat(batches), blocks)


def test_shuffled_blocks_come_once_and_in_a_new_order() -> None:
    loader = BlockLoader(TOKENS, 10, 4, shuffle=True, seed=5)
    first, second = starts(loader), starts(loader)
    assert sorted(first) == sorted(second) == list(range(0, 100, 10)) and first != second
    again = BlockLoader(TOKENS, 10, 4, shuffle=True, seed=5)
    again.set_epoch(1)
    assert starts(again) == second
    again.set_epoch(0)
    assert starts(again) == first
    assert starts(BlockLoader(TOKENS, 10, 4, shuffle=True, seed=6)) != first


def test_the_order_is_made_with_the_first_batch() -> None:
    """Lightning calls iter() early, and set_epoch() before it asks for a batch."""
    loader = BlockLoader(TOKENS, 10, 4, shuffle=True)
    early = iter(loader)
    loader.set_epoch(3)
    late = BlockLoader(TOKENS, 10, 4, shuffle=True)
    late.set_epoch(3)
    assert torch.equal(torch.cat(list(early)), torch.cat(list(late)))


def test_random_starts_reach_every_place() -> None:
    loader = BlockLoader(TOKENS, 10, 4, shuffle=True, random_offsets=True)
    seen = [starts(loader) for _ in range(100)]
    assert all(len(some) == 10 for some in seen)
    assert {start for some in seen for start in some} == set(range(94))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("replicas", [2, 3, 10, 13])
def test_processes_share_a_pass(replicas: int, shuffle: bool) -> None:
    loaders = [
        BlockLoader(TOKENS, 10, 4, shuffle=shuffle, rank=r, replicas=replicas) for r in range(replicas)
    ]
    shares = [starts(loader) for loader in loaders]
    assert len({len(share) for share in shares}) == 1
    together = [start for share in shares for start in share]
    assert set(together) == set(range(0, 100, 10)) and len(together) - 10 < replicas


def test_batches_are_copies() -> None:
    tokens = TOKENS.clone()
    for batch in BlockLoader(tokens, 10, 4):
        batch.zero_()
    assert torch.equal(tokens, TOKENS)


def test_settings_that_make_no_batches() -> None:
    with pytest.raises(DataError, match="block_length = 104 tokens, found 103"):
        BlockLoader(TOKENS, 104, 1)
    with pytest.raises(ConfigError, match="batch_size >= 1, found 0"):
        BlockLoader(TOKENS, 10, 0)
    with pytest.raises(ConfigError, match="random_offsets needs shuffle"):
        BlockLoader(TOKENS, 10, 1, random_offsets=True)
