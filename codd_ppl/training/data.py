"""Text as fixed blocks of tokens, for training and validation: a LightningDataModule."""

from collections.abc import Sequence
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tokenizers import Tokenizer

from codd_ppl.errors import ConfigError, DataError, ShapeError, TokenError
from codd_ppl.training.blocks import BlockLoader, cut_blocks
from codd_ppl.training.text_files import PathLike, read_documents, split_documents
from codd_ppl.training.tokenizer import (
    build_tokenizer,
    cached_tokenizer,
    default_cache_dir,
    encode_documents,
    read_tokenizer,
    text8_normalizer,
)
from codd_ppl.typing import Int, Tensor

__all__ = ["TextDataModule"]


class TextDataModule(L.LightningDataModule):
    """Blocks of ``block_length`` tokens from text files; batches are x0, int64 (batch, sites).

    The documents (see :func:`codd_ppl.training.text_files.read_documents`) are split into training and
    validation, the tokenizer is made from the training documents alone, and each split becomes one row
    of tokens that is cut into blocks. Everything follows from the files and ``seed``. All of it happens
    on first use: reading ``vocab_size`` or ``tokenizer`` calls :meth:`setup`.

    Args:
        path: .txt or .jsonl file, also .gz or .xz; a list of them; or ``"hf:owner/name"``.
        valid_path: the same for validation. None: part of ``path`` is set aside, whole documents
            drawn with ``seed``, or the last part if there is only one document.
        tokenizer: "char", "byte", "bpe" (see :func:`codd_ppl.training.tokenizer.build_tokenizer`), the
            path of a ``tokenizer.json``, or a ``tokenizers.Tokenizer``.
        vocab_size: at most so many tokens; None: 256 characters, 1024 byte pairs.
        block_length: sites of a block.
        batch_size: blocks of a batch.
        normalize: None, or "text8": only a to z and single spaces.
        fields: fields of a .jsonl line or data set row that make up a document, joined by line ends.
        document_separator: what stands between the documents of a .txt file; None: blank lines.
        separator: what stands between documents in the blocks; None: a blank line (text8: a space).
        valid_fraction: part of the characters to set aside, at least one document.
        limit: read so many characters of ``path`` (and of ``valid_path``) at most.
        random_offsets: training blocks start anywhere in the text, drawn anew in each epoch.
        seed: of the split and of the order of the training blocks.
        cache_dir: where ``tokenizer.json`` is kept for next time. None: the user's cache folder, and
            only for "bpe", since the others take no time.

    Raises:
        ConfigError: a setting out of range.
        DataError: in :meth:`setup`, a file that can't be used, or too little text for one block.
    """

    def __init__(
        self,
        path: Sequence[PathLike] | PathLike,  # in this order: recipes' lists are tried as lists first
        valid_path: Sequence[PathLike] | PathLike | None = None,
        tokenizer: str | Tokenizer = "char",
        vocab_size: int | None = None,
        block_length: int = 64,
        batch_size: int = 64,
        normalize: Literal["text8"] | None = None,
        fields: str | Sequence[str] = "text",
        document_separator: str | None = None,
        separator: str | None = None,
        valid_fraction: float = 0.1,
        limit: int | None = None,
        random_offsets: bool = False,
        seed: int = 0,
        cache_dir: PathLike | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("block_length", block_length), ("batch_size", batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise ConfigError(f"expected {name} >= 1, found {value}")
        if not 0.0 < valid_fraction < 1.0:
            raise ConfigError(f"expected valid_fraction between 0 and 1, found {valid_fraction}; try 0.1")
        if seed < 0:
            raise ConfigError(f"expected seed >= 0, found {seed}")
        if normalize not in (None, "text8"):
            raise ConfigError(f'expected normalize to be None or "text8", found {normalize!r}')
        if isinstance(tokenizer, str) and not tokenizer.endswith(".json"):
            build_tokenizer(tokenizer, ["ab"], vocab_size, normalize)  # wrong settings are found at once
        self.path = path
        self.valid_path = valid_path
        self.block_length = block_length
        self.batch_size = batch_size
        self.normalize = normalize
        self.fields = fields
        self.document_separator = document_separator
        self.separator = separator if separator is not None else (" " if normalize else "\n\n")
        self.valid_fraction = valid_fraction
        self.limit = limit
        self.random_offsets = random_offsets
        self.seed = seed
        self.cache_dir = cache_dir
        self.split: Literal["files", "documents", "position"] | None = None
        """How validation was separated from training; None before :meth:`setup`."""
        self._tokenizer_setting = tokenizer
        self._vocab_size_setting = vocab_size
        self._ready: tuple[Tokenizer, Tensor, Tensor] | None = None

    # --- Lightning ------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Called in one process per machine, so that the others find the tokenizer in the cache."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Reads, splits and encodes the text; a second call does nothing."""
        if self._ready is None:
            train, valid = self._documents()
            tokenizer = self._make_tokenizer(train)
            train_tokens = encode_documents(tokenizer, train, self.separator)
            valid_tokens = encode_documents(tokenizer, valid, self.separator)
            self._check_length(train_tokens, "training", self.path)
            self._check_length(valid_tokens, "validation", self.valid_path or self.path)
            self._ready = tokenizer, train_tokens, valid_tokens

    def train_dataloader(self) -> BlockLoader:
        """Shuffled batches of training blocks."""
        # Lightning's overfit_batches wants the same batches in every epoch
        return self._loader(1, shuffle=not getattr(self.trainer, "overfit_batches", 0))

    def val_dataloader(self) -> BlockLoader:
        """Batches of validation blocks, in the order of the text."""
        return self._loader(2, shuffle=False)

    # --- what the text has become ---------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; ``tokenizer.save(path)`` writes its tokenizer.json."""
        return self._state[0]

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the denoiser's mask token is the id after the last."""
        return self.tokenizer.get_vocab_size()

    def train_blocks(self) -> Int[Tensor, "blocks sites"]:
        """All training blocks, in the order of the text."""
        return cut_blocks(self._state[1], self.block_length)

    def valid_blocks(self) -> Int[Tensor, "blocks sites"]:
        """All validation blocks, in the order of the text."""
        return cut_blocks(self._state[2], self.block_length)

    def encode(self, text: str) -> Int[Tensor, "tokens"]:
        """The ids of a text, normalised as the training text was."""
        if self.normalize:
            text = text8_normalizer().normalize_str(text)
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)

    def decode(self, ids: Int[Tensor, "tokens"] | Sequence[int], mask: str = "_") -> str:
        """The text of a row of ids; the mask token, ``vocab_size``, is shown as ``mask``.

        Raises:
            ShapeError: more than one row.
            TokenError: an id outside 0 .. vocab_size.
        """
        row = torch.as_tensor(ids)
        if row.ndim != 1:
            raise ShapeError(f"expected one row of ids, found shape {tuple(row.shape)}; decode row by row")
        runs: list[list[int]] = [[]]
        for token in row.tolist():
            if not 0 <= token <= self.vocab_size:
                raise TokenError(f"expected ids from 0 to {self.vocab_size} (the mask), found {token}")
            if token == self.vocab_size:
                runs.append([])
            else:
                runs[-1].append(token)
        return mask.join(self.tokenizer.decode(run, skip_special_tokens=False) for run in runs)

    # --- steps of setup ---------------------------------------------------------------------------------

    @property
    def _state(self) -> tuple[Tokenizer, Tensor, Tensor]:
        self.setup()
        assert self._ready is not None
        return self._ready

    def _read(self, path: PathLike | Sequence[PathLike], split: str) -> list[str]:
        documents = read_documents(path, self.fields, self.document_separator, self.limit)
        if self.normalize:
            normalizer = text8_normalizer()
            documents = [
                text for document in documents if (text := normalizer.normalize_str(document).strip())
            ]
        if not documents:
            raise DataError(
                f'no {split} document left in {path} after normalize="text8": no letters or digits'
            )
        return documents

    def _documents(self) -> tuple[list[str], list[str]]:
        documents = self._read(self.path, "training")
        if self.valid_path is not None:
            self.split = "files"
            return documents, self._read(self.valid_path, "validation")
        train, valid = split_documents(documents, self.valid_fraction, self.seed)
        self.split = "position" if len(documents) == 1 else "documents"
        if self.split == "position":
            rank_zero_info(
                f"{self.path} is one document: its first {len(train[0])} characters are for training, the "
                f"other {len(valid[0])} for validation"
            )
        return train, valid

    def _make_tokenizer(self, documents: list[str]) -> Tokenizer:
        setting = self._tokenizer_setting
        if isinstance(setting, Tokenizer):
            return setting
        if setting.endswith(".json"):
            return read_tokenizer(setting)
        arguments = (setting, documents, self._vocab_size_setting, self.normalize)
        if self.cache_dir is not None:
            return cached_tokenizer(self.cache_dir, *arguments)
        if setting == "bpe":
            try:
                return cached_tokenizer(default_cache_dir(), *arguments)
            except OSError as error:
                rank_zero_info(f"the tokenizer is not kept for next time: {error}")
        return build_tokenizer(*arguments)

    def _check_length(self, tokens: Tensor, split: str, path: object) -> None:
        if len(tokens) < self.block_length:
            remedy = "raise valid_fraction, pass valid_path or " if split == "validation" else ""
            raise DataError(
                f"block longer than the text: expected at least block_length = {self.block_length} tokens of "
                f"{split} text, found {len(tokens)} in {path}; {remedy}lower block_length or give more text"
            )

    def _loader(self, which: Literal[1, 2], shuffle: bool) -> BlockLoader:
        return BlockLoader(
            self._state[which],
            self.block_length,
            self.batch_size,
            shuffle=shuffle,
            random_offsets=self.random_offsets and shuffle,
            seed=self.seed,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            replicas=1 if self.trainer is None else self.trainer.world_size,
        )
