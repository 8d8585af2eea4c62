"""What ``codd generate --html`` notes while texts are written, and the page it makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from codd_ppl.commands.generate_output import Text
from codd_ppl.evaluation.files import write_whole
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import token_edges
from codd_ppl.sampling import Step
from codd_ppl.sampling.page import RevealedText, reveal_page
from codd_ppl.typing import Int, Tensor

__all__ = ["Recorder"]


class Recorder:
    """Step and confidence of every token, text by text; the steps of later blocks count on.

    Args:
        tokenizer: of the texts.
        graph: of the coupling. Where it ties neighbours and no others (a hidden Markov graph, a chain), the page shows
            that all along a text of any length, else as the graph has it, where its windows began.

    Attributes:
        texts: those that are whole.
    """

    def __init__(self, tokenizer: Tokenizer, graph: FactorGraph) -> None:
        self.tokenizer = tokenizer
        self._edges = token_edges(graph)
        self._neighbours = bool(self._edges) and all(b == a + 1 for a, b in self._edges)
        self.texts: list[RevealedText] = []
        self.begin([])

    def begin(self, templates: Sequence[Int[Tensor, " any"]]) -> None:
        """A batch is about to be written."""
        self._history = [[-1] * len(template) for template in templates]
        self._sure = [[1.0] * len(template) for template in templates]
        self._steps = [0] * len(templates)
        self._starts: list[set[int]] = [set() for _ in templates]

    def step(self, step: Step) -> None:
        """Note what it wrote; a step that wrote nothing is none."""
        if step.dist is None:
            return
        own = step.dist.marginals.gather(
            -1, step.tokens.clamp_max(step.dist.marginals.shape[-1] - 1)[..., None]
        )
        sure, revealed = own[..., 0].cpu().tolist(), step.revealed.cpu().tolist()
        for i, row in enumerate(step.rows or range(len(revealed))):
            written = [
                site
                for site, fresh in enumerate(revealed[i])
                if fresh and step.start + site < len(self._history[row])
            ]
            for site in written:
                self._history[row][step.start + site] = self._steps[row]
                self._sure[row][step.start + site] = sure[i][site]
            self._steps[row] += bool(written)
            self._starts[row].add(step.start)

    def end(self, texts: Sequence[Text]) -> None:
        """A batch is written."""
        for row, text in enumerate(texts):
            count = len(text.tokens)
            pieces = [self.tokenizer.decode([token], skip_special_tokens=False) for token in text.tokens]
            steps, sure = self._history[row][:count], self._sure[row][:count]
            self.texts.append(RevealedText(pieces, steps, sure, self._tied(row, count)))

    def save(self, path: Path, title: str) -> None:
        """Write the page."""
        write_whole(path, reveal_page(self.texts, title))

    def _tied(self, row: int, count: int) -> list[tuple[int, int]]:
        if self._neighbours:
            return [(i, i + 1) for i in range(count - 1)]
        return sorted({(a + start, b + start) for start in self._starts[row] for a, b in self._edges})
