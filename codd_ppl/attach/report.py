"""What the coupling gains on held-out blocks, beside what it must beat, printed and kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich import print as rich_print
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from codd_ppl import __version__
from codd_ppl.attach.settings import AttachSettings
from codd_ppl.attach.source import Source
from codd_ppl.attach.token_store import Rows
from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.evaluation import (
    MarginalsAlone,
    PriorAlone,
    Sharpened,
    nelbo_table,
    time_network,
    time_sampling,
)
from codd_ppl.evaluation.machine import describe_device
from codd_ppl.evaluation.parts import describe_coupling, describe_network
from codd_ppl.evaluation.record import Row, evaluation_record, save_record
from codd_ppl.training.blocks import spread_blocks

__all__ = ["report", "summary"]

SHARPER = 0.8
TIMED = 8
"""Sequences at a time."""


def report(
    settings: AttachSettings,
    source: Source,
    network: Denoiser,
    coupling: CouplingLayer,
    held_out: Rows,
    context: int,
    command: str,
) -> None:
    """NELBO_T of the network alone, coupled, and of the controls (DESIGN section 8): the coupling's marginals drawn
    independently, its prior alone, the network's logits sharpened; and how many factorised steps take the same time.

    Blocks are every second held-out one: the others may have calibrated the pool. The record goes beside the coupling,
    as ``results.json``, for ``codd card``.
    """
    chosen = spread_blocks(torch.arange(1, len(held_out.blocks), 2)[:, None], settings.blocks)[:, 0]
    blocks = held_out.blocks[chosen].long()
    contexts = held_out.context(chosen, context, source.pad_token_id) if context else None
    coupled = network if settings.sharpen == 1.0 else Sharpened(network, settings.sharpen)
    rows = {
        "factorised": Row((network, None), "factorised", None, {"network": describe_network(network)}),
        "coupled": Row(
            (coupled, coupling), "coupled", "factorised", {"coupling": describe_coupling(coupling)}
        ),
        "marginals alone": Row((coupled, MarginalsAlone(coupling)), "control", "factorised"),
        "prior alone": Row((network, PriorAlone(coupling)), "control", "factorised"),
        f"sharpened {SHARPER}": Row((Sharpened(network, SHARPER), None), "control", "factorised"),
    }
    models = {name: row.model for name, row in rows.items()}
    batch = settings.network_batch
    table = nelbo_table(
        models, blocks, seed=settings.seed, batch_size=batch, draws=2, progress=True, contexts=contexts
    )
    calls = {}
    if settings.timing > 0:
        found = time_sampling(
            models,
            table.steps,
            settings.length,
            TIMED,
            budget=settings.timing,
            seed=settings.seed,
            progress=True,
        )
        table = table.with_seconds(found, timing_batch_size=TIMED)
        calls = {"factorised": time_network(network, settings.length, TIMED)}
    record = evaluation_record(
        table,
        rows,
        command=command,
        device=describe_device(torch.device(settings.device)),
        versions={"codd_ppl": __version__, "torch": str(torch.__version__)},
        text={
            "files": [str(file) for file in settings.valid_data or settings.data],
            "blocks": len(blocks),
            "tokens": held_out.blocks.numel(),
            "context": context,
        },
        vocab=source.vocab_size,
        network_seconds=calls,
    )
    save_record(record, settings.out / "results.json")
    rich_print(summary(record))


def summary(record: Mapping[str, Any]) -> RenderableType:
    """The models' bits at each number of steps, by how much the coupled ones are below, and what the time buys.

    Args:
        record: of :func:`codd_ppl.evaluation.record.evaluation_record`, with a row "coupled".
    """
    models, steps = record["models"], list(record["models"]["coupled"]["nelbo"])
    table = Table(
        title=f"NELBO_T, bits per token, {record['text']['blocks']} held-out blocks", box=SIMPLE_HEAD
    )
    table.add_column("T", no_wrap=True)
    for T in steps:
        table.add_column(T, justify="right")
    for name, row in models.items():
        table.add_row(name, *(f"{row['nelbo'][T]['bits_per_token']:.3f}" for T in steps))
    gains = [row["relative_gain"] for row in models["coupled"]["nelbo"].values()]
    table.add_row("coupled: change in %", *(f"{-100 * gain[0]:+.1f}" for gain in gains))
    table.add_row("  95 %: from", *(f"{-100 * high:+.1f}" for _, _, high in gains))
    table.add_row("  to", *(f"{-100 * low:+.1f}" for _, low, _ in gains))
    lines = []
    if (same := models["coupled"].get("in_the_same_time")) is not None:
        lines.append(
            f"In the time of {same['T']} coupled steps the factorised model makes {same['steps']:.1f}: "
            f"{same['bits_per_token']:.3f} bits per token."
        )
    return Group(table, *lines)
