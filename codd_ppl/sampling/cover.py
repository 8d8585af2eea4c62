"""Windows of one length that cover a set of sites: as few as possible, or in step with a place."""

from dataclasses import dataclass

import torch

from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.typing import Bool, Int, Tensor

__all__ = ["Cover", "aligned_cover", "minimum_cover"]


@dataclass(frozen=True)
class Cover:
    """Windows over the rows of a batch, in one flat list; each site of the set belongs to exactly one of them.

    Attributes:
        row: (windows,) int64, the row that a window lies in.
        start: (windows,) int64, its first site.
        chosen: (windows, length) bool, the sites of the set that belong to it.
    """

    row: Int[Tensor, " windows"]
    start: Int[Tensor, " windows"]
    chosen: Bool[Tensor, "windows length"]

    @property
    def place(self) -> Int[Tensor, "windows length"]:
        """The sites of every window."""
        return self.start[:, None] + torch.arange(self.chosen.shape[1], device=self.start.device)


def minimum_cover(sites: Bool[Tensor, "rows sites"], length: int) -> Cover:
    """Cover the sites of every row by as few windows of ``length`` neighbouring sites as possible.

    From left to right, each window takes the leftmost site that is left and all others within its length: the greedy
    cover of points by intervals is minimal. A window is then moved, within the text, so that the sites it took are in
    its middle, with as much text on either side. All rows are worked on at once; the loop is over windows along a row.

    Args:
        sites: the set to cover, each row its own; rows may be empty.
        length: sites of a window, at most those of a row.

    Raises:
        ConfigError: a length below 1, or beyond the sites of a row.
    """
    total = sites.shape[-1]
    if not 1 <= length <= total:
        raise ConfigError(f"length: expected 1 to {total}, the sites of a row, found {length}; shorten it")
    place = torch.arange(total, device=sites.device)
    within = torch.arange(length, device=sites.device)
    left = sites.clone()
    row, start, chosen = [place.new_zeros(0)], [place.new_zeros(0)], [sites.new_zeros(0, length)]
    while bool(left.any()):
        here = left.any(-1).nonzero()[:, 0]
        open_ = left[here]
        first = open_.long().argmax(-1)
        taken = open_ & (place < first[:, None] + length)
        last = total - 1 - taken.flip(-1).long().argmax(-1)
        slack = length - 1 - (last - first)
        begin = (first - slack // 2).clamp(0, total - length)
        row.append(here)
        start.append(begin)
        chosen.append(taken.gather(-1, begin[:, None] + within))
        left[here] = open_ & ~taken
    return Cover(torch.cat(row), torch.cat(start), torch.cat(chosen))


def aligned_cover(
    sites: Bool[Tensor, "rows sites"],
    length: int,
    start: Int[Tensor, " rows"],
    most: int | None = None,
) -> Cover:
    """Cover the sites of every row, from its ``start`` on, by the blocks start + k length, k = 0, 1, ..

    Blocks that hold no site of the set are left out. One that the end of the row cuts short is the last part of a
    window that ends there, so that every window has ``length`` sites, and chooses among its own only.

    Args:
        sites: the set to cover, each row its own; sites before ``start`` are left out.
        length: sites of a block, at most those of a row.
        start: first site of the first block.
        most: largest number of blocks in a row, from the left; what lies beyond isn't covered. None: all.

    Raises:
        ConfigError: a length below 1, or beyond the sites of a row.
        ShapeError: another number of starts than rows.
    """
    rows, total = sites.shape
    if not 1 <= length <= total:
        raise ConfigError(f"length: expected 1 to {total}, the sites of a row, found {length}; shorten it")
    if start.shape != (rows,):
        raise ShapeError(f"start: expected ({rows},), one for each row, found {tuple(start.shape)}")
    place = torch.arange(total, device=sites.device)
    blocks = -(-total // length)
    number = (place - start[:, None]).div(length, rounding_mode="floor")
    holds = sites.new_zeros(rows, blocks + 1).scatter(
        1, torch.where(sites & (number >= 0), number, blocks), True
    )[:, :blocks]
    if most is not None:
        holds &= holds.cumsum(-1) <= most
    row, block = holds.nonzero(as_tuple=True)
    begin = start[row] + block * length
    first = begin.clamp_max(total - length)
    window = first[:, None] + torch.arange(length, device=sites.device)
    return Cover(row, first, sites[row[:, None], window] & (window >= begin[:, None]))
