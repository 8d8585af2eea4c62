"""When a text has ended: stop tokens and stop strings."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from codd_ppl.errors import ConfigError
from codd_ppl.typing import Int, Tensor

__all__ = ["FirstStop", "NeverStop", "StopRule", "StopStrings", "StopTokens"]


@runtime_checkable
class StopRule(Protocol):
    """Finds the end of what was written."""

    def end(self, written: Int[Tensor, "rows sites"]) -> Int[Tensor, " rows"]:
        """(rows,) int64: number of tokens up to and with the first stop; sites + 1 where there is none."""


class NeverStop:
    """Texts end where their templates do."""

    def end(self, written: Int[Tensor, "rows sites"]) -> Int[Tensor, " rows"]:
        """sites + 1 for every row."""
        return torch.full(written.shape[:1], written.shape[1] + 1, device=written.device)


class FirstStop:
    """A text ends where the first of several rules ends it; without rules, never."""

    def __init__(self, *rules: StopRule) -> None:
        self.rules = (NeverStop(), *rules)

    def end(self, written: Int[Tensor, "rows sites"]) -> Int[Tensor, " rows"]:
        """The smallest of the rules' answers."""
        return torch.stack([rule.end(written) for rule in self.rules]).amin(0)


class StopTokens:
    """A text ends with the first of these tokens, such as the end-of-text token.

    Raises:
        ConfigError: no ids.
    """

    def __init__(self, *ids: int) -> None:
        if not ids:
            raise ConfigError(
                "expected at least one token id, found none; pass e.g. StopTokens(0), or NeverStop()"
            )
        self.ids = ids

    def end(self, written: Int[Tensor, "rows sites"]) -> Int[Tensor, " rows"]:
        """(rows,) int64: tokens up to and with the first stop token; sites + 1 where there is none."""
        found = torch.isin(written, torch.tensor(self.ids, device=written.device))
        after = found.new_ones(len(found), 1)  # a stop behind the end, for rows without
        return torch.cat((found, after), 1).long().argmax(1) + 1


class StopStrings:
    """A text ends with the first token that completes one of these strings, whatever tokens make it up.

    Args:
        strings: the strings.
        decode: ids -> text, of the tokenizer.

    Raises:
        ConfigError: no strings, or an empty one.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        if not strings or not all(strings):
            raise ConfigError(
                f"expected at least one string, none of them empty, found {list(strings)}; leave out what is empty"
            )
        self.strings, self.decode = tuple(strings), decode

    def end(self, written: Int[Tensor, "rows sites"]) -> Int[Tensor, " rows"]:
        """(rows,) int64: tokens up to and with the one that completes a string; sites + 1 where there is none."""
        return torch.tensor([self._end(row) for row in written.tolist()], device=written.device)

    def cut(self, text: str) -> str:
        """The text before the first of the strings."""
        places = [text.find(string) for string in self.strings if string in text]
        return text[: min(places)] if places else text

    def _end(self, ids: list[int]) -> int:
        low, high = 0, len(ids)
        if not self._in(ids):
            return high + 1
        while high - low > 1:  # the string is in the first ``high`` tokens and not in the first ``low``
            middle = (low + high) // 2
            low, high = (low, middle) if self._in(ids[:middle]) else (middle, high)
        return high

    def _in(self, ids: list[int]) -> bool:
        text = self.decode(ids)
        return any(string in text for string in self.strings)
