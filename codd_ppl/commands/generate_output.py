"""How ``codd generate`` shows texts: one a line, JSON lines, or live on a terminal while they are written."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress
from rich.text import Text as RichText
from tokenizers import Tokenizer

from codd_ppl.sampling import Step
from codd_ppl.typing import Int, Tensor

__all__ = ["JsonLines", "LiveText", "Output", "Text", "text_output"]

MASKED = "░"


@dataclass(frozen=True)
class Text:
    """A text that was written, the fields of a JSON line.

    Attributes:
        prompt: the prompt or template, as it was given.
        sample: which of the texts of this prompt.
        text: prompt and what was written, up to a stop.
        tokens: ids of it, the stop included.
        nfe: network calls that it took part in; with ``--best-of`` those of all its candidates.
        seconds: wall clock of the batch that it was written in.
        batch: texts in that batch.
        log_prob: joint log-probability, nats; with ``--best-of`` only.
    """

    prompt: str
    sample: int
    text: str
    tokens: list[int]
    nfe: int
    seconds: float
    batch: int
    log_prob: float | None = None


def text_output(json_lines: bool, tokenizer: Tokenizer, mask_token_id: int, texts: int) -> Output:
    """JSON lines if asked for, else live where standard output is a terminal, else plain lines."""
    if json_lines:
        return JsonLines(texts)
    if sys.stdout.isatty():
        return LiveText(texts, tokenizer, mask_token_id)
    return Output(texts)


class Output:
    """One text a line, line ends as ⏎; a context manager, since other outputs own the terminal for a while."""

    def __init__(self, texts: int) -> None:
        self.calls = 0
        self.seconds = 0.0
        self._bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("texts", total=texts)

    def __enter__(self) -> Output:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if kind is None:
            print(f"{self.calls} network calls, {self.seconds:.2f} s", file=sys.stderr)

    def begin(self, templates: Sequence[Int[Tensor, " any"]]) -> None:
        """A batch is about to be written."""

    def step(self, step: Step) -> None:
        """A reverse step is done."""

    def end(self, texts: Sequence[Text], calls: int) -> None:
        """A batch is written: it is shown at once."""
        for text in texts:
            self.show(text)
        sys.stdout.flush()
        self.calls += calls
        self.seconds += texts[0].seconds if texts else 0.0
        self._bar.advance(self._task, len(texts))

    def show(self, text: Text) -> None:
        """Print one text."""
        print(text.text.replace("\n", "⏎"))


class JsonLines(Output):
    """One JSON object a line: the fields of :class:`Text`, without ``log_prob`` where there is none."""

    def show(self, text: Text) -> None:
        """Print it."""
        print(json.dumps({k: v for k, v in asdict(text).items() if v is not None}, ensure_ascii=False))


class LiveText(Output):
    """Texts as they are written: masks as ░, what a step wrote in bold; then plain lines in their place."""

    def __init__(self, texts: int, tokenizer: Tokenizer, mask_token_id: int) -> None:
        super().__init__(texts)
        self._bar.disable = True
        self.tokenizer, self.mask = tokenizer, mask_token_id
        self._live: Live | None = None
        self._tokens: list[Tensor] = []
        self._fresh: list[Tensor] = []

    def begin(self, templates: Sequence[Int[Tensor, " any"]]) -> None:
        """Show the templates."""
        self._tokens = [template.clone() for template in templates]
        self._fresh = [torch.zeros(len(template), dtype=torch.bool) for template in templates]
        self._live = Live(self._picture(), console=Console(), transient=True, auto_refresh=False)
        self._live.start()

    def step(self, step: Step) -> None:
        """Show what the step wrote."""
        for row, tokens, revealed in zip(
            step.rows or range(len(step.tokens)), step.tokens.cpu(), step.revealed.cpu(), strict=True
        ):
            width = min(len(tokens), len(self._tokens[row]) - step.start)
            place = slice(step.start, step.start + width)
            self._tokens[row][place] = tokens[:width]
            self._fresh[row][:] = False
            self._fresh[row][place] = revealed[:width]
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)

    def end(self, texts: Sequence[Text], calls: int) -> None:
        """Replace the picture by the texts."""
        self._stop()
        super().end(texts, calls)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        super().__exit__(kind, error, trace)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _picture(self) -> Group:
        """As many texts as fit the terminal."""
        room = max(1, (Console().height - 1) // 2)
        rows = zip(self._tokens[:room], self._fresh[:room], strict=True)
        return Group(*(self._row(tokens, fresh) for tokens, fresh in rows))

    def _row(self, tokens: Tensor, fresh: Tensor) -> RichText:
        """Runs of tokens of one kind, each decoded as a whole."""
        kinds = torch.where(tokens == self.mask, 2, fresh.long())
        result = RichText()
        values, lengths = kinds.unique_consecutive(return_counts=True)
        start = 0
        for kind, length in zip(values.tolist(), lengths.tolist(), strict=True):
            ids = tokens[start : start + length].tolist()
            start += length
            if kind == 2:
                result.append(MASKED * length, style="dim")
            else:
                text = self.tokenizer.decode(ids, skip_special_tokens=False).replace("\n", "⏎")
                result.append(text, style="bold green" if kind else None)
        return result
