"""What a row of the user's data is to a coupling: a text, or a prompt and the answer that is to be generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from codd_ppl.errors import DataError
from codd_ppl.training.text_files import PathLike, iterate_documents, iterate_rows, join_fields

__all__ = ["Answers", "Chat", "Conversations", "Example", "Examples", "Texts"]


@dataclass(frozen=True)
class Example:
    """``text`` is what the model should write; ``prompt`` what it then has read."""

    prompt: str
    text: str


Chat = Callable[[Sequence[Mapping[str, str]]], str]
"""Renders a conversation by a model's chat template, up to where the next answer begins."""


@runtime_checkable
class Examples(Protocol):
    """Where examples come from."""

    def read(self, source: PathLike | Sequence[PathLike]) -> Iterator[Example]:
        """The examples of text files, one after another."""


@dataclass(frozen=True)
class Texts:
    """Documents as they are.

    Args:
        fields: fields of a .jsonl line that make up a document, joined by line ends.
    """

    fields: Sequence[str] = ("text",)

    def read(self, source: PathLike | Sequence[PathLike]) -> Iterator[Example]:
        """Documents; errors of :func:`codd_ppl.training.text_files.iterate_documents`."""
        for document in iterate_documents(source, self.fields):
            yield Example("", document)


@dataclass(frozen=True)
class Answers:
    """A field is the answer, others are the prompt.

    Args:
        prompt: fields of the prompt, joined by line ends.
        answer: the field of the answer.
        chat: renders the prompt as a conversation of one turn; None: the prompt as it is, and a blank line.
    """

    prompt: Sequence[str]
    answer: str
    chat: Chat | None = None

    def read(self, source: PathLike | Sequence[PathLike]) -> Iterator[Example]:
        """Prompts and answers; rows with an empty answer are left out.

        Raises:
            DataError: a row without these fields, or without text in them.
        """
        for where, row in iterate_rows(source):
            prompt = join_fields(row, self.prompt, where) if self.prompt else ""
            answer = join_fields(row, (self.answer,), where)
            if answer.strip():
                asked = [{"role": "user", "content": prompt}]
                yield Example(f"{prompt}\n\n" if self.chat is None else self.chat(asked), answer)


@dataclass(frozen=True)
class Conversations:
    """A field holds a conversation: {"role": .., "content": ..}, ..; each turn of the assistant is an answer.

    Args:
        field: its name.
        chat: renders all that came before an answer.
    """

    field: str
    chat: Chat

    def read(self, source: PathLike | Sequence[PathLike]) -> Iterator[Example]:
        """What the assistant says, each time with the conversation before it.

        Raises:
            DataError: a row without such a conversation.
        """
        for where, row in iterate_rows(source):
            turns = row.get(self.field)
            if not isinstance(turns, list) or not all(map(_is_turn, turns)):
                raise DataError(
                    f"{where}: expected in field {self.field!r} a list of objects with texts under role and content, "
                    f"found {type(turns).__name__}; name the field of the conversation, or give prompt and answer "
                    "fields"
                )
            for i, turn in enumerate(turns):
                if turn["role"] == "assistant" and turn["content"].strip():
                    yield Example(self.chat(turns[:i]), turn["content"])


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
