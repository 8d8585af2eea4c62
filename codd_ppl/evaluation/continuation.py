"""How probable the rest of a text is, given its beginning: a lower bound, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from codd_ppl.denoisers.context import InContext
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.denoisers.running import device_of, evaluation_mode
from codd_ppl.diffusion.nelbo import NoisedBatch, coupled_nelbo
from codd_ppl.diffusion.schedules import LinearSchedule, Schedule, check_steps
from codd_ppl.errors import ConfigError, ShapeError, TokenError
from codd_ppl.sampling.protocol import Coupling
from codd_ppl.sampling.texts import alike, check_texts
from codd_ppl.typing import Bool, Float, Int, Tensor

__all__ = ["ContinuationScorer", "Scores"]

REVEALS = 8
"""Revealed sets for each noised window: queries of the coupling, no calls of the network."""


@dataclass(frozen=True)
class Scores:
    """What a :class:`ContinuationScorer` found.

    Attributes:
        log_prob: (texts,) float64, nats.
        modal: (texts,) bool, whether the continuation is what one step a block with ``drawing="mode"`` writes, each
            block given the text before it.
    """

    log_prob: Float[Tensor, " texts"]
    modal: Bool[Tensor, " texts"]


class ContinuationScorer:
    """log p of a continuation x given the context c before it, for a model that writes in blocks:

        log p(x | c) = sum_b log p(x_b | c, x_<b)   >=   - sum_b NELBO_T(x_b | c, x_<b)

    The windows are those of :class:`codd_ppl.sampling.BlockSampler` without lookahead: a window of the graph ends where
    its block does and begins with known text. A text shorter than the graph is followed by masks, which stay masked and
    are summed out. NELBO_T is the T-step bound (DESIGN section 3), whose noise leaves the context alone: the law is
    that of ``unmasking="random"`` and joint draws, whatever order a sampler prefers.

    T = 1 is exact: one network call and one query of the coupling give log p itself, and the probabilities of all
    continuations of one length, up to a block, sum to one. T > 1 is a lower bound, estimated without bias from draws of
    the step k and the number n of masked sites, of m, in proportion to Binomial(n; m, 1 - alpha_k) r_k n, which leaves
    the factorised part with no noise from how many sites are masked. For T -> infinity n is uniform on 1..m, as in
    LLaDA's estimate (arXiv:2502.09992). The noise depends on ``seed`` and on the place of a block among its text's
    alone, not on the text or the batch: texts are compared under common random numbers.

    Args:
        denoiser: reads texts of up to ``context`` + the graph's sites.
        coupling: for the same vocabulary, with a law that knows its ``mode``; ``topologies.independent`` gives the
            factorised model.
        block_length: sites of a block, 1 to those of the graph (None).
        steps: number T of reverse steps for a block.
        draws: of (k, n), a network call each, for every block; at T = 1 and for one token there is nothing to draw.
        context: largest number of tokens that the network reads left of the window; None: all.
        seed: of the noise.
        batch_size: windows in a network call; those with as much text before them run together.
        schedule: noise schedule; linear if None.

    Raises:
        ConfigError: sizes out of range, or vocabularies that differ.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        coupling: Coupling,
        block_length: int | None = None,
        steps: int = 1,
        draws: int = 32,
        context: int | None = None,
        seed: int = 0,
        batch_size: int = 8,
        schedule: Schedule | None = None,
    ) -> None:
        self.block_length = coupling.sites if block_length is None else block_length
        if not 1 <= self.block_length <= coupling.sites:
            raise ConfigError(
                f"block_length: expected 1 to {coupling.sites}, the sites of the coupling's graph, found "
                f"{self.block_length}; for longer blocks put the coupling on a longer graph with extended()"
            )
        if min(draws, batch_size) < 1 or (context is not None and context < 0):
            raise ConfigError(
                "expected draws and batch_size of at least 1, and context of at least 0 or None, found "
                f"{draws}, {batch_size} and {context}; raise them"
            )
        if denoiser.vocab_size != coupling.vocab_size:
            raise ConfigError(
                f"coupling.vocab_size: expected {denoiser.vocab_size} as in denoiser.vocab_size, found "
                f"{coupling.vocab_size}; build the coupling with vocab_size={denoiser.vocab_size}"
            )
        self.denoiser, self.coupling, self.context = denoiser, coupling, context
        self.steps, self.draws = check_steps(steps), draws
        self.seed, self.batch_size = seed, batch_size
        self.schedule: Schedule = LinearSchedule() if schedule is None else schedule
        self._cumulated: dict[int, Tensor] = {}

    @torch.no_grad()
    def score(self, texts: Sequence[Tensor], given: Sequence[int]) -> Scores:
        """Score what comes after the first ``given[i]`` tokens of each text; nothing does: log p = 0.

        Args:
            texts: (sites,) int64 each, of any lengths.
            given: length of the context of each, 0 included.

        Raises:
            ShapeError: texts that aren't int64 rows, or ``given`` that doesn't fit them.
            TokenError: ids outside of the vocabulary, or the mask in a continuation.
        """
        rows = check_texts(texts, self.denoiser, torch.device("cpu"))
        if len(given) != len(rows) or any(not 0 <= g <= len(r) for g, r in zip(given, rows, strict=True)):
            raise ShapeError(
                f"given: expected for each of {len(rows)} texts a number from 0 to its length, found "
                f"{list(given)[:8]}; it says how many tokens are the context"
            )
        asked: list[_Noised] = []
        for place, (row, start) in enumerate(zip(rows, given, strict=True)):
            if bool((row[start:] == self.denoiser.mask_token_id).any()):
                raise TokenError(
                    f"texts[{place}]: expected a continuation without the mask token {self.denoiser.mask_token_id}, "
                    "which has no probability, found one; leave it out, or have a sampler write what it stands for"
                )
            asked += self._noised(place, row, start)
        log_prob = torch.zeros(len(rows), dtype=torch.float64)
        modal = torch.ones(len(rows), dtype=torch.bool)
        with evaluation_mode(self.denoiser, self.coupling):
            for group in alike([(len(one.before), one.whole) for one in asked]):
                for first in range(0, len(group), self.batch_size):
                    batch = [asked[i] for i in group[first : first + self.batch_size]]
                    for one, nats, hit in zip(batch, *self._run(batch), strict=True):
                        if one.weight:
                            log_prob[one.text] -= one.weight * nats
                        modal[one.text] &= hit
        return Scores(log_prob, modal)

    def _noised(self, text: int, row: Tensor, start: int) -> Iterator[_Noised]:
        """The windows of a text's blocks, noised; of each block one is masked as a whole, for its mode."""
        sites, number = self.coupling.sites, 0
        while start < len(row):
            end = min(len(row), max(start + self.block_length, sites))
            begin, length = max(0, end - sites), end - start
            left = 0 if self.context is None else max(0, begin - self.context)
            x0 = torch.cat((row[begin:end], row.new_zeros(sites - (end - begin))))
            site = torch.arange(begin, begin + sites)
            block = (site >= start) & (site < end)
            window = _Noised(text, row[left:begin], x0, site >= end, block, block[None])
            if length == 1 or self.steps == 1:
                yield replace(window, weight=1.0)
            else:
                yield window
                for masked, revealed, rate, weight in self._draw(length, number):
                    inside = torch.zeros(1 + REVEALS, sites, dtype=torch.bool)
                    inside[:, block] = torch.cat((masked[None], revealed))
                    yield replace(
                        window, masked=inside[0], revealed=inside[1:], rate=rate, weight=weight, whole=False
                    )
            start, number = end, number + 1

    def _draw(self, m: int, number: int) -> Iterator[tuple[Tensor, Tensor, float, float]]:
        """For each draw: which of m sites are masked, sets of them to reveal, the rate r_k, the weight m / (r_k n)."""
        generator = torch.Generator().manual_seed((self.seed << 20) + number)
        offset = torch.rand(1, generator=generator, dtype=torch.float64)
        order, coins = torch.rand(2, self.draws, self.coupling.sites, generator=generator)[..., :m]
        rates = self.schedule.reveal_rates(self.steps, torch.float64)
        if m not in self._cumulated:
            self._cumulated[m] = self._weights(m, rates).flatten().cumsum(0)
        chances = self._cumulated[m]
        times = (offset + torch.arange(self.draws) / self.draws) % 1 * chances[-1]
        drawn = torch.searchsorted(chances, times, right=True).clamp(max=len(chances) - 1)
        turns = (torch.arange(REVEALS) / REVEALS)[:, None]
        for i, pair in enumerate(drawn.tolist()):
            n, rate = pair // self.steps + 1, float(rates[pair % self.steps])
            masked = order[i].argsort().argsort() < n
            yield masked, masked & ((coins[i] + turns) % 1 < rate), rate, m / (rate * n * self.draws)

    def _weights(self, m: int, rates: Tensor) -> Float[Tensor, "m steps"]:
        """Binomial(n; m, 1 - alpha_k) r_k n / m for n = 1..m and k = 1..T; they add up to one."""
        n = torch.arange(1, m + 1, dtype=torch.float64)[:, None]
        alpha = self.schedule.grid(self.steps, torch.float64)[1:]
        ways = math.lgamma(m + 1) - torch.lgamma(n + 1) - torch.lgamma(m - n + 1)
        return (ways + torch.xlogy(n, 1 - alpha) + torch.xlogy(m - n, alpha)).exp() * rates * n / m

    def _run(self, batch: list[_Noised]) -> tuple[list[float], list[bool]]:
        """One network call: -log p of what a step reveals, nats, and whether the mode is the text (whole blocks)."""
        device = device_of(self.denoiser, default=torch.device("cpu"))

        def stacked(name: str) -> Tensor:
            return torch.stack([getattr(one, name) for one in batch]).to(device)

        x0, masked, beyond = stacked("x0"), stacked("masked"), stacked("beyond")
        xt, known = torch.where(masked | beyond, self.denoiser.mask_token_id, x0), ~(masked | beyond)
        before = stacked("before")
        network = InContext(self.denoiser, before) if before.shape[1] else self.denoiser
        output = network(xt)
        dist = self.coupling(output.logits, hidden=output.hidden, tokens=xt, known=known)
        rate = torch.tensor([one.rate for one in batch], device=device)
        # what is beyond the text is nothing to score: known to the bound, masked to the network and the law
        noised = NoisedBatch(x0, xt, ~masked, masked, torch.ones_like(rate).long(), rate, steps=1)
        sets = stacked("revealed").unbind(1)
        nats = [coupled_nelbo(replace(noised, revealed=chosen), output.logits, dist) for chosen in sets]
        hits = torch.ones(len(batch), dtype=torch.bool)
        if batch[0].whole:
            law: Any = dist
            hits = ((law.mode == x0) | ~masked).all(-1)
        return torch.stack(nats).double().mean(0).tolist(), hits.tolist()


@dataclass(frozen=True)
class _Noised:
    """A window of a text with some sites of its block masked.

    Attributes:
        text: whose it is.
        before: (any,) what the network reads left of the window.
        x0: (sites,) the window, 0 behind the end of the text.
        beyond: (sites,) bool, what is behind it.
        masked: (sites,) bool, the masked sites of the block.
        revealed: (sets, sites) bool, what the step reveals of them.
        rate: chance of each to be revealed.
        weight: of this window's nats in the bound of the text.
        whole: whether the block is masked as a whole.
    """

    text: int
    before: Int[Tensor, " any"]
    x0: Int[Tensor, " sites"]
    beyond: Bool[Tensor, " sites"]
    masked: Bool[Tensor, " sites"]
    revealed: Bool[Tensor, "sets sites"]
    rate: float = 1.0
    weight: float = 0.0
    whole: bool = True
