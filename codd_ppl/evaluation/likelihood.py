"""T-step likelihood bounds of several models under one and the same noise."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import Progress

from codd_ppl.denoisers.context import InContext
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.denoisers.running import device_of, evaluation_mode
from codd_ppl.diffusion.nelbo import NoisedBatch, coupled_nelbo, factorised_nelbo, noise
from codd_ppl.diffusion.schedules import LinearSchedule, Schedule
from codd_ppl.errors import ConfigError, ShapeError, TokenError
from codd_ppl.evaluation.table import NelboTable
from codd_ppl.sampling.protocol import Coupling
from codd_ppl.typing import Float, Int, Tensor

__all__ = ["Model", "nelbo_table"]

Model = tuple[Denoiser, Coupling | None]
"""A network and its coupling; None means tokens drawn independently from the network's softmax."""


@torch.no_grad()
def nelbo_table(
    models: Mapping[str, Model],
    blocks: Int[Tensor, "n sites"],
    steps: Sequence[int] | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
    batch_size: int = 64,
    draws: int = 1,
    reveals: int = 8,
    progress: bool = False,
    contexts: Int[Tensor, "n left"] | None = None,
) -> NelboTable:
    """NELBO_T of every model at every T, in bits per token, with identical noise for all models.

    Per block the estimate is unbiased: one step k of the T (stratified over all blocks and draws), one xt_k, and
    ``reveals`` revealed sets S. The factorised part takes the expectation over S exactly, and that over the number m
    of masked sites by a control variate, beta T r_k (m - E m), with beta from the other half of the rows. The
    coupling adds the mean over S of T (-log p(x_S | xt_k) + sum_S log softmax(l_i)[x_i]), a paired difference, so
    that differences between models on one network are far less noisy than the bounds. At T = 1 nothing is random.

    Models that share a denoiser object share its forward passes. The noise depends on ``seed`` and T only, not
    on the batch size, the models or the device; two T share their random numbers.

    Args:
        models: name -> (denoiser, coupling), coupling None for the factorised model.
        blocks: held-out text, int64.
        steps: numbers of reverse steps; 1, 2, 4, ... and the number of sites (which gap_closed needs) if None.
        schedule: noise schedule; linear if None.
        seed: of the noise.
        batch_size: blocks per network call.
        draws: noise draws per block (one is enough at T = 1 and is used there).
        reveals: revealed sets per draw; each costs a query of the coupling, but no network call.
        progress: show a progress bar on standard error.
        contexts: what the network reads to the left of each block, int64; None: nothing.

    Raises:
        ConfigError: no model, models with different vocabularies, bad ``steps``, ``draws``, ``reveals``
            or ``batch_size``.
        ShapeError: blocks are not int64 (n >= 1, sites >= 1), or don't have the sites of a coupling; contexts that
            aren't int64 with as many rows.
        TokenError: ids outside the vocabulary.
    """
    sites = _check(models, blocks, min(batch_size, draws, reveals))
    if contexts is not None and (contexts.dtype != torch.int64 or contexts.shape[:-1] != blocks.shape[:-1]):
        raise ShapeError(
            f"contexts: expected int64 ({len(blocks)}, any), a row of text before each block, found {contexts.dtype} "
            f"{tuple(contexts.shape)}"
        )
    schedule = LinearSchedule() if schedule is None else schedule
    steps = _powers_of_two(sites) if steps is None else sorted(set(steps))
    if not steps:
        raise ConfigError(
            "steps: expected at least one number of steps, found none; pass e.g. steps=(1, 4, 16)"
        )
    groups: dict[int, list[str]] = {}
    for name, (denoiser, _) in models.items():
        groups.setdefault(id(denoiser), []).append(name)
    values: dict[str, dict[int, Tensor]] = {name: {} for name in models}
    modules = [part for pair in models.values() for part in pair]
    bar = Progress(console=Console(stderr=True), disable=not progress, transient=True)
    with evaluation_mode(*modules), bar:
        task = bar.add_task("NELBO_T", total=len(steps))
        for T in steps:
            noised, coins, rows = _noise_all(blocks, T, schedule, 1 if T == 1 else draws, seed)
            nats: dict[str, list[Tensor]] = {name: [] for name in models}
            base: dict[str, list[Tensor]] = {name: [] for name in models}
            chunks = -(-len(rows) // batch_size)
            for part, flips, own in zip(
                _split(noised, batch_size), coins.split(batch_size), rows.split(batch_size), strict=True
            ):
                before = None if contexts is None else contexts[own]
                sets = [
                    (flips + j / reveals) % 1 < part.rate[:, None] for j in range(1 if T == 1 else reveals)
                ]
                for names in groups.values():
                    alone, gains = _evaluate({name: models[name] for name in names}, part, sets, before)
                    for name, gain in gains.items():
                        base[name].append(alone)
                        nats[name].append(alone + gain)
                bar.advance(task, 1.0 / chunks)
            control = T * noised.rate.double() * (noised.masked.sum(-1) - _expected_masked(noised, schedule))
            for name in models:
                total = torch.cat(nats[name]) - _explained(torch.cat(base[name]), control)
                mean = torch.zeros(len(blocks), dtype=torch.float64).index_add(0, rows, total)
                values[name][T] = mean * (len(blocks) / len(rows)) / (sites * math.log(2.0))
    settings = {"schedule": repr(schedule), "seed": seed, "draws": draws, "reveals": reveals}
    return NelboTable(sites=sites, values=values, settings=settings)


def _evaluate(
    models: Mapping[str, Model], noised: NoisedBatch, sets: Sequence[Tensor], before: Tensor | None
) -> tuple[Float[Tensor, " batch"], dict[str, Float[Tensor, " batch"]]]:
    """Nats per sequence of the network alone, and what each coupling adds: a single network call."""
    denoiser = next(iter(models.values()))[0]
    device = device_of(denoiser, default=noised.x0.device)
    here = NoisedBatch(
        x0=noised.x0.to(device),
        xt=torch.where(noised.known, noised.x0, denoiser.mask_token_id).to(device),
        known=noised.known.to(device),
        revealed=noised.revealed.to(device),
        step=noised.step.to(device),
        rate=noised.rate.to(device),
        steps=noised.steps,
    )
    reader = denoiser if before is None else InContext(denoiser, before.to(device))
    output = reader(here.xt)
    alone = factorised_nelbo(here, output.logits)
    gains: dict[str, Tensor] = {}
    for name, (_, coupling) in models.items():
        gain = torch.zeros_like(alone)
        if coupling is not None:
            dist = coupling(output.logits, hidden=output.hidden, tokens=here.xt, known=here.known)
            for chosen in sets:
                revealed = here.masked & chosen.to(device)
                gain = gain + (coupled_nelbo(replace(here, revealed=revealed), output.logits, dist) - alone)
        gains[name] = torch.where(alone == torch.inf, 0.0, gain / len(sets)).double().cpu()
    return alone.double().cpu(), gains


def _expected_masked(noised: NoisedBatch, schedule: Schedule) -> Float[Tensor, " rows"]:
    """E m = sites (1 - alpha_k), for the step k of each row."""
    alphas = schedule.grid(noised.steps, dtype=torch.float64)[noised.step]
    return noised.x0.shape[-1] * (1 - alphas)


def _explained(nats: Float[Tensor, " rows"], control: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """beta * control, of mean zero: the share of the noise that the number of masked sites explains.

    The beta of each half of the rows is the least-squares slope of the other half, hence independent of its masks.
    """
    result = torch.zeros_like(nats)
    for half in (0, 1):
        seen, other = (values[half::2] - values[half::2].mean() for values in (control, nats))
        spread = (seen**2).sum()
        if bool(spread > 0) and bool(nats.isfinite().all()):
            slope = (seen * other).sum() / spread
            result[1 - half :: 2] = slope * control[1 - half :: 2]
    return result


def _noise_all(
    blocks: Tensor, T: int, schedule: Schedule, draws: int, seed: int
) -> tuple[NoisedBatch, Float[Tensor, "rows sites"], Int[Tensor, " rows"]]:
    """Noise for ``draws`` passes over the blocks, in one stratified set; a coin per site; the block of each row.

    The blocks are shuffled in each pass, so that neighbouring texts don't get neighbouring steps; the passes
    take consecutive shares of the time axis, so that the draws of one block are spread over it. Every T starts
    from the same seed, hence from the same times and the same uniforms per site: common random numbers, which
    make differences between two T less noisy too.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(draws)])
    blocks = blocks.cpu()
    noised = noise(blocks[rows], T, schedule, mask_token_id=-1, generator=generator)
    coins = torch.rand(noised.x0.shape, generator=generator)
    # back in the order of the blocks: every batch then holds all kinds of steps
    order = torch.argsort(rows, stable=True)
    return _take(noised, order), coins[order], rows[order]


def _take(noised: NoisedBatch, index: Tensor | slice) -> NoisedBatch:
    names = ("x0", "xt", "known", "revealed", "step", "rate")
    return replace(noised, **{name: getattr(noised, name)[index] for name in names})


def _split(noised: NoisedBatch, size: int) -> Iterator[NoisedBatch]:
    for start in range(0, len(noised.x0), size):
        yield _take(noised, slice(start, start + size))


def _powers_of_two(sites: int) -> list[int]:
    return sorted({2**power for power in range(sites.bit_length()) if 2**power < sites} | {sites})


def _check(models: Mapping[str, Model], blocks: Tensor, smallest: int) -> int:
    """Number of sites, after all that the caller can get wrong has been looked at."""
    if not models:
        raise ConfigError(
            "models: expected at least one, found none; pass {'factorised': (denoiser, None), ...}"
        )
    if smallest < 1:
        raise ConfigError(f"expected batch_size, draws and reveals >= 1, found {smallest}; raise it")
    if blocks.dtype != torch.int64 or blocks.dim() != 2 or blocks.numel() == 0:
        raise ShapeError(
            f"blocks: expected int64 (n, sites) with at least one block, found {blocks.dtype} {tuple(blocks.shape)}; "
            "cut the held-out text into blocks, e.g. TextDataModule.valid_blocks()"
        )
    vocab_sizes = {name: denoiser.vocab_size for name, (denoiser, _) in models.items()}
    if len(set(vocab_sizes.values())) > 1:
        raise ConfigError(
            f"models: expected one vocabulary, as bits per token compare only then, found {vocab_sizes}; "
            "make a table for each tokenizer"
        )
    vocab, sites = next(iter(vocab_sizes.values())), blocks.shape[1]
    for name, (_, coupling) in models.items():
        if coupling is None:
            continue
        if coupling.sites != sites:
            raise ShapeError(
                f"blocks: expected {coupling.sites} sites as in the coupling of {name!r}, found {sites}; cut the text "
                f"into blocks of {coupling.sites}, or build that coupling on a graph of {sites} sites"
            )
        if coupling.vocab_size != vocab:
            raise ConfigError(
                f"models[{name!r}]: expected a coupling with the denoiser's vocab_size={vocab}, found "
                f"{coupling.vocab_size}; build the coupling with vocab_size={vocab}"
            )
    if bool(((blocks < 0) | (blocks >= vocab)).any()):
        raise TokenError(
            f"blocks: expected ids in 0..{vocab - 1}, found {int(blocks.min())}..{int(blocks.max())}; "
            "encode the text with the tokenizer of the denoiser"
        )
    return sites
