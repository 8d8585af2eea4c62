"""``codd attach``: a coupling for a network that is there, from a user's text; each stage can be killed and goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from codd_ppl.attach.cached_module import CachedModule
from codd_ppl.attach.features import FeatureCache
from codd_ppl.attach.report import report
from codd_ppl.attach.settings import AttachSettings
from codd_ppl.attach.source import Source, open_source
from codd_ppl.attach.token_store import Rows, TokenStore
from codd_ppl.coupling import CouplingLayer
from codd_ppl.coupling_files import CONFIG
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.errors import ConfigError
from codd_ppl.folders import check_target
from codd_ppl.potentials import ContextualLatentPotentials, LatentPotentials
from codd_ppl.potentials.statistics import log_unigram
from codd_ppl.training.blocks import spread_blocks
from codd_ppl.training.pooling import fit_pool
from codd_ppl.typing import Int, Tensor

__all__ = ["attach"]

JUDGED = 512
"""Held-out blocks on which the prior's likelihood is followed."""

TEXT = (
    "backbone", "fields", "prompt_fields", "answer_field", "messages_field", "plain_prompts", "length", "max_tokens"
)  # fmt: skip
"""Settings that blocks of tokens depend on ..."""

PRIOR = ("held_out", "topology", "states", "epochs", "batch_size", "smoothing", "seed")
"""... and the prior, too."""

WRITTEN, KEPT = 120.0, 50
"""Seconds between checkpoints of the prior, and updates between those of the contextual part."""

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
        coupling = _contextual(settings, source, network, coupling, train, context, console)
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
            key = _hash([*about, share, [_stamp(file) for file in files]])
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


def _contextual(
    settings: AttachSettings,
    source: Source,
    network: Denoiser,
    coupling: CouplingLayer,
    train: Rows,
    context: int,
    console: Console,
) -> CouplingLayer:
    """The coupling with evidence of its latents from hidden states, trained on cached features."""
    steps = [T for T in (2, 4, 8, 16) if settings.length > T] or [1]
    made = (settings.examples, settings.top_k, settings.reduced, context, settings.seed, settings.dtype)
    key = _hash([_key(settings, source), made])
    cache = FeatureCache(
        settings.folder / f"features-{key}",
        settings.examples,
        steps,
        min(settings.top_k, source.vocab_size),
        settings.reduced,
        context,
        settings.seed,
    )
    size = cache.size(settings.length, network.hidden_size)
    console.print(f"features of {settings.examples:,} blocks: about {size / 1e6:,.0f} MB in {cache.path}")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("features", total=settings.examples)
        for done in cache.build(network, train, source.pad_token_id, settings.network_batch):
            bar.update(task, completed=done)
    components = cache.components(network.hidden_size)
    trained = settings.coupling(source.vocab_size, components)
    _take(trained, coupling)
    _train(settings, trained, train.blocks, cache, key)
    reduction = cache.reduction()
    result = settings.coupling(source.vocab_size, network.hidden_size, 0 if reduction is None else components)
    state = trained.state_dict()
    if reduction is not None:
        state["potentials.reduction"] = reduction
    result.load_state_dict(state)
    return result.to(settings.device).eval()


def _take(contextual: CouplingLayer, static: CouplingLayer) -> None:
    """The tables and the pool of a static coupling, which are not trained on."""
    potentials = cast(ContextualLatentPotentials, contextual.potentials)
    tables = cast(LatentPotentials, static.potentials)
    potentials.static.load_state_dict(tables.state_dict())
    potentials.static.requires_grad_(False)
    if contextual.pool is not None and static.pool is not None:
        contextual.pool.load_state_dict(static.pool.state_dict())
        contextual.pool.requires_grad_(False)


def _train(
    settings: AttachSettings,
    coupling: CouplingLayer,
    blocks: Int[Tensor, "n sites"],
    cache: FeatureCache,
    key: str,
) -> None:
    """Train what isn't frozen, from the last checkpoint if there is one."""
    unigram = log_unigram(spread_blocks(blocks, 100_000), coupling.vocab_size)
    module = CachedModule(coupling, unigram, cache)
    folder = settings.folder / f"contextual-{key}-{settings.updates}-{'gates' if settings.gates else 'plain'}"
    keep = ModelCheckpoint(dirpath=folder, every_n_train_steps=KEPT, save_last=True, save_top_k=0)
    trainer = L.Trainer(
        max_steps=settings.updates,
        accelerator="cpu" if settings.device == "cpu" else "auto",
        devices=settings.devices,
        callbacks=[keep],
        logger=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, ckpt_path=last if last.exists() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if not trainer.is_global_zero:  # the first process goes on alone
        raise SystemExit(0)


def _row(numbers: Sequence[float]) -> str:
    return "  ".join(f"{number:.2f}" for number in numbers)


def _key(settings: AttachSettings, source: Source) -> str:
    """A hash of what the prior depends on."""
    files = [_stamp(file) for file in (*settings.data, *settings.valid_data)]
    return _hash([[getattr(settings, name) for name in (*TEXT, *PRIOR)], files, source.end])


def _stamp(file: str) -> list[Any]:
    """A file's place, size and date; of what isn't a file, its name."""
    path = Path(file)
    if not path.is_file():
        return [file]
    return [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]


def _hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


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
