"""Models in the Language Model Evaluation Harness (github.com/EleutherAI/lm-evaluation-harness): the one door to
``lm_eval``, which the extra ``eval`` installs.

    codd harness --model codd --model_args backbone=ID_OR_PATH,coupling=DIR_OR_ID,steps=64,block_length=32 --tasks gsm8k

The command ``lm_eval`` knows the models of its own package only (0.4.13 looks for no others). ``codd harness`` makes
:class:`CoDDHarness` known to it as ``codd``, as importing this module does, and hands it all words.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from rich.console import Console
from rich.progress import Progress

from codd_ppl.denoisers.running import device_of
from codd_ppl.errors import ConfigError, TokenError
from codd_ppl.evaluation.continuation import ContinuationScorer
from codd_ppl.evaluation.harness_model import load_harness_model
from codd_ppl.evaluation.harness_settings import HarnessSettings
from codd_ppl.evaluation.task_writer import TaskWriter
from codd_ppl.evaluation.wanted import wanted_text
from codd_ppl.sampling.texts import alike

__all__ = ["CoDDHarness", "run_harness"]

log = logging.getLogger("lm_eval.codd_ppl")  # shown as lm_eval shows its own

SLICE = 32
"""Batches of texts that are scored before the cache of ``lm_eval`` hears of them."""


def run_harness(words: Sequence[str]) -> None:
    """The command ``lm_eval`` with these words, and with the model ``codd``."""
    before = sys.argv
    sys.argv = ["codd harness", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


@register_model("codd")
class CoDDHarness(TemplateLM):
    """A network and its coupling, as ``lm_eval`` asks for them.

    **Texts** are written in blocks (:class:`codd_ppl.sampling.BlockSampler`). ``steps`` counts the reverse steps of a
    text of ``max_gen_toks`` tokens, as in LLaDA (arXiv:2502.09992). A block of ``block_length`` tokens takes its share,
    steps * block_length / max_gen_toks; a task that asks for texts of another length gets more or fewer blocks, of as
    many steps each. They end at the ``until`` strings of the task or the network's end-of-text token, which are left
    out.

    A task asks for greedy decoding (``do_sample=False``, ``temperature=0``, or neither), which is the mode of the
    coupled law in every step, or it samples: joint draws, the network's logits at ``temperature``, ``top_k`` and
    ``top_p``. The arguments ``drawing`` and ``temperature`` win over the task. Other generation settings are named in a
    warning, once.

    **Likelihoods** are those of the same blocks (:class:`codd_ppl.evaluation.ContinuationScorer`): minus the T-step
    bound of the continuation given its context, T = ``likelihood_steps``; a lower bound on log p, estimated from
    ``likelihood_draws`` fixed draws of the noise for each block, and exact at T = 1. It is about joint draws in random
    order, whatever ``drawing`` and ``unmasking`` say. ``is_greedy`` says whether mode drawing in one step a block
    writes the continuation. Nothing is put before an empty context.

    The network reads at most ``max_length`` tokens at a time, the last ones; a warning counts the texts that are
    longer. Texts of equal length share a batch, nothing is padded. No special tokens are added to what a task says.

    Args:
        arguments: those of :class:`codd_ppl.evaluation.harness_settings.HarnessSettings`, as values or in letters.

    Raises:
        ConfigError: unknown names, values out of range or against each other, a coupling for another network.
        DataError: nothing to read, or a network without a tokenizer.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        settings = self.settings = HarnessSettings.read(**arguments)
        gpu, device = torch.cuda.is_available(), settings.device
        if device is not None and device.startswith("cuda") and not gpu:  # lm_eval asks for cuda:0 by itself
            log.warning("device=%s: there is no GPU here, the CPU is used", device)
            device = None
        model = self.model = load_harness_model(
            settings.backbone,
            settings.coupling,
            settings.factorised,
            settings.block_length,
            device or ("cuda" if gpu else "cpu"),
            settings.revision,
            settings.coupling_revision,
            trust_remote_code=settings.trust_remote_code,
            mask_token_id=settings.mask_token_id,
            dtype=settings.dtype,
        )
        self._device = device_of(model.denoiser, default=torch.device("cpu"))
        self.tokenizer = model.words or model.tokenizer
        self.max_length = settings.max_length or model.max_length
        steps = settings.steps_of_block(model.block_length)
        self.writer = TaskWriter(
            model, steps, settings.unmasking, settings.lookahead, self.max_length, settings.seed
        )
        self.writer.sampler(self._wanted({}))  # says now what is wrong with the drawing
        self.scorer = ContinuationScorer(
            model.denoiser,
            model.coupling,
            model.block_length,
            settings.likelihood_steps or steps,
            settings.likelihood_draws,
            self.writer.context(),
            settings.seed,
            settings.batch_size,
        )
        self._named: set[str] = set()

    # -- texts -------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Write a text for every request (context, generation settings), in their order.

        Raises:
            ConfigError: settings out of range, or more than the network can read.
            TokenError: the mask token in a context.
        """
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        wanted = [self._wanted(request.args[1]) for request in requests]
        self._note_lengths([len(p) + w.length for p, w in zip(prompts, wanted, strict=True)])
        unread = {name for one in wanted for name in one.unread} - self._named
        if unread:
            log.warning("generation settings without a meaning here: %s", ", ".join(sorted(unread)))
            self._named |= unread
        size = self.settings.batch_size
        groups = alike([(len(p), w) for p, w in zip(prompts, wanted, strict=True)])
        texts, calls = [""] * len(requests), 0
        with _progress("writing", len(requests), disable_tqdm) as advance:
            for group in sorted(groups, key=lambda group: -len(prompts[group[0]])):
                for start in range(0, len(group), size):
                    rows = group[start : start + size]
                    found, nfe = self.writer.write([prompts[i] for i in rows], wanted[rows[0]])
                    calls += nfe
                    for i, text in zip(rows, found, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    advance(len(rows))
        log.info("%d texts, %.1f network calls for each", len(texts), calls / max(1, len(texts)))
        return texts

    def _wanted(self, settings: dict[str, Any]) -> Any:
        own = self.settings
        return wanted_text(settings, own.max_gen_toks, own.drawing, own.temperature)

    # -- likelihoods -------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For every request (context, continuation) a lower bound on log p(continuation | context) in nats, and whether
        mode drawing in one step a block writes it.

        Spaces at the end of a context count as the continuation's, as for the other models of ``lm_eval``.

        Raises:
            TokenError: the mask token in a request.
        """
        asked = []
        for context, continuation in (request.args for request in requests):
            pair = (
                self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
            )
            asked.append(((context, continuation), *pair))
        return self._loglikelihood_tokens(asked, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """For every request (text,) a lower bound on log p(text) in nats, each block given what comes before it.

        Raises:
            TokenError: the mask token in a text.
        """
        rows = [(self.tok_encode(request.args[0]), 0) for request in requests]

        def note(i: int, answer: tuple[float, bool]) -> None:
            self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, answer[0])

        return [score for score, _ in self._scored(rows, note, disable_tqdm)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [([*context, *continuation], len(context)) for _, context, continuation in requests]

        def note(i: int, answer: tuple[float, bool]) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)

        return self._scored(rows, note, disable_tqdm)

    def _scored(
        self,
        rows: list[tuple[list[int], int]],
        note: Callable[[int, tuple[float, bool]], None],
        quiet: bool,
    ) -> list[tuple[float, bool]]:
        """Scores of (text, length of the context); texts of like length are scored together, the longest first."""
        self._note_lengths([len(text) for text, _ in rows])
        found, size = [(0.0, True)] * len(rows), SLICE * self.settings.batch_size
        order = [i for i, (text, given) in enumerate(rows) if len(text) > given]
        order.sort(key=lambda i: -len(rows[i][0]))
        with _progress("scoring", len(order), quiet) as advance:
            for start in range(0, len(order), size):
                part = order[start : start + size]
                texts = [torch.tensor(rows[i][0]) for i in part]
                scores = self.scorer.score(texts, [rows[i][1] for i in part])
                answers = zip(scores.log_prob.tolist(), scores.modal.tolist(), strict=True)
                for i, answer in zip(part, answers, strict=True):
                    found[i] = answer
                    note(i, answer)
                advance(len(part))
        return found

    # -- words -------------------------------------------------------------------------------------

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens only where the text has them, or if they are asked for.

        Raises:
            TokenError: the mask is among them.
        """
        tokenizer, mask = self.model.tokenizer, self.model.denoiser.mask_token_id
        ids: list[int] = tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)).ids
        if mask in ids:
            raise TokenError(
                f"{string[-60:]!r}: expected a text without the mask token, found {tokenizer.id_to_token(mask)!r} at "
                f"token {ids.index(mask)}, where something is to be written; take it out of the task's text"
            )
        return ids

    @property
    def eot_token_id(self) -> int | None:
        """The first of the tokens that end a text; None: there is none."""
        return self.model.ends[0] if self.model.ends else None

    @property
    def tokenizer_name(self) -> str:
        """Of the tokenizer, fit for a file name."""
        return str(getattr(self.tokenizer, "name_or_path", "") or self.settings.backbone).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt that the tokenizer's chat template makes of a conversation.

        Raises:
            ConfigError: it has none.
        """
        if not getattr(self.model.words, "chat_template", None):
            raise ConfigError(
                f"{self.settings.backbone}: expected a tokenizer with a chat template, found none; leave out "
                "--apply_chat_template"
            )
        prompt: str = self.model.words.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return prompt

    def _note_lengths(self, lengths: list[int]) -> None:
        longest = max(lengths, default=0)
        if self.max_length is not None and longest > self.max_length:
            log.warning(
                "%d of %d texts are longer than max_length=%d, up to %d tokens: the network reads the last ones",
                sum(length > self.max_length for length in lengths),
                len(lengths),
                self.max_length,
                longest,
            )


@contextmanager
def _progress(what: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; what it gives is called with the number of requests that were done."""
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
