"""Full diffusion: whole texts of any length, all masked sites at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch

from codd_ppl.denoisers.guidance import Guided, check_guidance
from codd_ppl.denoisers.running import device_of
from codd_ppl.sampling.protocol import Coupling
from codd_ppl.sampling.sampler import Sampler
from codd_ppl.sampling.step import OnStep, Step
from codd_ppl.sampling.stopping import NeverStop, StopRule
from codd_ppl.sampling.texts import TextGeneration, alike, check_texts
from codd_ppl.sampling.windows import WindowedCoupling
from codd_ppl.typing import Tensor

__all__ = ["WholeTextSampler"]


class WholeTextSampler:
    """Writes all masked sites of a text in T steps, whatever its length; texts of one length run as one batch.

    Args:
        sampler: denoiser, coupling, unmasking and steps.
        stretch: makes the coupling fit a length, (coupling, sites) -> coupling: :class:`WindowedCoupling` for any
            coupling, or :func:`codd_ppl.sampling.extended` for tied chains, exact. It is asked where the length is not
            the graph's.
        shorten: ask ``stretch`` for lengths below the graph's, too. If not, a text shorter than the graph is written as
            long as the graph, and cut.
        guidance: classifier-free guidance (:class:`codd_ppl.denoisers.Guided`), the given tokens masked in the
            unconditional run; 0: none.
        stop: ends a text, after everything is written; what follows is replaced by the last token of the stop.

    Raises:
        ConfigError: a negative guidance.
    """

    def __init__(
        self,
        sampler: Sampler,
        stretch: Callable[[Any, int], Coupling] = WindowedCoupling,
        shorten: bool = False,
        guidance: float = 0.0,
        stop: StopRule | None = None,
    ) -> None:
        check_guidance("guidance", guidance)
        self.sampler, self.stretch, self.shorten, self.guidance = sampler, stretch, shorten, guidance
        self.stop: StopRule = NeverStop() if stop is None else stop

    @torch.no_grad()
    def generate(
        self,
        templates: Sequence[Tensor] | Tensor,
        generator: torch.Generator | None = None,
        on_step: OnStep | None = None,
    ) -> TextGeneration:
        """Write the masked sites of every template; arguments and errors as in :meth:`BlockSampler.generate`.

        Raises:
            ConfigError: a coupling that ``stretch`` can't put on the length of a text.
        """
        denoiser = self.sampler.denoiser
        mask, device = denoiser.mask_token_id, device_of(denoiser, default=torch.device("cpu"))
        texts = check_texts(templates, denoiser, device)
        tokens, history, lengths = list(texts), list(texts), [len(text) for text in texts]
        nfe, calls = [0 for _ in texts], 0
        for rows in alike([len(text) for text in texts]):
            text = torch.stack([texts[r] for r in rows])
            sampler = copy(self.sampler)
            sites = text.shape[1] if self.shorten else max(text.shape[1], sampler.coupling.sites)
            if sites != sampler.coupling.sites:
                sampler.coupling = self.stretch(sampler.coupling, sites)
            padding = text.new_full((len(rows), sites - text.shape[1]), mask)
            padded = torch.cat((text, padding), 1)
            if self.guidance:
                sampler.denoiser = Guided(denoiser, padded != mask, self.guidance)
            found = sampler.generate(padded, generator, on_step=_placed(on_step, rows))
            first = (text == mask).long().argmax(-1)
            for i, r in enumerate(rows):
                tokens[r], history[r] = found.tokens[i, : text.shape[1]], found.history[i, : text.shape[1]]
                end = int(self.stop.end(tokens[r][None, first[i] :])) + int(first[i])
                if end <= len(tokens[r]):
                    rest = (torch.arange(len(tokens[r]), device=device) >= end) & (text[i] == mask)
                    tokens[r] = torch.where(rest, tokens[r][end - 1], tokens[r])
                    history[r] = torch.where(rest, -1, history[r])
                    lengths[r] = end
                nfe[r] = found.nfe
            calls += found.nfe
        return TextGeneration(
            tokens=tuple(tokens),
            history=tuple(history),
            lengths=torch.tensor(lengths, dtype=torch.int64),
            nfe=torch.tensor(nfe, dtype=torch.int64),
            calls=calls,
        )


def _placed(on_step: OnStep | None, rows: tuple[int, ...]) -> OnStep | None:
    def placed(step: Step) -> None:
        assert on_step is not None
        on_step(replace(step, rows=rows))

    return None if on_step is None else placed
