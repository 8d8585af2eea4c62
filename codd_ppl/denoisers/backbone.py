"""What a folder of ``transformers`` says of a model beside its weights: sizes, special tokens, tokenizer, chats."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from codd_ppl.errors import ConfigError, DataError

__all__ = ["Backbone", "positions", "read_part"]

SHIFTED = ("dream",)
"""Types of models whose logits at a place are those of the token after it."""

POSITIONS = ("max_position_embeddings", "max_sequence_length", "n_positions", "model_length")
"""What configurations call the longest text."""


@dataclass(frozen=True)
class Backbone:
    """A model's configuration and tokenizer.

    Attributes:
        name: folder or id.
        config: of ``transformers``.
        vocab_size: columns of the logits.
        mask_token_id: of the mask.
        shift: whether logits at a place are about the token after it.
        pad_token_id: tokens that the others don't see; None: there are none.
        end_token_id: what ends a text; None: the tokenizer has none.
        words: the tokenizer of ``transformers``; None where there is none.
    """

    name: str
    config: Any
    vocab_size: int
    mask_token_id: int
    shift: bool
    pad_token_id: int | None
    end_token_id: int | None
    words: Any

    @classmethod
    def read(
        cls,
        library: Any,
        name: str,
        revision: str | None = None,
        trust_remote_code: bool = False,
        mask_token_id: int | None = None,
        shift: bool | None = None,
    ) -> Backbone:
        """Read configuration and tokenizer.

        Args:
            library: the module ``transformers``.
            name: folder or id.
            revision: commit or branch on the hub.
            trust_remote_code: run code that comes with the model; from the hub only with a full commit as revision.
            mask_token_id: if neither the configuration nor the tokenizer says it.
            shift: None: by the type of the model.

        Raises:
            ConfigError: no id of the mask, or code that is not trusted or not pinned.
            DataError: nothing that can be read there.
        """
        if (
            trust_remote_code
            and not Path(name).is_dir()
            and not re.fullmatch(r"[0-9a-f]{40}", revision or "")
        ):
            raise ConfigError(
                f"trust_remote_code: expected the full commit (40 hex digits) of {name} as revision, found "
                f"{revision!r}; read the code on the hub at that commit, and pin it"
            )
        config = read_part(library.AutoConfig, name, revision, trust_remote_code)
        given = {"revision": revision} if revision else {}
        try:
            words = library.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **given)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            words = None
        mask: Any = mask_token_id
        for source in (config, words):
            mask = getattr(source, "mask_token_id", None) if mask is None else mask
        if mask is None:
            raise ConfigError(
                f"{name}: expected mask_token_id in the configuration or the tokenizer, found none; pass the id "
                "that the model was trained with as mask_token_id=.., or use a masked model"
            )
        end = getattr(words, "eos_token_id", None)
        end = getattr(config, "eos_token_id", None) if end is None else end
        pad = getattr(config, "pad_token_id", None)
        if pad in (mask, getattr(config, "eos_token_id", None)):  # a token of its own, not padding
            pad = None
        kind = str(getattr(config, "model_type", "")).lower()
        return cls(
            name,
            config,
            int(config.vocab_size),
            int(mask),
            kind in SHIFTED if shift is None else shift,
            pad,
            end[0] if isinstance(end, list) else end,
            words,
        )

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the library ``tokenizers``; None where there is none."""
        return getattr(self.words, "backend_tokenizer", None)

    @property
    def positions(self) -> int | None:
        """The longest text that the model reads; None where its configuration doesn't say."""
        return positions(self.config)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation, up to where the next answer begins, by the model's chat template.

        Args:
            messages: with "role" and "content".

        Raises:
            ConfigError: the model has none.
        """
        if not getattr(self.words, "chat_template", None):
            raise ConfigError(
                f"{self.name}: expected a tokenizer with a chat template, found none; give the text as it is, without "
                "the template"
            )
        return str(self.words.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def positions(config: Any) -> int | None:
    """The longest text that a model reads, by its configuration; None where that doesn't say."""
    found = [value for name in POSITIONS if isinstance(value := getattr(config, name, None), int)]
    return min((value for value in found if value > 0), default=None)


def read_part(
    kind: Any, name: str, revision: str | None = None, trust_remote_code: bool = False, **settings: Any
) -> Any:
    """What ``kind.from_pretrained`` gives, its errors in our words.

    Raises:
        ConfigError: code that is not trusted.
        DataError: nothing that can be read there.
    """
    given = {"revision": revision} if revision else {}
    try:
        return kind.from_pretrained(name, trust_remote_code=trust_remote_code, **given, **settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        text = str(error)
        if not trust_remote_code and "trust_remote_code" in text:
            raise ConfigError(
                f"{name} comes with Python code of its own: read it, then pass trust_remote_code=True "
                "(--trust-remote-code), from the hub together with the full commit as revision"
            ) from error
        raise DataError(
            f"{name}: expected a masked model of transformers, a folder or an id on the hub, found {text.strip()[:300]}"
        ) from error
