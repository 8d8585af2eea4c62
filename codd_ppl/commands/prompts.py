"""What ``codd generate`` is asked to write: prompts, files of prompts and templates, as token ids with masks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from codd_ppl.errors import ConfigError, DataError
from codd_ppl.model_folder import SavedModel
from codd_ppl.sampling import encode_template
from codd_ppl.training.tokenizer import UNKNOWN
from codd_ppl.typing import Int, Tensor

__all__ = ["Task", "read_tasks"]


@dataclass(frozen=True)
class Task:
    """One text to write.

    Attributes:
        prompt: the prompt or template, as it was given.
        sample: which of the texts of this prompt.
        template: token ids, masks where to write.
        given: number of tokens before the first mask.
    """

    prompt: str
    sample: int
    template: Int[Tensor, " any"]
    given: int


def read_tasks(
    options: argparse.Namespace, saved: SavedModel, turn: Callable[[str], str] | None = None
) -> list[Task]:
    """``--samples`` tasks for each prompt, line of a file and template, in the order of the command line's groups.

    Without any of them, texts without a beginning. ``--length`` masks follow; by default as many as fill the model's
    sites, but at least half of these after a prompt and none after a template that is longer.

    Args:
        options: of the command.
        saved: the model.
        turn: makes of a prompt, given or from a file, what the network is to read; None: it is read as it is.

    Raises:
        ConfigError: a template that isn't one, or nothing to write.
        DataError: a file that can't be read, or one without prompts.
    """
    assert saved.tokenizer is not None
    tokenizer, mask, sites = saved.tokenizer, saved.denoiser.mask_token_id, saved.coupling.sites

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    prompts = [*options.prompt, *(line for path in options.prompt_file for line in _lines(path))]
    prompts = prompts if turn is None else [turn(prompt) for prompt in prompts]
    found = [(prompt, torch.tensor(encode(prompt), dtype=torch.int64)) for prompt in prompts]
    found += [(template, encode_template(template, encode, mask)) for template in options.template]
    tasks = []
    for place, (text, ids) in enumerate(found or [("", torch.zeros(0, dtype=torch.int64))]):
        number = options.length
        if number is None:
            number = max(0 if place >= len(prompts) and found else max(1, sites // 2), sites - len(ids))
        template = torch.cat((ids, torch.full((number,), mask)))
        masked = (template == mask).nonzero()
        if not len(masked):
            raise ConfigError(
                f"{text!r}: expected something to write, found none; mark places with _ or [MASK:12], or give "
                "--length 20"
            )
        _warn_of_unknown(text, ids[ids != mask].tolist(), saved)
        tasks += [Task(text, sample, template, int(masked[0])) for sample in range(options.samples)]
    return tasks


def _lines(path: Path) -> Iterator[str]:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--prompt-file {path}: expected a UTF-8 text with a prompt on each line, but {error}; - reads standard "
            "input"
        ) from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(
            f"--prompt-file {path}: expected a prompt on each line, found none; leave it out for none"
        )
    return iter(lines)


def _warn_of_unknown(text: str, ids: list[int], saved: SavedModel) -> None:
    assert saved.tokenizer is not None
    unknown = saved.tokenizer.token_to_id(UNKNOWN)
    if unknown is not None and unknown in ids and UNKNOWN not in text:
        print(
            f"codd: {text!r} has {ids.count(unknown)} characters that the model has no token for; they are read as "
            f"{UNKNOWN}",
            file=sys.stderr,
        )
