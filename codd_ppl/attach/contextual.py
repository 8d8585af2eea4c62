"""The second stage of attaching: evidence of the latents from hidden states, trained on cached features."""

from __future__ import annotations

from typing import cast

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.progress import Progress

from codd_ppl.attach.cached_module import CachedModule
from codd_ppl.attach.features import FeatureCache
from codd_ppl.attach.settings import AttachSettings, hash_of
from codd_ppl.attach.source import Source
from codd_ppl.attach.token_store import Rows
from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.potentials import ContextualLatentPotentials, LatentPotentials
from codd_ppl.potentials.statistics import log_unigram
from codd_ppl.training.blocks import spread_blocks
from codd_ppl.typing import Int, Tensor

__all__ = ["contextual_coupling"]

KEPT = 50
"""Updates between two checkpoints."""

FEATURES = ("examples", "top_k", "reduced", "seed", "dtype", "revision", "mask_token_id")
"""Settings that the features depend on, beside the prior's ..."""

TRAINING = ("combine", "candidates", "pool", "gates", "updates")
"""... and those of the training, beside these."""


def contextual_coupling(
    settings: AttachSettings,
    source: Source,
    network: Denoiser,
    coupling: CouplingLayer,
    train: Rows,
    context: int,
    key: str,
    console: Console,
) -> CouplingLayer:
    """The coupling with evidence of its latents from hidden states; its tables and its pool stay as they are.

    Args:
        settings, source, network: what is attached, and to what.
        coupling: of the first stage.
        train: the text.
        context: tokens that the network reads before a block.
        key: hash of what the coupling's tables depend on.
        console: where to say how large the cache is.
    """
    steps = [T for T in (2, 4, 8, 16) if settings.length > T] or [1]
    made = hash_of([key, context, [getattr(settings, name) for name in FEATURES]])
    cache = FeatureCache(
        settings.folder / f"features-{made}",
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
    _train(settings, trained, train.blocks, cache, made)
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
    made: str,
) -> None:
    """Train what isn't frozen, from the last checkpoint if there is one."""
    unigram = log_unigram(spread_blocks(blocks, 100_000), coupling.vocab_size)
    module = CachedModule(coupling, unigram, cache)
    key = hash_of([made, [getattr(settings, name) for name in TRAINING]])
    folder = settings.folder / f"contextual-{key}"
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
    try:
        trainer.fit(module, ckpt_path=last if last.exists() else None)
    except SystemExit as error:
        if trainer.interrupted:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from error
        raise
    if not trainer.is_global_zero:  # the first process goes on alone
        raise SystemExit(0)
