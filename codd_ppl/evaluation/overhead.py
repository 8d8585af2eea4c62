"""What a coupling costs in a step of decoding beside a network of the shape of a large pretrained one.

A step writes all sites of a block after a prompt: a call of the network, the law, a draw. Steps with and without a
coupling are run in turn in one process, and

    overhead = median step with coupling / median step without - 1,

both with their draw. Where only some of the network's layers are run (the rest doesn't fit, or takes too long), that is
the overhead at this depth, too large for the whole network. What it would be with all layers is extrapolated, and said
to be: a call takes head + layers * layer, the line through calls of several depths, and a draw what it takes alone,

    overhead of the whole = (coupled draw - factorised draw) / (head + layers * layer + factorised draw).

To compare with: the paper that these couplings come from has less than 2 % more operations, and 4 to 13 % more time for
each sample, up to 27 % where tokens are drawn in any order (Li et al. 2026, arXiv:2603.00045, table 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from codd_ppl.evaluation.footprint import Footprint

__all__ = ["NetworkTime", "Overhead", "Skipped", "overhead_record", "overhead_table"]


@dataclass(frozen=True)
class NetworkTime:
    """Seconds of a call for a batch, by the number of layers that were run.

    Attributes:
        batch_size: sequences.
        layers: of the whole network.
        seconds: layers that were run -> median.
    """

    batch_size: int
    layers: int
    seconds: Mapping[int, float]

    @property
    def depth(self) -> int:
        """The most layers that were run."""
        return max(self.seconds)

    @property
    def measured(self) -> float:
        """Seconds with so many."""
        return self.seconds[self.depth]

    @property
    def layer(self) -> float:
        """Seconds of a layer: the slope of the line through all depths (least squares); at a single one, its share."""
        if len(self.seconds) < 2:
            return self.measured / self.depth
        middle = sum(self.seconds) / len(self.seconds)
        spread = sum((depth - middle) ** 2 for depth in self.seconds)
        return sum((depth - middle) * seconds for depth, seconds in self.seconds.items()) / spread

    @property
    def head(self) -> float:
        """Seconds of embedding and head: where that line begins."""
        return sum(seconds - depth * self.layer for depth, seconds in self.seconds.items()) / len(
            self.seconds
        )

    @property
    def misfit(self) -> float:
        """Largest distance of a measured time from the line, as a share of the largest time."""
        off = [abs(seconds - self.head - depth * self.layer) for depth, seconds in self.seconds.items()]
        return max(off) / self.measured

    @property
    def extrapolated(self) -> float | None:
        """Seconds with all layers, on the line; None where they were measured."""
        return None if self.layers in self.seconds else self.head + self.layers * self.layer


@dataclass(frozen=True)
class Overhead:
    """A coupling beside the network, for a batch; times are medians in seconds.

    Attributes:
        variant: the coupling and the way to draw.
        network: times of the network.
        step, coupled_step: at the depth that was measured.
        lowest, highest: overheads of single repetitions.
        draw, coupled_draw: the same without the network, from its logits.
        weight_bytes: of the coupling's tables.
        kept_bytes: of what is computed from these once and kept: logarithms, exponentials, another layout.
        footprint, coupled_footprint: of these draws.
        flops: that the coupling adds, by :meth:`codd_ppl.evaluation.overhead_variants.Variant.flops`.
        network_flops: of a call of the whole network.
    """

    variant: str
    network: NetworkTime
    step: float
    coupled_step: float
    lowest: float
    highest: float
    draw: float
    coupled_draw: float
    weight_bytes: int
    kept_bytes: int
    footprint: Footprint
    coupled_footprint: Footprint
    flops: int
    network_flops: int

    @property
    def coupling(self) -> float:
        """Seconds that the coupling adds to a draw."""
        return self.coupled_draw - self.draw

    @property
    def measured(self) -> float:
        """The overhead at the depth that was measured."""
        return self.coupled_step / self.step - 1

    @property
    def extrapolated(self) -> float | None:
        """The overhead of the whole network; None where that was measured."""
        whole = self.network.extrapolated
        return None if whole is None else self.coupling / (whole + self.draw)

    @property
    def extra_bytes(self) -> int:
        """Tables, what is kept of them, and what a coupled draw holds for a while beyond a factorised one."""
        beyond = self.coupled_footprint.peak_bytes - self.footprint.peak_bytes
        return self.weight_bytes + self.kept_bytes + max(0, beyond)

    @property
    def extra_flops(self) -> float:
        """Share of the whole network's."""
        return self.flops / self.network_flops


@dataclass(frozen=True)
class Skipped:
    """A coupling that wasn't measured, and why."""

    variant: str
    network: NetworkTime
    reason: str


def overhead_table(name: str, rows: Sequence[Overhead | Skipped]) -> Table:
    """A line for each coupling, for one network and batch size; what is extrapolated is called so.

    Columns: milliseconds that a draw takes longer, the overhead of a step, megabytes, FLOPs of matrix products as a
    share of the whole network's, and PyTorch operations, each a kernel to start on a GPU.

    Args:
        name: of the network.
        rows: one at least, of one batch size.
    """
    network = rows[0].network
    size = f"{network.depth} of {network.layers} layers"
    title = f"{name}, batch {network.batch_size}: network {_ms(network.measured)} ms with {size}"
    heads = ["adds\nms", f"measured,\n{network.depth} layers"]
    if network.extrapolated is not None:
        title += f";\nextrapolated to {network.layers} layers {_ms(network.extrapolated)} ms"
        heads.append(f"extrapolated,\n{network.layers} layers")
    skipped = [f"{row.variant} is skipped: {row.reason}" for row in rows if isinstance(row, Skipped)]
    caption = "\n".join(skipped) or None
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("coupling", no_wrap=True)
    for head in (*heads, "more\nMB", "more\nFLOPs", "more\nops"):
        table.add_column(head, justify="right")
    for row in rows:
        if isinstance(row, Overhead):
            cells = [_ms(row.coupling), f"{100 * row.measured:.1f} %"]
            cells += [] if row.extrapolated is None else [f"{100 * row.extrapolated:.2f} %"]
            cells += [f"{row.extra_bytes / 1e6:,.0f}", f"{100 * row.extra_flops:.2f} %"]
            operations = row.coupled_footprint.operations - row.footprint.operations
            table.add_row(row.variant, *cells, f"{operations:,}")
    return table


def overhead_record(row: Overhead | Skipped) -> dict[str, Any]:
    """The same as JSON values, times in seconds; nothing that is extrapolated lacks that word."""
    network = row.network
    about: dict[str, Any] = {"variant": row.variant, "batch_size": network.batch_size}
    if isinstance(row, Skipped):
        return about | {"skipped": row.reason}
    return about | {
        "layers_measured": network.depth,
        "step": row.step,
        "coupled_step": row.coupled_step,
        "overhead_measured": row.measured,
        "overhead_measured_range": [row.lowest, row.highest],
        "overhead_extrapolated": row.extrapolated,
        "draw": row.draw,
        "coupled_draw": row.coupled_draw,
        "coupling": row.coupling,
        "weight_bytes": row.weight_bytes,
        "kept_bytes": row.kept_bytes,
        "peak_bytes": row.coupled_footprint.peak_bytes,
        "peak_bytes_factorised": row.footprint.peak_bytes,
        "bytes_counted_as": row.coupled_footprint.measured,
        "flops": row.flops,
        "flops_seen_by_counter": row.coupled_footprint.flops,
        "flops_of_whole_network": row.network_flops,
        "extra_flops": row.extra_flops,
        "operations": row.coupled_footprint.operations,
        "operations_factorised": row.footprint.operations,
        "waits": row.coupled_footprint.waits,
        "waits_factorised": row.footprint.waits,
    }


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"
