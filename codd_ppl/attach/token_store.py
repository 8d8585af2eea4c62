"""A corpus as blocks of tokens on disk, encoded once, memory-mapped: as large as the disk, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from codd_ppl.attach.examples import Example
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.folders import whole_file
from codd_ppl.typing import Int

__all__ = ["Rows", "TokenStore"]

AT_ONCE = 500
"""Examples that are encoded together, and written together."""

PARTS = ("train", "held_out")


@dataclass(frozen=True)
class Rows:
    """Blocks of one part of a corpus, and the text before each.

    Attributes:
        blocks: (n, sites) int32.
        tokens: one row of all tokens, int32, prompts included.
        starts: (n,) where each block begins in it; None: one block follows another.
        contexts: (n,) where the text before each block begins; None: at the front.
    """

    blocks: Int[Tensor, "n sites"]
    tokens: Int[Tensor, "tokens"]
    starts: Int[Tensor, "n"] | None
    contexts: Int[Tensor, "n"] | None

    def context(
        self, rows: Int[Tensor, "some"], length: int, pad_token_id: int
    ) -> Int[Tensor, "some length"]:
        """The last ``length`` tokens before blocks, int64, padded on the left where there are fewer."""
        starts = rows * self.blocks.shape[1] if self.starts is None else self.starts[rows]
        first = torch.zeros_like(starts) if self.contexts is None else self.contexts[rows]
        places = starts[:, None] + torch.arange(-length, 0)
        found = self.tokens[places.clamp(min=0)].long()
        return torch.where(places >= first[:, None], found, pad_token_id)


@dataclass
class TokenStore:
    """Files of token ids in a folder of their own.

    Documents follow one another, each with the end of text after it, and are cut into blocks wherever they end up; an
    answer begins a block and is filled up with ends of text to whole blocks, as masked models write them. Every
    ``1 / fraction``-th example or so is held out, by a hash of its number.

    Args:
        path: the folder; made if it isn't there. One that holds a part of this corpus is gone on with.
        tokenizer: of the network.
        sites: of a block.
        end: tokens that end a text.
        answers: whether texts are answers.
        held_out: share of the examples to hold out, 0 to 1.
        limit: end after so many tokens for training; None: all.
        held_out_limit: and hold out so many at most.
    """

    path: Path
    tokenizer: Tokenizer
    sites: int
    end: list[int]
    answers: bool
    held_out: float = 0.02
    limit: int | None = None
    held_out_limit: int = 1_000_000
    _lengths: dict[str, int] = field(default_factory=dict, init=False)
    _examples: int = field(default=0, init=False)

    def build(self, examples: Iterable[Example]) -> Iterator[int]:
        """Encode what isn't encoded yet; yields the number of training tokens after each part.

        Raises:
            ConfigError: answers without a token that ends them.
        """
        if self.answers and len(self.end) != 1:
            raise ConfigError(
                "answers are filled up with the token that ends a text: expected a tokenizer with one, found "
                f"{self.end}; give the texts as documents instead"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if self._resume():
            return
        todo = islice(examples, self._examples, None)
        while some := list(islice(todo, AT_ONCE)):
            self._add(some)
            full = self.limit is not None and self._lengths["train.tokens"] >= 4 * self.limit
            self._note(done=full)
            yield self._lengths["train.tokens"] // 4
            if full:
                return
        self._note(done=True)

    def part(self, name: str) -> Rows:
        """The blocks of "train" or "held_out".

        Raises:
            DataError: not a single one.
        """
        tokens = self._read(f"{name}.tokens", torch.int32)
        if self.answers:
            starts = self._read(f"{name}.starts", torch.int64)
            blocks = tokens.unfold(0, self.sites, 1)[starts] if len(starts) else tokens.view(0, self.sites)
            rows = Rows(blocks, tokens, starts, self._read(f"{name}.contexts", torch.int64))
        else:
            whole = len(tokens) // self.sites
            rows = Rows(tokens[: whole * self.sites].view(whole, self.sites), tokens, None, None)
        if name == "train" and self.limit is not None:
            rows = replace(rows, blocks=rows.blocks[: max(1, self.limit // self.sites)])
        if not len(rows.blocks):
            raise DataError(
                f"expected at least one block of {self.sites} tokens of {name.replace('_', '-')} text, found "
                f"{len(tokens)} tokens; give more text, shorter blocks, or (held-out text) another share or file"
            )
        return rows

    def _resume(self) -> bool:
        """Cut the files to what is noted; whether all is there."""
        notes = self.path / "progress.json"
        known: dict[str, Any] = {"lengths": {}, "examples": 0, "done": False}
        if notes.exists():
            known = json.loads(notes.read_text(encoding="utf-8"))
        self._examples = known["examples"]
        for name in (f"{part}.{kind}" for part in PARTS for kind in ("tokens", "starts", "contexts")):
            self._lengths[name] = known["lengths"].get(name, 0)
            with (self.path / name).open("ab") as file:
                file.truncate(self._lengths[name])
        return bool(known["done"])

    def _note(self, done: bool) -> None:
        known = {"lengths": self._lengths, "examples": self._examples, "done": done}
        with whole_file(self.path / "progress.json") as draft:
            draft.write_text(json.dumps(known), encoding="utf-8")

    def _add(self, examples: list[Example]) -> None:
        """Append examples to the files."""
        encode = self.tokenizer.encode_batch_fast
        texts = [e.ids for e in encode([e.text for e in examples], add_special_tokens=False)]
        prompts = [e.ids for e in encode([e.prompt for e in examples], add_special_tokens=False)]
        new: dict[str, list[np.ndarray]] = {name: [] for name in self._lengths}
        size = {part: self._lengths[f"{part}.tokens"] // 4 for part in PARTS}
        for prompt, text in zip(prompts, texts, strict=True):
            part = "held_out" if self._holds_out() and size["held_out"] < self.held_out_limit else "train"
            self._examples += 1
            if self.answers:
                blocks = len(text) // self.sites + 1  # at least one end
                ids = prompt + text + self.end * (blocks * self.sites - len(text))
                first = size[part] + len(prompt)
                new[f"{part}.starts"].append(first + self.sites * np.arange(blocks, dtype=np.int64))
                new[f"{part}.contexts"].append(np.full(blocks, size[part], dtype=np.int64))
            else:
                ids = text + self.end
            new[f"{part}.tokens"].append(np.array(ids, dtype=np.int32))
            size[part] += len(ids)
        for name, arrays in new.items():
            with (self.path / name).open("ab") as file:
                for array in arrays:
                    file.write(array.tobytes())
                file.flush()
                os.fsync(file.fileno())
                self._lengths[name] = file.tell()

    def _holds_out(self) -> bool:
        digest = hashlib.blake2b(str(self._examples).encode(), digest_size=4).digest()
        return int.from_bytes(digest) < self.held_out * 2**32

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A file's numbers, mapped into memory."""
        path, each = self.path / name, dtype.itemsize
        count = path.stat().st_size // each
        if not count:
            return torch.zeros(0, dtype=dtype)
        return torch.from_file(str(path), shared=False, size=count, dtype=dtype)
