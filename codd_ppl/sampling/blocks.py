"""Block diffusion: texts of any length, written left to right in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import torch

from codd_ppl.denoisers.context import InContext
from codd_ppl.denoisers.guidance import Guided, check_guidance
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.denoisers.running import device_of
from codd_ppl.errors import ConfigError
from codd_ppl.sampling.sampler import Sampler
from codd_ppl.sampling.step import OnStep, Step
from codd_ppl.sampling.stopping import NeverStop, StopRule
from codd_ppl.sampling.texts import TextGeneration, alike, check_texts
from codd_ppl.typing import Tensor

__all__ = ["BlockSampler"]


class BlockSampler:
    """Writes texts longer than the graph block by block, each block given all text before it:

        p(x) = prod_b p(x_b | x_<b)

    Each block takes the sampler's T steps (Arriola et al. 2025, arXiv:2503.09573; semi-autoregressive in LLaDA,
    arXiv:2502.09992). The network reads prompt, earlier blocks and the block. The coupling's window ends where the
    block does: with blocks shorter than the graph it begins with known text, which a latent chain's first states are
    then conditioned on. Blocks begin at the first masked site of a text; the first one goes on to the end of the graph
    where there is not enough text before it to fill the window, and a text shorter than the graph is written as long as
    the graph and cut. Known tokens inside of blocks (templates) stay.

    Texts of one length with equally long prompts run as one batch; nothing is padded.

    Args:
        sampler: writes a block; a :class:`Sampler` with denoiser, coupling, unmasking and steps.
        block_length: sites of a block, 1 to those of the graph (None).
        context: largest number of tokens that the network reads left of the window; None: all.
        lookahead: the network also reads what is right of the block: masks, as LLaDA does, and known tokens.
        guidance: classifier-free guidance (:class:`codd_ppl.denoisers.Guided`), the given tokens masked in the
            unconditional run; 0: none.
        stop: ends a text. It looks at what is written after the first masked site. Masked sites after the end are not
            written: they get the last token of the stop again, and ``lengths`` says where the text ended.

    Raises:
        ConfigError: a block length that doesn't fit the graph, a negative context or guidance.
    """

    def __init__(
        self,
        sampler: Sampler,
        block_length: int | None = None,
        context: int | None = None,
        lookahead: bool = False,
        guidance: float = 0.0,
        stop: StopRule | None = None,
    ) -> None:
        sites = sampler.coupling.sites
        block_length = sites if block_length is None else block_length
        if not 1 <= block_length <= sites:
            raise ConfigError(
                f"block_length: expected 1 to {sites}, the sites of the coupling's graph, found {block_length}; for "
                "longer blocks put the coupling on a longer graph with extended(coupling, sites)"
            )
        if context is not None and context < 0:
            raise ConfigError(f"context: expected at least 0, found {context}; None is all text before")
        check_guidance("guidance", guidance)
        self.sampler, self.block_length, self.context = sampler, block_length, context
        self.lookahead, self.guidance = lookahead, guidance
        self.stop: StopRule = NeverStop() if stop is None else stop

    @torch.no_grad()
    def generate(
        self,
        templates: Sequence[Tensor] | Tensor,
        generator: torch.Generator | None = None,
        on_step: OnStep | None = None,
    ) -> TextGeneration:
        """Write the masked sites of every template.

        Args:
            templates: a list of (sites,) int64, or (batch, sites): prompt, then masks; or masks anywhere.
            generator: source of all randomness, on the denoiser's device; torch's global one if None.
            on_step: called after every reverse step of every block, with the rows it is about and the place of the
                window in them.

        Raises:
            ShapeError, TokenError: templates of another shape, or ids outside the vocabulary.
            ConfigError: a generator on another device.
        """
        denoiser = self.sampler.denoiser
        device = device_of(denoiser, default=torch.device("cpu"))
        texts = check_texts(templates, denoiser, device)
        mask = denoiser.mask_token_id
        firsts = [
            int((text == mask).long().argmax()) if bool((text == mask).any()) else len(text) for text in texts
        ]
        job = _Job(self, texts, generator, on_step)
        for rows in alike([(len(t), f) for t, f in zip(texts, firsts, strict=True)]):
            job.write(rows, firsts[rows[0]])
        return TextGeneration(
            tokens=tuple(job.tokens),
            history=tuple(job.history),
            lengths=torch.tensor(job.lengths, dtype=torch.int64),
            nfe=torch.tensor(job.nfe, dtype=torch.int64),
            calls=job.calls,
        )


class _Job:
    """One call of generate: the texts as far as they are written."""

    def __init__(
        self,
        settings: BlockSampler,
        texts: list[Tensor],
        generator: torch.Generator | None,
        on_step: OnStep | None,
    ) -> None:
        self.settings, self.generator, self.on_step = settings, generator, on_step
        self.mask = settings.sampler.denoiser.mask_token_id
        self.given = [text != self.mask for text in texts]
        self.tokens = [text.clone() for text in texts]
        self.history = [torch.where(given, -1, 0) for given in self.given]
        self.lengths = [len(text) for text in texts]
        self.nfe = [0 for _ in texts]
        self.calls = 0

    def write(self, rows: tuple[int, ...], first: int) -> None:
        """All blocks of rows of one length whose first masked site is the same."""
        total, sites = len(self.tokens[rows[0]]), self.settings.sampler.coupling.sites
        start = first
        while start < total and rows:
            end = min(total, max(start + self.settings.block_length, sites))
            self._block(rows, start, end)
            rows = self._going(rows, first, end)
            start = end

    def _block(self, rows: tuple[int, ...], start: int, end: int) -> None:
        """Sites start .. end - 1 of these rows, in a window of the graph's length that ends there."""
        sampler, sites = copy(self.settings.sampler), self.settings.sampler.coupling.sites
        text = torch.stack([self.tokens[r] for r in rows])
        given = torch.stack([self.given[r] for r in rows])
        begin, beyond = max(0, end - sites), max(0, sites - end)
        window = text[:, begin:end]
        if beyond:  # shorter than the graph: written as long as the graph, and cut
            window = torch.cat((window, text.new_full((len(rows), beyond), self.mask)), 1)
        if not bool((window == self.mask).any()):
            return
        reach = self.settings.context
        left = 0 if reach is None else max(0, begin - reach)
        right = text[:, end:] if self.settings.lookahead else text[:, :0]
        network: Denoiser = sampler.denoiser
        if self.settings.guidance:
            parts = (
                given[:, left:end],
                given.new_zeros(len(rows), beyond),
                given[:, end : end + right.shape[1]],
            )
            network = Guided(network, torch.cat(parts, 1), self.settings.guidance)
        if begin > left or right.shape[1]:
            network = InContext(network, text[:, left:begin], right)
        sampler.denoiser = network
        tell = self.on_step
        found = sampler.generate(
            window,
            self.generator,
            on_step=None if tell is None else lambda step: tell(self._placed(step, rows, begin)),
        )
        for r, tokens, history in zip(rows, found.tokens, found.history, strict=True):
            self.tokens[r][begin:end] = tokens[: end - begin]
            fresh = history[: end - begin] >= 0
            self.history[r][begin:end] = torch.where(
                fresh, history[: end - begin], self.history[r][begin:end]
            )
            self.nfe[r] += found.nfe
        self.calls += found.nfe

    @staticmethod
    def _placed(step: Step, rows: tuple[int, ...], begin: int) -> Step:
        return replace(step, rows=rows, start=begin)

    def _going(self, rows: tuple[int, ...], first: int, end: int) -> tuple[int, ...]:
        """Those of the rows that no stop has ended; the others are closed."""
        written = torch.stack([self.tokens[r][first:end] for r in rows])
        stops = self.settings.stop.end(written).tolist()
        for r, stop in zip(rows, stops, strict=True):
            if stop <= end - first:
                length = first + stop
                rest = torch.arange(len(self.tokens[r]), device=written.device) >= length
                rest &= ~self.given[r]
                self.tokens[r] = torch.where(rest, self.tokens[r][length - 1], self.tokens[r])
                self.history[r] = torch.where(rest, -1, self.history[r])
                self.lengths[r] = length
        return tuple(r for r, stop in zip(rows, stops, strict=True) if stop > end - first)
