"""Texts for the tasks of a benchmark: prompts in, what is written behind them out."""

from __future__ import annotations

import torch

from codd_ppl.denoisers.running import device_of
from codd_ppl.errors import ConfigError
from codd_ppl.evaluation.harness_model import HarnessModel
from codd_ppl.evaluation.wanted import WantedText
from codd_ppl.sampling.blocks import BlockSampler
from codd_ppl.sampling.sampler import Sampler
from codd_ppl.sampling.stopping import FirstStop, StopRule, StopStrings, StopTokens

__all__ = ["TaskWriter"]


class TaskWriter:
    """Writes texts in blocks (:class:`codd_ppl.sampling.BlockSampler`), each up to its first stop, which is left out.

    Args:
        model: network, coupling and tokenizer.
        steps: reverse steps for a block.
        unmasking: policy of the sampler.
        lookahead: the network also reads the masks right of a block.
        max_length: largest number of tokens that the network reads at a time, the last ones; None: any.
        seed: of the draws, which go on from call to call.

    Raises:
        ConfigError: an unknown policy, or windows longer than ``max_length``.
    """

    def __init__(
        self,
        model: HarnessModel,
        steps: int,
        unmasking: str = "low_confidence",
        lookahead: bool = False,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.steps, self.unmasking = model, steps, unmasking
        self.lookahead, self.max_length = lookahead, max_length
        where = device_of(model.denoiser, default=torch.device("cpu"))
        self.generator = torch.Generator(where).manual_seed(seed)
        self.sampler(WantedText())
        self.context()

    def write(self, prompts: list[list[int]], wanted: WantedText) -> tuple[list[str], int]:
        """Texts behind prompts of one length, as one batch.

        Args:
            prompts: token ids.
            wanted: how all of these texts are to be written.

        Returns:
            The texts, and the network calls of each, added up.

        Raises:
            ConfigError: settings of the sampler that are out of range, or more masks than the network can read.
            ShapeError, TokenError: ids outside of the vocabulary.
        """
        model, mask = self.model, self.model.denoiser.mask_token_id
        stops = StopStrings(wanted.stops, self._with_special_tokens) if wanted.stops else None
        rules: list[StopRule] = [] if stops is None else [stops]
        rules += [StopTokens(*model.ends)] if model.ends else []
        writer = BlockSampler(
            self.sampler(wanted),
            model.block_length,
            self.context(wanted.length if self.lookahead else 0),
            self.lookahead,
            stop=FirstStop(*rules),
        )
        templates = [torch.tensor([*prompt, *[mask] * wanted.length]) for prompt in prompts]
        found = writer.generate(templates, self.generator)
        texts = []
        for prompt, tokens, length in zip(prompts, found.tokens, found.lengths.tolist(), strict=True):
            ids = [i for i in tokens[len(prompt) : length].tolist() if i not in model.ends]
            text = model.tokenizer.decode(ids, skip_special_tokens=True)
            texts.append(text if stops is None else stops.cut(text))
        return texts, int(found.nfe.sum())

    def sampler(self, wanted: WantedText) -> Sampler:
        """The sampler of a block.

        Raises:
            ConfigError: names or values that it doesn't take.
        """
        return Sampler.from_arguments(
            self.model.denoiser,
            self.model.coupling,
            steps=self.steps,
            unmasking=self.unmasking,
            **dict(wanted.sampler),
        )

    def context(self, right: int = 0) -> int | None:
        """How many tokens the network may read left of a window, with so many right of it; None: all.

        Raises:
            ConfigError: not even the window.
        """
        sites = self.model.coupling.sites
        if self.max_length is None:
            return None
        if sites + right > self.max_length:
            more = f" and the {right} right of it that lookahead shows" if right else ""
            raise ConfigError(
                f"max_length: expected at least the {sites} tokens of a window{more}, found {self.max_length}, which "
                "is all that the network can read; take a coupling on fewer sites, or shorter texts"
            )
        return self.max_length - sites - right

    def _with_special_tokens(self, ids: list[int]) -> str:
        return str(self.model.tokenizer.decode(ids, skip_special_tokens=False))
