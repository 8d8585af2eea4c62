"""``codd attach``: a coupling for a network that is there, from a user's text; each stage can be killed and goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from codd_ppl.attach.contextual import contextual_coupling
from codd_ppl.attach.report import report
from codd_ppl.attach.settings import AttachSettings, hash_of
from codd_ppl.attach.source import Source, open_source
from codd_ppl.attach.token_store import Rows, TokenStore
from codd_ppl.coupling import CouplingLayer
from codd_ppl.coupling_files import CONFIG
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.errors import ConfigError
from codd_ppl.folders import check_target
from codd_ppl.training.blocks import spread_blocks
from codd_ppl.training.pooling import fit_pool

__all__ = ["attach"]

JUDGED = 512
"""Held-out blocks on which the prior's likelihood is followed."""

TEXT = (
    "backbone", "fields", "prompt_fields", "answer_field", "messages_field", "plain_prompts", "length", "max_tokens"
)  # fmt: skip
"""Settings that blocks of tokens depend on ..."""

PRIOR = ("held_out", "topology", "states", "epochs", "batch_size", "smoothing", "seed")
"""... and the prior, too."""

WRITTEN = 120.0
"""Seconds between checkpoints of the prior."""

POOLED = 1 << 28
"""Numbers that the fit of a pool looks at, at most."""


def attach(settings: AttachSettings, command: str = "") -> CouplingLayer:
    """Fit a coupling for a frozen network and write it to ``settings.out``.

    1. The text becomes blocks of the network's tokens (:class:`TokenStore`).
    2. A prior is fitted to them by expectation maximisation; the network isn't run, or even loaded.
    3. With ``pool``, the weights of the pool are fitted to held-out blocks; with ``contextual``, the network says what
       it makes of ``examples`` noised blocks (:class:`FeatureCache`), and heads on its hidden states are trained on it.
    4. NELBO_T of held-out blocks, factorised and coupled, with the controls, is printed and kept in ``results.json``.

    What the stages make lies in ``settings.folder``, each under a hash of the settings that it depends on: the same
    call again goes on where the last one was, and another never takes what isn't its own. Nothing there is deleted.

    Args:
        settings: what to do.
        command: as it was typed, for the record.

    Returns:
        The coupling as it was written, in eval mode on ``settings.device``.

    Raises:
        ConfigError, DataError: a network, text or place that can't be used; before anything is written.
    """
    check_target(settings.out, CONFIG)
    source = open_source(
        settings.backbone,
        settings.revision,
        settings.trust_remote_code,
        settings.mask_token_id,
        settings.dtype,
    )
    context = settings.network_context(source.positions)
    console, device = Console(stderr=True), torch.device(settings.device)
    train, held_out = _tokens(settings, source, console)
    calibration, test = held_out.blocks[0::2], held_out.blocks[1::2]
    for name, rows in (("calibration", calibration), ("test", test)):
        if not len(rows):
            raise ConfigError(
                f"expected two held-out blocks of {settings.length} tokens, one for {name}, found "
                f"{len(held_out.blocks)}; give more text, --held-out or --valid-data"
            )
    coupling = settings.coupling(source.vocab_size)
    key = _key(settings, source)
    coupling.init_from_corpus(
        train.blocks,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        smoothing=settings.smoothing,
        seed=settings.seed,
        device=device,
        valid_blocks=spread_blocks(calibration, JUDGED),
        held_out_every=max(1, round(settings.epochs * len(train.blocks) / settings.batch_size / 10)),
        checkpoint=settings.folder / f"prior-{key}.safetensors",
        checkpoint_seconds=WRITTEN,
    )
    coupling.to(device)
    network: Denoiser | None = None
    if settings.pool or settings.contextual or settings.blocks:
        console.print(f"loading {source.name}")
        network = source.load(device)
    if settings.pool:
        assert network is not None
        sites = max(64, min(8192, POOLED // (3 * source.vocab_size)))
        before = None
        if context:
            before = held_out.context(torch.arange(0, len(held_out.blocks), 2), context, source.pad_token_id)
        fit = fit_pool(
            network, coupling, calibration.long(), sites=sites, seed=settings.seed, contexts=before
        )
        console.print(f"bits per masked token of held-out text at mask ratios {_row(fit.knots)}:")
        for name in ("network", "prior", "pooled"):
            console.print(f"  {name}: {_row(getattr(fit, name))}")
    if settings.contextual:
        assert network is not None
        coupling = contextual_coupling(settings, source, network, coupling, train, context, key, console)
    dtype = torch.float16 if settings.weights == "float16" else None
    notes = _notes(settings, train, command)
    coupling.save_pretrained(settings.out, settings.backbone, source.tokenizer, notes, dtype)
    done = CouplingLayer.from_pretrained(settings.out, tokenizer=source.tokenizer).to(device)
    size = sum(path.stat().st_size for path in settings.out.iterdir())
    console.print(f"{settings.out}: {size / 1e6:.1f} MB; {settings.folder} can be deleted")
    if network is not None and settings.blocks:
        report(settings, source, network, done, held_out, context, command)
    return done


def _tokens(settings: AttachSettings, source: Source, console: Console) -> tuple[Rows, Rows]:
    """Training and held-out blocks."""
    about = [[getattr(settings, name) for name in TEXT], source.end]
    kept: dict[str, TokenStore] = {}
    for name, files in (("train", settings.data), ("held_out", settings.valid_data)):
        if files:
            share = 0.0 if name == "held_out" or settings.valid_data else settings.held_out
            key = hash_of([*about, share, [_stamp(file) for file in files]])
            kept[name] = TokenStore(
                settings.folder / f"tokens-{key}",
                source.tokenizer,
                settings.length,
                source.end,
                settings.answers,
                share,
                settings.max_tokens if name == "train" else 1_000_000,
            )
            _build(kept[name], settings, source, files, console)
    train = kept["train"].part("train")
    return train, kept["held_out"].part("train") if "held_out" in kept else kept["train"].part("held_out")


def _build(
    store: TokenStore, settings: AttachSettings, source: Source, files: Sequence[str], console: Console
) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tokens]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(
            f"tokens of {', '.join(Path(file).name for file in files)}", total=None, tokens=""
        )
        for tokens in store.build(settings.reader(source.chat).read(list(files))):
            bar.update(task, tokens=f"{tokens:,}")


def _row(numbers: Sequence[float]) -> str:
    return "  ".join(f"{number:.2f}" for number in numbers)


def _key(settings: AttachSettings, source: Source) -> str:
    """A hash of what the prior depends on."""
    files = [_stamp(file) for file in (*settings.data, *settings.valid_data)]
    return hash_of([[getattr(settings, name) for name in (*TEXT, *PRIOR)], files, source.end])


def _stamp(file: str) -> list[Any]:
    """A file's place, size and date; of what isn't a file, its name."""
    path = Path(file)
    if not path.is_file():
        return [file]
    return [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]


def _notes(settings: AttachSettings, train: Rows, command: str) -> dict[str, Any]:
    """What the file says of how it was made."""
    notes = {
        "made by": command or "codd_ppl.attach",
        "text": [Path(file).name for file in settings.data],
        "tokens": train.blocks.numel(),
        "epochs": settings.epochs,
        "seed": settings.seed,
    }
    if settings.sharpen != 1.0:
        notes["sharpen"] = settings.sharpen
    return cast(dict[str, Any], json.loads(json.dumps(notes)))
